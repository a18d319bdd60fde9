"""A quick end-to-end test on a tiny model.

`make test-lowest` and `make test-newest` run it in environments of their own; it is also part of the suite.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vp_engines
from tests.engines.backends.tiny_vit import contents
from tests.exporter.cli.samples import NAME, Inputs, argv, call, export_options, model_args, write_inputs
from tests.exporter.reducers.test_export import EVERY_REDUCER, Model, images_of, make
from vp_engines.backends import get_backend
from vp_engines.backends.base import BuildOptions, RunOptions
from vp_exporter.cli import export, inspect, search, serve, validate
from vp_exporter.exporting import _lower
from vp_exporter.plan import ReductionPlan

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def bundle(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tiny.vpe"
    result = call(export.app, *argv(export_options(inputs, out, data=inputs.data, max_drop=50)))
    assert result.exit_code == 0, result.output
    return out


def test_inspect_and_validate(bundle: Path, inputs: Inputs) -> None:
    shown = call(inspect.app, bundle)
    assert shown.exit_code == 0, shown.output
    assert "onnxruntime >= " in shown.output
    again = call(validate.app, bundle, "--data", inputs.data, "--max-drop", "50", "--seconds", "0.1", "--batch", "2")
    assert again.exit_code == 0, again.output


def test_images_in_class_names_out(bundle: Path, inputs: Inputs) -> None:
    with vp_engines.load(bundle) as engine:
        files = sorted(inputs.data.glob("*/*.png"))
        logits = engine.run(engine.preprocess(files))["logits"]
    found = logits.argmax(axis=1)
    assert (found == np.repeat(range(3), 8)).mean() > 0.8


def test_served_by_triton(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2")
    result = call(serve.app, "triton", bundle, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tiny" / "1" / "model.onnx").is_file()


def test_a_plan_is_searched(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    given = {
        "--model": NAME, "--model-arg": model_args(), "--weights": inputs.weights, "--data": inputs.data, "--out": out,
        "--target-macs": 0.7, "--search-batch": 4, "--evaluations": 4, "--tune-steps": 2, "--page": tmp_path / "page",
    }  # fmt: skip
    result = call(search.app, *argv(given))
    assert result.exit_code == 0, result.output
    assert ReductionPlan.load(out).reduces
    assert json.loads((tmp_path / "page" / "search.json").read_text())


@pytest.fixture(scope="module")
def every() -> Model:
    """A different reducer in every block."""
    return make(EVERY_REDUCER, num_heads=2)  # of 32 channels, the minimum for the vp operators


@pytest.mark.parametrize(("engine", "kernels"), [("ort", "portable"), ("ort", "vp"), ("openvino", "portable")])
def test_every_reducer(every: Model, engine: str, kernels: str, tmp_path: Path) -> None:
    backend = get_backend(engine)
    if not backend.available("build").ok:
        pytest.skip(backend.available("build").reason)
    source = _lower(backend, every.reduced, "fp32", tmp_path / "model.onnx", kernels)  # type: ignore[arg-type]
    out = tmp_path / "engine"
    out.mkdir()
    result = backend.build(source, out, BuildOptions())
    files = contents(result, out)
    images = images_of(3)
    with torch.no_grad():
        wanted = every.reduced(images).numpy()
    opened = backend.open(
        result.artefact, files, source.inputs, source.outputs, result.requirements, RunOptions(threads=1)
    )
    with opened as runner:
        found = runner.run(images.numpy())["logits"]
    # One image with a near-tie may differ; test_export asks the oracle which.
    assert np.sort(np.abs(found - wanted).max(axis=1))[-2] < 1e-4


def test_aoti(inputs: Inputs, tmp_path: Path) -> None:
    ready = get_backend("aoti").available("build")
    if not ready.ok:
        pytest.skip(ready.reason)
    result = call(
        export.app, *argv(export_options(inputs, tmp_path / "m.vpe", engine="aoti", dense=None) | {"--no-dense": True})
    )
    assert result.exit_code == 0, result.output
