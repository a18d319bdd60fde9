"""Adding functions to a model and inlining them, without changing anything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper, parser

from vp_kernels.attention import function as attention
from vp_kernels.errors import KernelError
from vp_kernels.onnx import DOMAIN, add_functions, function_names, inline

TEXT = """<ir_version: 10, opset_import: ["": 23]>
two (float[batch, 6] scores, float[batch, 6] other)
=> (int64[batch, 2] first, int64[batch, 3] second, float[batch, 6] sum)
{
   first = vp.Select <k: int = 2> (scores)
   sum = Add (other, weight)
   second = vp.Select <k: int = 3> (sum)
}"""


@pytest.fixture
def model() -> onnx.ModelProto:
    parsed = parser.parse_model(TEXT)
    for node, name in zip(parsed.graph.node, ("blocks.0/Select.0", "blocks.1/Add.0", "blocks.1/Select.0"), strict=True):
        node.name = name
    weight = np.arange(1, 7, dtype=np.float32)
    parsed.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    return parsed


def _answers(model: onnx.ModelProto) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores = np.array([[3, 9, 1, 9, 0, 2]], dtype=np.float32)
    return [np.asarray(each) for each in session.run(None, {"scores": scores, "other": -scores})]


def test_add_functions(model: onnx.ModelProto) -> None:
    assert add_functions(model) == ["Select"]
    assert {each.domain: each.version for each in model.opset_import} == {"": 23, "vp": 1}
    onnx.checker.check_model(model, full_check=True)
    first, second, _ = _answers(model)
    assert first.tolist() == [[1, 3]]
    assert second.tolist() == [[2, 4, 5]]  # of the sums -2, -7, 2, -5, 5, 4
    before = model.SerializeToString()
    assert add_functions(model) == ["Select"]
    assert model.SerializeToString() == before


def test_nothing_to_add() -> None:
    plain = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    before = plain.SerializeToString()
    assert add_functions(plain) == []
    assert plain.SerializeToString() == before
    assert inline(plain).SerializeToString() == before


def test_inlined_twin(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    twin = inline(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(twin, full_check=True)
    assert {node.domain for node in twin.graph.node} == {""}
    assert [each.domain for each in twin.opset_import] == [""]
    assert not twin.functions
    # Each node has the name of the one that it came from.
    names = [node.name for node in twin.graph.node]
    assert len(set(names)) == len(names)
    assert {name.rpartition("/")[0] for name in names} == {"blocks.0/Select.0", "blocks.1", "blocks.1/Select.0"}
    assert names.count("blocks.1/Add.0") == 1
    assert "blocks.0/Select.0/TopK.0" in names
    assert "blocks.1/Select.0/TopK.1" in names
    assert not any("__" in name for name in names)
    add_functions(model)
    for mine, theirs in zip(_answers(twin), _answers(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("names", [("", "", ""), ("same", "same", "same")])
def test_nodes_without_names_of_their_own(model: onnx.ModelProto, names: tuple[str, ...]) -> None:
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    twin = inline(model)
    onnx.checker.check_model(twin, full_check=True)
    inlined = [node.name for node in twin.graph.node if node.op_type == "TopK"]
    assert len(set(inlined)) == 4
    assert _answers(twin)[0].tolist() == [[1, 3]]


def test_weights_stay_as_they_are(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Including external weights, which are not read."""
    twin = inline(model)
    np.testing.assert_array_equal(numpy_helper.to_array(twin.graph.initializer[0]), np.arange(1, 7, dtype=np.float32))
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    outside = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
    twin = inline(outside)
    assert twin.graph.initializer[0].SerializeToString() == outside.graph.initializer[0].SerializeToString()
    assert twin.graph.initializer[0].external_data[0].value == "m.data"


def test_functions_of_others_go_too(model: onnx.ModelProto) -> None:
    """The inlined model only has standard operators."""
    relu = parser.parse_function('<domain: "theirs", opset_import: ["": 23]> Rectify (x) => (y) { y = Relu(x) }')
    model.functions.append(relu)
    model.opset_import.append(helper.make_opsetid("theirs", 1))
    model.graph.node[1].CopyFrom(helper.make_node("Rectify", ["other"], ["sum"], name="r", domain="theirs"))
    assert add_functions(model) == ["Select"]
    assert [function.name for function in model.functions] == ["Rectify", "Select"]
    assert {node.domain for node in inline(model).graph.node} == {""}


def test_unknown_type(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "SelectWorst"
    before = model.SerializeToString()
    for act in (add_functions, inline):
        with pytest.raises(KernelError, match=r"vp::SelectWorst: the operator type is 'SelectWorst'; expected one of "):
            act(model)
    assert model.SerializeToString() == before


def test_names() -> None:
    """No type may be named like a standard operator: TensorRT's parser would take it for that, whatever the domain."""
    names = function_names()
    assert len(names) == len(set(names))
    assert {"AttentionPlain", "GatherNorm", "Select", "SelectFuse", "MergeRows", "MatchMerge"} <= set(names)
    assert not {schema.name for schema in onnx.defs.get_all_schemas()} & set(names)


def test_import_is_light() -> None:
    """Importing vp_kernels.onnx needs neither onnx nor torch."""
    code = (
        "import sys, vp_kernels.onnx as o; o.function_names(); "
        "print(sorted({'onnx', 'torch', 'onnxscript'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("op_type", attention.TYPES)
def test_older_opsets_have_attention_written_out(op_type: str) -> None:
    """Opset 18, which lacks Attention, gives the same results as 23."""
    rng = np.random.default_rng(0)
    given = {"qkv": rng.normal(size=(2, 5, 3, 2, 8)).astype(np.float32)}
    if "Bias" in op_type:
        given["key_bias"] = rng.normal(size=(2, 5)).astype(np.float32)
    names = ["out"] if op_type.endswith(("Plain", "Bias")) else ["out", "importance"]
    answers = []
    for opset in (18, 23):
        node = helper.make_node(op_type, list(given), names, domain=DOMAIN, tokens=5, heads=2, head_dim=8)
        inputs = [helper.make_tensor_value_info(name, 1, list(value.shape)) for name, value in given.items()]
        outputs = [helper.make_tensor_value_info(name, 1, None) for name in names]
        graph = helper.make_graph([node], "one", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        add_functions(model)
        assert {each.version for each in model.functions[0].opset_import} == {opset}
        assert opset == 23 or "Attention" not in {each.op_type for each in model.functions[0].node}
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, given))
    for old, new in zip(*answers, strict=True):
        np.testing.assert_allclose(old, new, atol=2e-6)
