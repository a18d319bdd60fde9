"""Export through the Python interface: errors before the long work, and results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vp_engines
from tests.exporter.tiny import random_plan, tiny_vit
from vp_engines.bundle import verify_bundle
from vp_engines.errors import BuildError, BundleError, VpError
from vp_exporter import exporting
from vp_exporter.errors import PlanError
from vp_exporter.exporting import ExportRequest, export_bundle
from vp_exporter.model.loading import LoadedModel
from vp_exporter.model.preprocessing import preprocessing_of
from vp_exporter.model.weights import fingerprint
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.utils.progress import SILENT, SilentProgress
from vp_exporter.validation.check import CheckRequest


class Notes(SilentProgress):
    """Records warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    vit, description = tiny_vit()
    return LoadedModel(vit, description, fingerprint(vit), "made up")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> ReductionPlan:
    return random_plan(PlanModel.of(model.description), scales=True)


def run(model: LoadedModel, plan: ReductionPlan, request: ExportRequest, progress: SilentProgress = SILENT) -> None:
    preprocessing = preprocessing_of(model.vit, model.description)
    export_bundle(model, plan, preprocessing, request, progress)


@pytest.mark.slow
def test_bundle_holds_what_was_exported(model: LoadedModel, plan: ReductionPlan, tmp_path: Path) -> None:
    out = tmp_path / "tiny.vpe"
    request = ExportRequest(out, check=CheckRequest(seconds=0.1, batches=(1,)), classes=[f"c{i}" for i in range(7)])
    result = export_bundle(model, plan, preprocessing_of(model.vit, model.description), request)
    manifest = verify_bundle(out).manifest
    assert manifest == result.manifest
    assert repr(result) == f"<ExportResult {str(out)!r}, ort fp32, unvalidated>"
    assert manifest.classes is not None
    assert list(manifest.classes) == request.classes
    assert manifest.model.weights_sha256 == model.weights_sha256
    assert manifest.plan.macs_reduced == count_macs(model.description, plan).total
    assert manifest.plan.macs_dense == count_macs(model.description).total
    assert ReductionPlan.load(out / manifest.plan.path) == plan
    assert result.report is not None
    assert result.report.verdict.status == "unvalidated"
    assert json.loads((out / "report.json").read_text())["accuracy"] is None
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    for variant, steps in (("reduced", plan), ("dense", None)):
        with vp_engines.load(out, variant=variant) as engine, torch.no_grad():
            wanted = ReducedViT(model.vit, model.description, steps)(torch.from_numpy(images)).numpy()
            np.testing.assert_allclose(engine.run(images)["logits"], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"classes": ["cat"]}, VpError, "1 class names are given; expected 7"),
        ({"precision": "bf16"}, BuildError, "'ort' has no bf16"),
        ({"engine": "tflite"}, VpError, "unknown engine 'tflite'"),
        ({"check": CheckRequest(data=Path("nowhere"))}, VpError, "no folder nowhere"),
    ],
    ids=["classes", "precision", "engine", "data"],
)
def test_refused_before_anything_is_built(
    change: dict, error: type[VpError], message: str, model: LoadedModel, plan: ReductionPlan,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(exporting, "_lower", lambda *args: pytest.fail("built"))
    with pytest.raises(error, match=message):
        run(model, plan, replace(ExportRequest(tmp_path / "tiny.vpe"), **change))
    assert list(tmp_path.iterdir()) == []


def test_target_is_checked_first(model: LoadedModel, plan: ReductionPlan, tmp_path: Path) -> None:
    (tmp_path / "tiny.vpe").mkdir()
    with pytest.raises(BundleError, match="already there"):
        run(model, plan, ExportRequest(tmp_path / "tiny.vpe", engine="tflite"))


def test_plan_for_other_weights(model: LoadedModel, plan: ReductionPlan, tmp_path: Path) -> None:
    other = replace(plan, model=replace(plan.model, weights_sha256="0" * 64))
    with pytest.raises(PlanError, match="searched on weights 000000000000"):
        run(model, other, ExportRequest(tmp_path / "tiny.vpe"))


def test_failed_build_leaves_nothing(
    model: LoadedModel, plan: ReductionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise BuildError("the engine refuses")

    monkeypatch.setattr(exporting, "_lower", refuse)
    with pytest.raises(BuildError, match="the engine refuses"):
        run(model, plan, ExportRequest(tmp_path / "tiny.vpe"))
    assert list(tmp_path.iterdir()) == []


def test_plan_that_removes_nothing_is_pointed_out(
    model: LoadedModel, plan: ReductionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise BuildError("the engine refuses")

    monkeypatch.setattr(exporting, "_lower", refuse)
    notes = Notes()
    with pytest.raises(BuildError):
        run(model, ReductionPlan(plan.model), ExportRequest(tmp_path / "tiny.vpe", check=None), notes)
    assert notes.warnings == ["the plan removes no token: the reduced engine will be the dense one"]
