"""vp-profile on a real bundle: parts that add up, files readable by other tools, and one-line errors."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import vp_engines
from tests.exporter.cli.samples import ARGS, Inputs, argv, call, export_options
from tests.exporter.validation.samples import LARGE, make_bundle
from vp_engines.bundle import read_manifest
from vp_engines.errors import VpError
from vp_exporter.cli import export
from vp_exporter.cli.profile import app
from vp_exporter.profiling.groups import ATTENTION, EMBEDDING, GROUPS, HEAD, MLP, NORM, REDUCTION, RUNTIME

DEPTH = ARGS["depth"]
QUICK = ("--seconds", "0.1", "--threads", "1")


@pytest.fixture(scope="module")
def merging(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a reducer that takes time: tome merges four tokens in each block."""
    out = tmp_path_factory.mktemp("merging") / "merging.vpe"
    given = export_options(inputs, out, masks=None, method="tome", r="4", seconds=0.1)
    result = call(export.app, *argv(given))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def measured(merging: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """profile.json of the merging bundle at two batch sizes, and the folder with its files."""
    out = tmp_path_factory.mktemp("profile") / "new" / "folder"
    result = call(app, merging, "--batch", "1", "3", *QUICK, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "profile.json").read_text())
    return found, out


@pytest.mark.slow
def test_every_operation_has_its_part(measured: tuple[dict[str, Any], Path], merging: Path) -> None:
    found, _ = measured
    assert [(each["label"], each["batch"]) for each in found["profiles"]] == [
        ("dense", 1), ("reduced", 1), ("dense", 3), ("reduced", 3),
    ]  # fmt: skip
    for each in found["profiles"]:
        assert each["rounds"] >= 20
        assert set(each["groups"]) == set(GROUPS)
        assert all(value >= 0 for value in each["groups"].values())
        timing = each["timing"]
        assert 0 < timing["median_ms"] <= timing["p90_ms"] <= timing["p99_ms"]
        assert timing["images_per_second"] == pytest.approx(1000 * each["batch"] / timing["median_ms"])
        assert each["covered"] == pytest.approx(sum(each["groups"].values()) / timing["median_ms"])
        for group in (EMBEDDING, ATTENTION, MLP, NORM, HEAD, RUNTIME):
            assert each["groups"][group] > 0
        kinds = Counter((operation["group"], operation["kind"]) for operation in each["operations"])
        assert kinds[ATTENTION, "MultiHeadAttention"] == DEPTH
        assert kinds[NORM, "LayerNormalization"] == 2 * DEPTH + 1
        assert kinds[MLP, "MatMul"] == 2 * DEPTH
        assert kinds[ATTENTION, "MatMul"] == 2 * DEPTH
        blocks = {operation["block"] for operation in each["operations"] if operation["group"] == ATTENTION}
        assert blocks == set(range(DEPTH))
        reducing = {name for group, name in kinds if group == REDUCTION}
        assert ("TopK" in reducing) == (each["label"] == "reduced")
        assert (each["groups"][REDUCTION] > 0) == (each["label"] == "reduced")
    # No node that is named as reducing is counted elsewhere.
    named = {
        node.name for node in onnx.load(str(merging / "engine" / "model.onnx")).graph.node if ".reduce/" in node.name
    }
    for operation in found["profiles"][1]["operations"]:
        assert operation["name"] not in named or operation["group"] == REDUCTION


@pytest.mark.slow
def test_memory_is_of_a_process_that_does_nothing_else(measured: tuple[dict[str, Any], Path]) -> None:
    memory = measured[0]["memory"]
    assert set(memory) == {"dense", "reduced"}
    for each in memory.values():
        assert each["loaded"] > 0
        assert each["loaded"] < each["peak"]["1"] <= each["peak"]["3"] < 4000
        assert each["gpu"] is None or each["gpu"] >= 0


@pytest.mark.slow
def test_the_trace_is_chromes(measured: tuple[dict[str, Any], Path]) -> None:
    found, out = measured
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["dense", "reduced"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == sum(len(each["operations"]) for each in found["profiles"])
    for event in spans:
        assert event["cat"] in GROUPS
        assert event["ts"] >= 0
        assert event["dur"] >= 0
    one = [event["ts"] for event in spans if (event["pid"], event["tid"]) == (1, 3)]
    assert one == sorted(one)


@pytest.mark.slow
def test_the_picture_has_a_bar_of_every_part(measured: tuple[dict[str, Any], Path]) -> None:
    from vp_exporter.profiling.picture import COLOURS

    picture = np.asarray(Image.open(io.BytesIO((measured[1] / "profile.png").read_bytes())).convert("RGB")).astype(int)
    for group in (ATTENTION, MLP, REDUCTION):
        colour = [int(COLOURS[group][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - colour).max(axis=2) <= 2).sum() > 100, group


@pytest.mark.slow
def test_the_table(merging: Path, exported: Path) -> None:
    result = call(app, merging, "--against", exported, "--batch", "2", *QUICK, "--top", "2", "--no-memory")
    assert result.exit_code == 0, result.output
    text = result.stdout
    for word in ("batch 2, milliseconds", "saved", "token reduction", "p99", "parts' sum / p50", "images/s", "as fast"):
        assert word in text
    labels = [read_manifest(path).name for path in (exported, merging)]
    assert all(label in text for label in labels)
    assert "peak memory" not in text
    assert len([line for line in text.splitlines() if "MatMul" in line or "Attention" in line]) >= 2


@pytest.mark.slow
def test_alone(without_dense: Path) -> None:
    result = call(app, without_dense, "--alone", "--batch", "1", *QUICK, "--no-memory", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [each["label"] for each in found["profiles"]] == ["reduced"]
    assert found["speedups"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "tpu"), "error: --device is 'tpu'; expected cpu or cuda"),
        (("4",), "error: found 4 behind the bundle's name; expected --batch 4"),
        (("--alone", "--against", "x"), "error: --alone and --against are both given; expected one of them"),
        (("--against", "nothing.vpe"), "nothing.vpe"),
        (("--out", "{file}"), "is a file; expected a folder"),
    ],
)
def test_bad_requests(words: tuple[str, ...], message: str, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call(app, exported, *(word.format(file=tmp_path / "file") for word in words))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_no_baseline_and_damage(without_dense: Path, bundle: Path) -> None:
    result = call(app, without_dense)
    assert result.exit_code == 2
    assert "the bundle holds no dense baseline to compare with; say --alone, or name another bundle" in result.stderr
    (bundle / "engine" / "model.onnx").write_bytes(b"altered")
    result = call(app, bundle, *QUICK)
    assert result.exit_code == 2
    assert "model.onnx" in result.stderr
    shutil.rmtree(bundle)
    assert call(app, bundle).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (LARGE, r"b\.vpe takes images of 3x64x64; expected 3x32x32, as a"),
        ({"engine": {"device": "cuda"}}, r"b\.vpe runs on cuda; expected cpu, as a"),
        ({"batch": {"min": 4, "opt": 4, "max": 8}}, r"`batch_sizes=1` with .*b\.vpe; expected 4 to 8"),
    ],
)
def test_bundles_that_cannot_run_side_by_side(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vp_exporter.profiling import measure

    monkeypatch.setattr(vp_engines, "load", lambda *args, **options: pytest.fail("loaded"))
    paths = make_bundle(tmp_path / "x", name="a.vpe"), make_bundle(tmp_path / "y", name="b.vpe", **change)
    subjects = [measure.Subject(path.name, path, "reduced") for path in paths]
    with pytest.raises(VpError, match=message) as caught:
        measure.profile(subjects)
    assert caught.value.exit_code == 2
