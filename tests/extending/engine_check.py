"""Test of `engine.py`, for the copy."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from vp_engines.backends import get_backend
from vp_engines.backends.base import BuildOptions, BuildSource, RunOptions, TensorSpec

INPUT, OUTPUT = TensorSpec("images", "float32", ("batch", 3, 4, 4)), TensorSpec("logits", "float32", ("batch", 3))


def test_it_runs_a_graph(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(each.name, TensorProto.FLOAT, each.shape) for each in (INPUT, OUTPUT)]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    node = helper.make_node("ReduceMean", ["images", "axes"], ["logits"], keepdims=0)
    graph = helper.make_graph([node], "mean", values[:1], values[1:], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "mean.onnx")
    backend, out = get_backend("reference"), tmp_path / "out"
    out.mkdir()
    source = BuildSource("fp32", (INPUT,), (OUTPUT,), onnx=tmp_path / "mean.onnx")
    result = backend.build(source, out, BuildOptions())
    files = {name: (out / name).read_bytes() for name in result.files}
    images = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    with backend.open(result.artefact, files, (INPUT,), (OUTPUT,), {}, RunOptions()) as runner:
        np.testing.assert_allclose(runner.run(images)["logits"], images.mean((2, 3)), rtol=1e-6)
