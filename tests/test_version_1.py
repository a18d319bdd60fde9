"""Plans and bundles of format version 1, written by vp-export 0.1.0 in November 2026, still load.

tests/data/version_1 has a bundle under ToMe's plan with its dense baseline, a searched plan and its bundle, two images,
and the logits that ONNX Runtime returned for them. The model is a ViT of 2 blocks and 16 channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vp_engines
from vp_exporter.plan import ReductionPlan

DATA = Path(__file__).parent / "data" / "version_1"
FINGERPRINTS = {
    "tome.vpe/plan.json": "44a783a6aeb535eafb4f9acaaf028f95161e0b725f583d749d353dd117d63df2",
    "searched.vpe/plan.json": "032be38f21f0976f968f18f5f6fef190a6efc565b829073b7922b27a6b493925",
    "searched.json": "032be38f21f0976f968f18f5f6fef190a6efc565b829073b7922b27a6b493925",
}
# File and variant -> the original logits.
ENGINES = {("tome", "reduced"): "tome", ("tome", "dense"): "dense", ("searched", "reduced"): "searched"}


@pytest.mark.parametrize("name", list(FINGERPRINTS))
def test_a_plan_reads_as_the_same_plan(name: str) -> None:
    text = (DATA / name).read_text()
    plan = ReductionPlan.loads(text)
    assert plan.fingerprint() == FINGERPRINTS[name]
    assert plan.dumps() == text


def test_what_the_plans_say() -> None:
    tome, searched = (ReductionPlan.load(DATA / name) for name in ("tome.vpe/plan.json", "searched.json"))
    assert [(row.attention, row.mlp) for row in tome.tokens()] == [(17, 14), (14, 11)]
    assert [(row.attention, row.mlp) for row in searched.tokens()] == [(13, 13), (13, 2)]
    assert set(searched.key_bias) == {0, 1}


@pytest.mark.parametrize(("name", "variant"), list(ENGINES))
def test_a_bundle_gives_the_same_logits(name: str, variant: str) -> None:
    bundle = DATA / f"{name}.vpe"
    manifest = vp_engines.verify_bundle(bundle).manifest
    assert manifest.plan is not None
    assert manifest.plan.fingerprint == FINGERPRINTS[f"{name}.vpe/plan.json"]
    images = np.load(DATA / "images.npy").astype(np.float32) / 127.5 - 1
    wanted = np.load(DATA / f"{ENGINES[name, variant]}.logits.npy")
    with vp_engines.load(bundle, variant=variant, threads=1) as engine:
        np.testing.assert_allclose(engine.run(images)["logits"], wanted, rtol=1e-4, atol=1e-4)
    assert np.ptp(wanted, axis=0).max() > 0.01  # logits depend on the image
