"""The commands when they succeed, and when a budget is missed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import vp_engines
from tests.exporter.cli.samples import (
    FAST,
    NAME,
    Inputs,
    argv,
    call,
    check_error,
    create,
    export_options,
    mask,
    model_args,
    rewrite_manifest,
)
from vp_engines.bundle import read_manifest, verify_bundle
from vp_exporter.cli import export, inspect, validate
from vp_exporter.model.describe import describe
from vp_exporter.model.loading import ModelRequest, load_model
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.masks import plan_from_mask
from vp_exporter.rewrite.reduced_vit import ReducedViT

SCRIPTS = Path(sys.executable).parent
MODEL = argv({"--model": NAME, "--model-arg": model_args()})


def batch(size: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((size, 3, 64, 64), dtype=np.float32)


def reduced_vit(inputs: Inputs, plan: Path | None = None) -> ReducedViT:
    args = dict(word.split("=") for word in model_args())
    model = load_model(ModelRequest(NAME, {key: int(value) for key, value in args.items()}, inputs.weights))
    return ReducedViT(model.vit, model.description, ReductionPlan.load(plan or inputs.plan))


@pytest.mark.slow
def test_engine_computes_what_pytorch_does(exported: Path, inputs: Inputs) -> None:
    images = batch()
    with vp_engines.load(exported) as engine, torch.no_grad():
        logits = engine.run(images)["logits"]
        wanted = reduced_vit(inputs)(torch.from_numpy(images)).numpy()
    assert logits.shape == (3, 3)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


@pytest.mark.slow
def test_exported_bundle_says_what_it_is(exported: Path, inputs: Inputs) -> None:
    manifest = verify_bundle(exported).manifest
    assert (manifest.name, manifest.model.name, manifest.model.num_classes) == ("tiny", NAME, 3)
    assert manifest.model.weights_source == "weights.safetensors"
    assert (manifest.engine.name, manifest.engine.precision) == ("ort", "fp32")
    assert [row if isinstance(row, int) else row[0] for row in manifest.plan.tokens] == [13, 9]
    assert (manifest.validation.accuracy, manifest.validation.latency) == ("measured", "measured")
    report = json.loads((exported / "report.json").read_text())
    # The budget is met; on a busy machine such a small model may measure slower, which is never "passed".
    slower = any(row["outcome"] == "slower" for row in report["latency"])
    assert manifest.validation.status == report["verdict"]["status"] == ("measured" if slower else "passed")
    assert report["accuracy"]["images"] == 24
    assert report["accuracy"]["dense_top1"] == 100
    assert report["accuracy"]["parity"]["max_abs"] < 1e-4
    assert str(inputs.data) not in (exported / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_plan_gives_the_bundle_of_its_mask_as_json(exported: Path, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "new.vpe"
    options = export_options(inputs, out, masks=None, plan=inputs.plan, data=inputs.data, json=True)
    result = call(export.app, *argv(options))
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["bundle"] == "new.vpe"
    assert found["manifest"]["plan"]["fingerprint"] == read_manifest(exported).plan.fingerprint
    assert found["manifest"]["plan"]["method"] == "test"
    assert found["report"] == json.loads((out / "report.json").read_text())
    assert "building the reduced engine (ort, fp32)" in result.stderr
    assert str(tmp_path) not in result.stdout


# Ways to set the amount: options -> tokens that leave the two blocks (17 enter), and the plan's budget.
METHODS: list[tuple[dict[str, Any], list[int], dict[str, Any]]] = [
    ({"method": "tome", "r": 3}, [14, 11], {"r": 3}),
    ({"method": "tome", "r": 3, "schedule": "decreasing"}, [11, 11], {"r": 3, "schedule": "decreasing"}),
    ({"method": "tome", "r": "0,4"}, [17, 13], {"r": [0, 4]}),
    ({"method": "ppt", "r": 4, "tau": 0.001}, [13, 9], {"r": 4, "tau": 0.001}),
    ({"method": "evit", "keep_rate": 0.7, "blocks": 1}, [17, 14], {"keep_rate": 0.7, "blocks": [1]}),
    ({"method": "bat", "keep_rate": 0.7, "method_arg": ["clusters=2", "pairs=1"]}, [13, 10],
     {"keep_rate": 0.7, "args": {"clusters": 2, "pairs": 1}}),
    ({"method": "topk", "keep_rate": 0.5, "method_arg": "score=ats"}, [9, 5],
     {"keep_rate": 0.5, "args": {"score": "ats"}}),
    ({"method": "diffrate", "method_arg": ["prune_to=[15,9]", "merge_to=[12,6]"]}, [12, 6],
     {"args": {"prune_to": [15, 9], "merge_to": [12, 6]}}),
    ({"method": "pitome", "r": 3, "proportional_attention": True}, [14, 11], {"r": 3, "proportional_attention": True}),
    ({"method": "gtp", "r": 3}, [14, 11], {"r": 3}),
    ({"method": "random", "keep_rate": 0.5, "seed": 1}, [9, 9], {"keep_rate": 0.5, "seed": 1}),
    ({"method": "grid", "keep_rate": 0.6}, [11, 11], {"keep_rate": 0.6}),
    ({"method": "center", "target_macs": 0.65}, [11, 11], {"target_macs": 0.65}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("options", "tokens", "asked"), METHODS)
@pytest.mark.usefixtures("ready_engines")
def test_method_writes_its_plan_into_the_bundle(
    options: dict[str, Any], tokens: list[int], asked: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "new.vpe"
    result = call(export.app, *argv(export_options(inputs, out, masks=None, no_validate=True, **options)))
    assert result.exit_code == 0, result.output
    plan = ReductionPlan.load(out / "plan.json")
    assert [row.mlp for row in plan.tokens()] == tokens
    assert (plan.method, plan.budget) == (options["method"], asked)
    manifest = verify_bundle(out).manifest
    assert (manifest.plan.method, manifest.plan.fingerprint) == (options["method"], plan.fingerprint())
    assert plan.proportional_attention == (options["method"] in ("tome", "ppt", "diffrate", "pitome", "gtp"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "tome", "target_macs": 0.75}, {"method": "evit", "target_macs": 0.65}])
def test_method_makes_an_engine(options: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    """The engine matches PyTorch under the bundle's own plan."""
    out = tmp_path / "new.vpe"
    result = call(
        export.app, *argv(export_options(inputs, out, masks=None, no_validate=True, no_dense=True, **options))
    )
    assert result.exit_code == 0, result.output
    images = batch()
    with vp_engines.load(out) as engine, torch.no_grad():
        wanted = reduced_vit(inputs, out / "plan.json")(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(engine.run(images)["logits"], wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_force_replaces(bundle: Path, inputs: Inputs) -> None:
    before = verify_bundle(bundle).digest
    result = call(export.app, *argv(export_options(inputs, bundle, force=True, no_validate=True)))
    assert result.exit_code == 0
    after = verify_bundle(bundle)
    assert after.digest != before
    assert after.manifest.validation.status == "unvalidated"
    assert after.manifest.validation.latency == "unmeasured"
    assert not (bundle / "report.json").exists()
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_force_without_a_bundle_writes_one(inputs: Inputs, tmp_path: Path) -> None:
    options = export_options(inputs, tmp_path / "new.vpe", force=True, no_validate=True)
    assert call(export.app, *argv(options)).exit_code == 0
    verify_bundle(tmp_path / "new.vpe")


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_quiet_prints_the_verdict_alone(inputs: Inputs, tmp_path: Path) -> None:
    result = call(export.app, *argv(export_options(inputs, tmp_path / "new.vpe", data=inputs.data, quiet=True)))
    assert result.exit_code == 0
    assert result.stderr == ""
    assert re.match("(passed|measured): ", result.stdout)
    assert f"wrote {tmp_path / 'new.vpe'} (MAC ratio 1.486)" in result.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_missed_budget_writes_the_bundle_and_says_so(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "slow.vpe"
    result = call(export.app, *argv(export_options(inputs, out, data=inputs.data, min_speedup=100)))
    assert result.exit_code == 1
    assert result.stdout.startswith("failed: Failed the speed budget")
    assert f"wrote {out}" in result.stdout
    manifest = verify_bundle(out).manifest
    assert manifest.validation.status == "failed"
    assert "Failed the speed budget" in manifest.validation.summary
    assert json.loads((out / "report.json").read_text())["verdict"]["status"] == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_corrupt_image_is_named_and_counted(inputs: Inputs, tmp_path: Path) -> None:
    data, out = tmp_path / "images", tmp_path / "new.vpe"
    shutil.copytree(inputs.data, data)
    (data / "b" / "broken.jpg").write_bytes(b"this is no image")
    result = call(export.app, *argv(export_options(inputs, out, data=data, quiet=True)))
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: skipped b/broken.jpg: ")
    assert result.stderr.count("\n") == 1
    report = json.loads((out / "report.json").read_text())
    assert (report["accuracy"]["images"], report["accuracy"]["skipped"]) == (24, 1)
    assert any("1 image that could not be decoded" in text and "b/broken.jpg" in text for text in report["warnings"])


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_unlabelled_images_give_agreement(inputs: Inputs, tmp_path: Path) -> None:
    options = export_options(inputs, tmp_path / "new.vpe", data=inputs.data / "a", min_agreement=50)
    result = call(export.app, *argv(options))
    assert result.exit_code == 0
    assert "100.00% of answers the same (no labels" in result.stdout


@pytest.mark.slow
def test_features_without_images_are_timed_only(tmp_path: Path, inputs: Inputs) -> None:
    out = tmp_path / "features.vpe"
    options = export_options(inputs, out, weights=None, random_init=True, num_classes=0)
    result = call(export.app, *argv(options))
    assert result.exit_code == 0
    assert "Accuracy not validated" in result.stdout
    manifest = verify_bundle(out).manifest
    assert (manifest.validation.status, manifest.validation.accuracy, manifest.validation.latency) == (
        "unvalidated",
        "unmeasured",
        "measured",
    )
    assert manifest.model.num_classes == 0
    assert manifest.model.weights_source == "random"
    with vp_engines.load(out) as engine:
        (features,) = engine.run(batch()).values()
    assert features.shape == (3, 64)


@pytest.mark.slow
def test_no_dense_leaves_the_baseline_out(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "small.vpe"
    result = call(export.app, *argv(export_options(inputs, out, no_dense=True)))
    assert result.exit_code == 0
    assert list(verify_bundle(out).manifest.variants) == ["reduced"]
    assert not (out / "dense").exists()
    assert "neither speed-up nor accuracy is measured" in result.stdout
    with pytest.raises(vp_engines.BundleIncompatibleError, match="export again without `dense=False`"):
        vp_engines.load(out, variant="dense")


@pytest.mark.slow
def test_openvino(inputs: Inputs, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    out = tmp_path / "ov.vpe"
    result = call(export.app, *argv(export_options(inputs, out, engine="openvino", precision="fp32", data=inputs.data)))
    assert result.exit_code == 0, result.output
    images = batch()
    with vp_engines.load(out) as engine, torch.no_grad():
        wanted = reduced_vit(inputs)(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(engine.run(images)["logits"], wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "functions"), [("ort", True), ("openvino", False)])
def test_kernels(engine: str, functions: bool, inputs: Inputs, tmp_path: Path) -> None:
    """The vp operators on an engine without our kernels: as ONNX functions, or in standard operators."""
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    out = tmp_path / "vp.vpe"
    result = call(export.app, *argv(export_options(inputs, out, engine=engine, precision="fp32", kernels="vp")))
    assert result.exit_code == 0, result.output
    assert "kernels: vp, in standard operators" in result.output
    assert read_manifest(out).kernels == "vp"
    if functions:
        assert {function.domain for function in onnx.load(out / "engine" / "model.onnx").functions} == {"vp"}
        assert not onnx.load(out / "dense" / "model.onnx").functions
    images = batch()
    with vp_engines.load(out) as engine_, torch.no_grad():
        wanted = reduced_vit(inputs)(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(engine_.run(images)["logits"], wanted, atol=1e-4)


@pytest.mark.slow
def test_installed_scripts(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "new.vpe"
    options = argv(export_options(inputs, out, data=inputs.data, json=True))
    done = subprocess.run([SCRIPTS / "vp-export", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == "new.vpe"
    assert "Warning" not in done.stderr
    done = subprocess.run([SCRIPTS / "vp-inspect", out], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([SCRIPTS / "vp-validate", out, *FAST, "--quiet"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_inspect_bundle(exported: Path) -> None:
    result = call(inspect.app, exported)
    assert result.exit_code == 0
    assert result.stderr == ""
    for text in ("bundle tiny", NAME, "ort", "dense, reduced", "every one verified", verify_bundle(exported).digest):
        assert text in result.stdout


@pytest.mark.slow
def test_inspect_bundle_as_json(exported: Path) -> None:
    found = json.loads(call(inspect.app, exported, "--json").stdout)
    assert found["digest"] == verify_bundle(exported).digest
    assert found["manifest"]["name"] == "tiny"


@pytest.mark.slow
def test_inspect_plan(inputs: Inputs) -> None:
    result = call(inspect.app, inputs.plan)
    assert result.exit_code == 0
    assert "static@0, static@1" in result.stdout
    assert "pass --model NAME" in result.stdout
    assert "ratio 1.486" in call(inspect.app, inputs.plan, *MODEL, "--num-classes", "3").stdout


@pytest.mark.slow
def test_inspect_method() -> None:
    """Preview of tokens and MACs of a method on a model, without a plan file."""
    words = ["--model", "deit_small_patch16_224", "--method", "ppt", "--preset", "ppt-deit-s"]
    result = call(inspect.app, *words)
    assert result.exit_code == 0
    for text in ("plan by method ppt", "ppt@3, ppt@6, ppt@9", "2.941 G of 4.599 G", "197 > 147", "97 > 49"):
        assert text in result.stdout
    found = json.loads(call(inspect.app, *words, "--json").stdout)
    assert found["tokens"][9] == [97, 49]
    assert found["plan"]["provenance"]["preset"] == "ppt-deit-s"
    assert ReductionPlan.from_dict(found["plan"]).fingerprint() == found["fingerprint"]


@pytest.mark.slow
def test_inspect_mask(inputs: Inputs) -> None:
    result = call(inspect.app, inputs.mask, *MODEL, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["tokens"] == [[13, 13], [9, 9]]
    assert found["plan"]["steps"] == plan_from_mask(mask(), PlanModel.of(describe(create(), NAME))).to_dict()["steps"]
    assert found["macs"]["dense"] > found["macs"]["reduced"]


@pytest.mark.slow
def test_validate_holds_a_budget(exported: Path, inputs: Inputs, tmp_path: Path) -> None:
    budget = ["--max-drop", "50", "--min-speedup", "0.01", "--min-agreement", "50"]
    words: list[str | Path] = [*FAST, "--data", inputs.data, *budget, "--report", tmp_path / "deep" / "report"]
    result = call(validate.app, exported, *words)
    assert result.exit_code == 0
    assert re.match("(passed: Within budget:|measured: Within budget, but a slow-down:) ", result.stdout)
    assert result.stdout.count("\n  ok ") == 4
    report = json.loads((tmp_path / "deep" / "report" / "report.json").read_text())
    assert report["verdict"]["status"] == result.stdout.split(":")[0]
    assert (tmp_path / "deep" / "report" / "report.html").read_text().startswith("<!")


@pytest.mark.slow
def test_validate_misses_a_budget(exported: Path) -> None:
    result = call(validate.app, exported, *FAST, "--min-speedup", "100", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdict"]["status"] == "failed"


@pytest.mark.slow
def test_validate_updates_the_bundle(bundle: Path, exported: Path) -> None:
    result = call(validate.app, bundle, *FAST, "--min-speedup", "100", "--update", "--json")
    assert result.exit_code == 1
    after = verify_bundle(bundle)
    assert after.digest != verify_bundle(exported).digest
    assert after.manifest.validation.status == "failed"
    assert json.loads((bundle / "report.json").read_text()) == json.loads(result.stdout)
    assert (bundle / "engine/model.onnx").read_bytes() == (exported / "engine/model.onnx").read_bytes()


@pytest.mark.slow
def test_validate_against_another_bundle(without_dense: Path, exported: Path, inputs: Inputs) -> None:
    words: list[str | Path] = [*FAST, "--data", inputs.data, "--against", exported, "--json"]
    result = call(validate.app, without_dense, *words)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["accuracy"]["agreement"]["value"] == 100
    assert any("The baseline is the bundle tiny.vpe" in note for note in report["notes"])
    # Two bundles of one mask have equal MACs, so no work is saved, whatever the timings.
    assert report["macs"]["ratio"] == 1
    assert report["macs"]["baseline"] == report["macs"]["reduced"] == read_manifest(exported).plan.macs_reduced
    for row in report["latency"]:
        assert row["mac_ratio"] == 1
        assert row["efficiency"] == pytest.approx(row["speedup"]["value"])
    assert "against tiny.vpe (baseline) on the same engine" in report["verdict"]["headline"]


@pytest.mark.slow
def test_against_names_the_other_bundle_on_the_terminal(exported: Path, inputs: Inputs, tmp_path: Path) -> None:
    other = tmp_path / "other.vpe"
    shutil.copytree(exported, other)
    words: list[str | Path] = ["--data", inputs.data, "--against", other, "--report", tmp_path / "report"]
    result = call(validate.app, exported, *FAST, *words)
    assert result.exit_code == 0, result.output
    said = " ".join((result.stdout + result.stderr).split())
    for text in (
        "against other.vpe on the same engine",
        "top-1 other.vpe",
        "KL to other.vpe",
        "comparing with other.vpe",
    ):
        assert text in said
    assert "dense" not in said.replace("not this bundle's own dense engine", "")
    assert str(tmp_path) not in said.replace(str(tmp_path / "report"), "")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "against other.vpe on the same engine" in page
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_against_is_refused_before_anything_runs(
    exported: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vp_engines, "load", lambda *args, **options: pytest.fail("loaded"))
    other = tmp_path / "other.vpe"
    shutil.copytree(exported, other)
    rewrite_manifest(other, lambda document: document["preprocessing"].update(mean=[0.485, 0.456, 0.406]))
    result = call(validate.app, exported, *FAST, "--data", inputs.data, "--against", other)
    check_error(
        result, 2, r"other\.vpe prepares its images with mean 0\.485, 0\.456, 0\.406; expected 0\.5, .*as tiny\.vpe"
    )
    result = call(validate.app, exported, *FAST, "--against", exported, "--update")
    check_error(result, 2, r"--update is given with --against; expected one of them.*--report DIR")
    check_error(call(validate.app, exported, *FAST, "--against", tmp_path / "none.vpe"), 2, r"none\.vpe")


PREPARED = "preprocessing: resize shorter side 71 (bicubic), crop 64x64, center, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5"


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_preprocessing_is_shown_by_every_command(exported: Path, inputs: Inputs, tmp_path: Path) -> None:
    for options in ({"no_validate": True}, {}):
        result = call(export.app, *argv(export_options(inputs, tmp_path / f"{len(options)}.vpe", **options)))
        assert PREPARED in result.stdout, result.output
    assert PREPARED in call(validate.app, exported, *FAST).stdout
    assert PREPARED.removeprefix("preprocessing: ") in " ".join(call(inspect.app, exported).stdout.split())
    assert json.loads((exported / "report.json").read_text())["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert '<th scope="row">mean</th><td>0.5, 0.5, 0.5</td>' in (exported / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
@pytest.mark.parametrize("stated", [False, True])
def test_own_weights_with_statistics_that_are_not_theirs(stated: bool, inputs: Inputs, tmp_path: Path) -> None:
    """The folders' names are reversed, so that top-1 is poor on any engine."""
    data, out = tmp_path / "images", tmp_path / "new.vpe"
    for old, new in zip("abc", "bca", strict=True):
        shutil.copytree(inputs.data / old, data / new)
    options = {"mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5"} if stated else {}
    result = call(export.app, *argv(export_options(inputs, out, data=data, **options)))
    assert result.exit_code == 0
    report = json.loads((out / "report.json").read_text())
    reports = ("\n".join(report["warnings"]), html.unescape((out / "report.html").read_text()))
    for said, names in ((result.stderr, "--mean and --std"), *((text, "`mean` and `std`") for text in reports)):
        assert "the dense model's top-1 is 0.00%, about chance" in said
        assert (f"(weights.safetensors) were trained with others, export with {names}" in said) != stated
