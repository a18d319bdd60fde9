"""Other tools can process our files: quantizers, shape inference, rewriters, viewers; and their output runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest

from tests.exporter.lowering.test_onnx import expected, images_for, reduced_vit, run
from tests.exporter.reducers.test_export import images_of, make
from vp_exporter.lowering import lower_onnx

quantization = pytest.importorskip("onnxruntime.quantization", reason="it needs onnx and what onnxruntime brings")


class Lowered(NamedTuple):
    path: Path
    images: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A static plan with a tuned mask."""
    model = reduced_vit(scales=True)
    path = lower_onnx(model.for_export("fp32", "packed"), tmp_path_factory.mktemp("static") / "model.onnx")
    images = images_for(model, 4)
    return Lowered(path, images.numpy(), expected(model, images))


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A model that chooses tokens at run time, and tracks sizes."""
    model = make([("tome", {"r": 8}), ("evit", {"tokens_out": 40, "fuse": True})]).reduced
    path = lower_onnx(model.for_export("fp32", "packed"), tmp_path_factory.mktemp("merging") / "model.onnx")
    return Lowered(path, images_of(4).numpy(), expected(model, images_of(4)))


@pytest.fixture(params=["static", "merging"])
def lowered(request: pytest.FixtureRequest) -> Lowered:
    found: Lowered = request.getfixturevalue(request.param)
    return found


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: np.ndarray) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter([{"images": images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def close(path: Path, lowered: Lowered, within: float) -> None:
    """Check a file's logits against torch's; `within` is a share of their spread. A near-tie may flip in one image."""
    import torch

    errors = np.abs(run(path, torch.from_numpy(lowered.images)) - lowered.logits).max(axis=1)
    assert np.sort(errors)[-2] <= within * lowered.logits.std(), errors


@pytest.mark.slow
def test_no_weight_is_described_twice(lowered: Lowered) -> None:
    """A quantizer replaces a weight under the same name, which would make a shape stated elsewhere wrong."""
    graph = onnx.load(str(lowered.path)).graph
    described = {value.name for value in graph.value_info}
    assert described, "values between nodes keep their shapes"
    assert not described & {tensor.name for tensor in graph.initializer}
    assert described <= {name for node in graph.node for name in node.output}


@pytest.mark.slow
def test_quantized_dynamically(lowered: Lowered, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantization.quantize_dynamic(str(lowered.path), str(out), weight_type=quantization.QuantType.QInt8)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(str(out)).graph.node}
    assert out.stat().st_size < 0.5 * lowered.path.stat().st_size
    close(out, lowered, 0.3)


@pytest.mark.slow
def test_quantized_statically(lowered: Lowered, tmp_path: Path) -> None:
    out = tmp_path / "qdq.onnx"
    quantization.quantize_static(
        str(lowered.path), str(out), Calibration(lowered.images), quant_format=quantization.QuantFormat.QDQ
    )
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(str(out)).graph.node}
    close(out, lowered, 0.5)


@pytest.mark.slow
def test_prepared_for_quantization(lowered: Lowered, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """ONNX Runtime's symbolic inference does not support batch_dims of GatherND, used for chosen tokens."""
    shape_inference = pytest.importorskip("onnxruntime.quantization.shape_inference")
    out, dynamic = tmp_path / "prepared.onnx", "merging" in request.node.name
    shape_inference.quant_pre_process(str(lowered.path), str(out), skip_symbolic_shape=dynamic)
    close(out, lowered, 1e-3)


@pytest.mark.slow
def test_strict_shape_inference(lowered: Lowered) -> None:
    onnx.checker.check_model(str(lowered.path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(str(lowered.path)), check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.slow
def test_through_the_intermediate_representation(lowered: Lowered, tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    optimizer = pytest.importorskip("onnxscript.optimizer")
    ir.save(ir.load(str(lowered.path)), str(tmp_path / "again.onnx"))
    close(tmp_path / "again.onnx", lowered, 1e-3)
    onnx.save(optimizer.optimize(onnx.load(str(lowered.path))), str(tmp_path / "optimized.onnx"))
    close(tmp_path / "optimized.onnx", lowered, 1e-3)


@pytest.mark.slow
def test_in_another_opset(lowered: Lowered, tmp_path: Path) -> None:
    onnx.save(onnx.version_converter.convert_version(onnx.load(str(lowered.path)), 24), str(tmp_path / "24.onnx"))
    close(tmp_path / "24.onnx", lowered, 1e-3)


@pytest.mark.slow
def test_polygraphy_shows_it(lowered: Lowered) -> None:
    pytest.importorskip("polygraphy")
    code = "import sys; sys.argv[0] = 'polygraphy'; from polygraphy.tools import main; main()"
    words = [sys.executable, "-c", code, "inspect", "model", str(lowered.path), "--show", "layers"]
    shown = subprocess.run(words, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "MultiHeadAttention" in shown.stdout
