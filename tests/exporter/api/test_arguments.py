"""The public functions: what they accept, what they refuse, and what a bundle says of a module in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from safetensors.torch import save_file

import vp_exporter as vp
from tests.exporter.api.test_own_modules import Renamed, derived
from tests.exporter.cli.samples import ARGS, NAME, create, mask
from vp_engines.backends.base import BuildResult
from vp_engines.backends.ort import OnnxRuntimeBackend
from vp_engines.manifest import Manifest
from vp_exporter.api.search import search_all

STATED = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0, "interpolation": "bilinear"}


@pytest.fixture
def bundle_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """`vp.export` up to the engine, whose place an empty file takes."""
    monkeypatch.setattr("vp_exporter.exporting._lower", lambda *args: None)

    def build(self: OnnxRuntimeBackend, source: Any, folder: Path, options: Any) -> BuildResult:
        (folder / "model.onnx").write_bytes(b"")
        return BuildResult("model.onnx", ("model.onnx",))

    monkeypatch.setattr(OnnxRuntimeBackend, "build", build)

    def export(model: Any, plan: Any = None, **options: Any) -> Manifest:
        done = vp.export(model, mask() if plan is None else plan, tmp_path / "a.vpe", **{"validate": False, **options})
        assert done.path == tmp_path / "a.vpe"
        assert done.report is None
        assert vp.load.__module__ == "vp_engines.engine"
        return done.manifest

    return export


def test_what_a_bundle_says_of_a_module(bundle_of: Callable[..., Manifest]) -> None:
    vit = create()
    found = bundle_of(vit)
    assert (found.model.name, found.model.weights_source) == (NAME, "in memory")
    assert found.preprocessing.mean == tuple(vit.pretrained_cfg["mean"])
    assert found.classes is None


def test_a_module_that_timm_did_not_create_states_its_preprocessing(bundle_of: Callable[..., Manifest]) -> None:
    with pytest.raises(
        vp.VpError, match=r"Renamed has no `pretrained_cfg`, .*; expected `preprocessing` with mean and std"
    ):
        bundle_of(derived(Renamed))
    found = bundle_of(derived(Renamed), preprocessing=STATED, classes=["a", "b", "c"])
    assert (found.model.name, found.model.weights_source) == ("Renamed", "in memory (Renamed)")
    assert (found.preprocessing.mean, found.preprocessing.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.preprocessing.resize, found.preprocessing.interpolation) == (64, "bilinear")
    assert found.classes == ("a", "b", "c")


def test_timms_own_data_configuration_is_accepted(bundle_of: Callable[..., Manifest]) -> None:
    vit = create()
    config = {**timm.data.resolve_model_data_config(vit), "input_size": (3, 64, 64)}
    assert bundle_of(vit, preprocessing=config).preprocessing == bundle_of(vit, force=True).preprocessing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"men": 0.5}, "`preprocessing` holds 'men'; expected only crop_pct, interpolation, mean, std"),
        ({"input_size": (3, 224, 224)}, r"is for images of \[3, 224, 224\]; expected \[3, 64, 64\]"),
        ({"crop_mode": "around"}, "`crop_mode` is 'around'; expected one of center"),
        ([0.5], "`preprocessing` is a list; expected a dict"),
    ],
)
def test_preprocessing_that_makes_no_sense(given: Any, message: str, bundle_of: Callable[..., Manifest]) -> None:
    with pytest.raises(vp.VpError, match=message):
        bundle_of(create(), preprocessing=given)


def test_what_may_stand_for_a_plan(bundle_of: Callable[..., Manifest], tmp_path: Path) -> None:
    plan = vp.build_plan("grid", create(), keep_rate=0.5)
    plan.save(str(tmp_path / "plan.json"))
    np.save(tmp_path / "mask.npy", mask())
    assert bundle_of(create(), str(tmp_path / "plan.json")).plan.fingerprint == plan.fingerprint()
    masked = {bundle_of(create(), each, force=True).plan.fingerprint
              for each in (mask(), tmp_path / "mask.npy", torch.from_numpy(mask()))}  # fmt: skip
    assert len(masked) == 1


def test_what_may_stand_for_a_model(tmp_path: Path) -> None:
    save_file(create().state_dict(), tmp_path / "weights.safetensors")
    args = {key: value for key, value in ARGS.items() if key != "img_size"}
    request = vp.ModelRequest(NAME, args, weights=str(tmp_path / "weights.safetensors"), img_size=64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(vp.reduce(request, mask())(images), vp.reduce(create(), mask())(images))
    plans = [vp.build_plan("tome", model, r=2) for model in (create(), request)]
    assert [plan.tokens() for plan in plans] == [plans[0].tokens()] * 2
    assert vp.build_plan("tome", "deit_small_patch16_224", r=13).model.name == "deit_small_patch16_224"


def test_reduce_shares_the_parameters() -> None:
    vit = create()
    reduced = vp.reduce(vit, vp.build_plan("tome", vit, r=2))
    assert {id(each) for each in reduced.parameters()} == {id(each) for each in vit.parameters()}
    reduced(torch.randn(1, 3, 64, 64)).sum().backward()
    assert vit.head.weight.grad is not None


def export(**options: Any) -> Callable[[], Any]:
    return lambda: vp.export(options.pop("model", create()), mask(), "no.vpe", **options)


REFUSED = {
    "device": (export(device="tpu"), "`device` is 'tpu'; expected cpu or cuda"),
    "precision": (export(precision="fp8"), "`precision` is 'fp8'; expected fp32, fp16 or bf16"),
    "kernels": (export(kernels="fast"), "`kernels` is 'fast'; expected portable, vp or auto"),
    "batches": (export(min_batch=9), "`min_batch` 9, `opt_batch` 8, `max_batch` 64; expected ascending sizes"),
    "engine": (export(engine="tflite"), "unknown engine 'tflite'"),
    "budget": (export(max_drop=0.5), "`max_drop` and `min_agreement` need images; expected `data=DIR`"),
    "range": (export(max_drop=-1, data="val"), "`max_drop` is -1"),
    "validate": (export(validate=False, data="val"), "`validate=False` is given with `data` or a budget"),
    "dense": (export(dense=False, min_speedup=1.1), "`dense=False` leaves nothing to compare with"),
    "batch-sizes": (export(batch_sizes=[0]), "`batch_sizes=0`; expected whole numbers from 1"),
    "seconds": (export(seconds=0), "`seconds` is 0; expected above 0"),
    "batch-size": (export(batch_sizes="8"), "`batch_sizes` is '8'; expected whole numbers"),
    "data": (export(data=["val"]), "`data` is a list; expected a path"),
    "out": (lambda: vp.export(create(), mask(), None), "`out` is a NoneType; expected a path"),  # type: ignore[arg-type]
    "images": (lambda: vp.search(create(), ["a.jpg"], target_macs=0.7), "`images` is a list; expected a path"),  # type: ignore[arg-type]
    "threads": (export(threads=0), "`threads` is 0"),
    "no-weights": (export(model=vp.ModelRequest(NAME, ARGS)), "one of `weights=FILE`, `pretrained=True`"),
    "image-size": (export(model=vp.ModelRequest(NAME, random_init=True, img_size=(64, 0))), r"`img_size` is \(64, 0\)"),
    "plan": (lambda: vp.export(create(), 7, "no.vpe"), "`plan` is a int; expected a ReductionPlan, the path"),
    "method": (lambda: vp.build_plan("tom", create(), r=2), "unknown method 'tom'; expected one of tome"),
    "amount": (lambda: vp.build_plan("tome", create()), "exactly one of `r`, `target_macs`, `preset`"),
    "strange": (lambda: vp.build_plan("tome", create(), r=2, fuse=True), "does not take method argument `fuse`"),
    "no-budget": (lambda: vp.search(create(), "calib"), "expected one of `target_macs=SHARE` and `target_latency"),
    "search-device": (lambda: vp.search(create(), "calib", target_macs=0.7, device="tpu"), "`device` is 'tpu'"),
    "no-images": (lambda: vp.search(create(), "nowhere", target_macs=0.7), "no folder nowhere"),
    "no-bundle": (lambda: vp.validate("no.vpe"), "no.vpe"),
    "validate-device": (lambda: vp.validate("no.vpe", device="tpu"), "`device` is 'tpu'"),  # type: ignore[arg-type]
    "alone": (lambda: vp.profile("no.vpe", alone=True, against="b.vpe"), "`alone` and `against` are both given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_the_words_of_python(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(vp.VpError, match=message) as caught:
        call()
    assert "--" not in f"{caught.value} {caplog.text}"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_several_searches(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sed"):
        search_all(create(), tmp_path, [0.7], [None], sed=1)


@pytest.mark.parametrize("before", [None, "another.so"])
def test_plugins_are_for_one_export(
    before: str | None, bundle_of: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr("vp_exporter.exporting._lower", lambda *args: seen.append(os.environ.get("VP_PLUGINS")))
    monkeypatch.delenv("VP_PLUGINS", raising=False)
    if before is not None:
        monkeypatch.setenv("VP_PLUGINS", before)
    bundle_of(create(), plugins="libvp.so")
    assert seen == [os.path.abspath("libvp.so")] * 2
    assert os.environ.get("VP_PLUGINS") == before


def test_progress_goes_to_the_logger(bundle_of: Callable[..., Manifest], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vp_exporter")
    bundle_of(create(), np.ones((2, 16)))
    levels = {record.levelname: record.message for record in caplog.records}
    assert levels["WARNING"] == "the plan removes no token: the reduced engine will be the dense one"
    assert any(record.message.startswith("checking VisionTransformer") for record in caplog.records)


def test_a_wrong_engine_is_named_before_what_is_at_out(tmp_path: Path) -> None:
    (tmp_path / "a.vpe").mkdir()
    with pytest.raises(vp.VpError, match="'ortt'"):
        vp.export(create(), mask(), tmp_path / "a.vpe", engine="ortt")
