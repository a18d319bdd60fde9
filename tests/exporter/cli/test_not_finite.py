"""Weights that overflow fp16: an engine that returns NaN is never accepted, with or without images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.exporter.cli.samples import FAST, Inputs, argv, call, export_options
from vp_engines.bundle import verify_bundle
from vp_exporter.cli import export, profile, validate

LARGEST = 65504  # of fp16


@pytest.fixture(scope="module")
def overflowing(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples' weights, with one channel that overflows fp16 but not fp32."""
    state = load_file(inputs.weights)
    state["blocks.0.mlp.fc1.weight"][3] = 10.0 * LARGEST
    out = tmp_path_factory.mktemp("overflowing") / "weights.safetensors"
    save_file(state, out)
    assert all(torch.isfinite(value).all() for value in state.values())
    return out


@pytest.fixture(scope="module", params=["ort", pytest.param("openvino", marks=pytest.mark.exhaustive)])
def broken(
    request: pytest.FixtureRequest, overflowing: Path, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A bundle exported in fp16 without images, and the command's output."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("broken") / "broken.vpe"
    changes = {"weights": overflowing, "engine": request.param, "precision": "fp16", "batch": [1, 3]}
    return out, call(export.app, *argv(export_options(inputs, out, **changes)))


@pytest.mark.slow
def test_export_fails_and_says_so(broken: tuple[Path, Any]) -> None:
    out, result = broken
    assert result.exit_code == 1, result.output
    said = "from the reduced engine on 4 of 4 timed images, dense too (4 of 4 timed images)"
    assert result.stdout.startswith(f"failed: Failed on NaN or infinite outputs: {said}.")
    assert "faster" not in result.stdout
    manifest = verify_bundle(out).manifest  # written, as with every missed budget
    assert manifest.validation.status == "failed"
    assert said in manifest.validation.summary
    report = json.loads((out / "report.json").read_text())
    assert (report["verdict"]["status"], report["verdict"]["checks"][0]["passed"]) == ("failed", False)
    for row in report["latency"]:
        assert (row["nonfinite_dense"], row["nonfinite_reduced"]) == (row["batch"], row["batch"])
        assert (row["claim"], row["outcome"], row["efficiency"]) == (False, "not finite", None)
    page = (out / "report.html").read_text()
    assert said in page
    assert "faster" not in page


@pytest.mark.slow
@pytest.mark.parametrize("with_images", [False, True], ids=["timed", "images"])
def test_validate_and_profile_fail_too(broken: tuple[Path, Any], with_images: bool, inputs: Inputs) -> None:
    out, _ = broken
    words = ["--data", str(inputs.data), "--max-drop", "100"] if with_images else []
    result = call(validate.app, out, *FAST, *words)
    assert result.exit_code == 1, result.output
    assert "dense too" in result.stdout
    assert "faster" not in result.stdout
    if not with_images:
        result = call(profile.app, out, "--batch", "1", "--seconds", "0.1", "--no-memory")
        assert result.exit_code == 1, result.output
        assert "NaN or infinite outputs: dense on 1 of 1 images, reduced on 1 of 1 images (both" in result.stderr
        assert "as fast" not in result.stdout


@pytest.mark.slow
def test_a_bundle_without_a_baseline_is_run_all_the_same(overflowing: Path, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "alone.vpe"
    given = export_options(inputs, out, weights=overflowing, precision="fp16", no_dense=True)
    result = call(export.app, *argv(given))
    assert result.exit_code == 1, result.output
    assert "from the reduced engine on 2 of 2 timed images." in result.stdout
    assert call(validate.app, out, *FAST).exit_code == 1
