"""A model on the vp operators in ONNX, with functions or in standard operators: same results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tests.exporter.reducers.test_export import EVERY_REDUCER, OTHER_FIELDS, Model, images_of, make, near_ties
from tests.exporter.rewrite.test_fused_block import HEADS, both
from tests.exporter.tiny import random_plan, tiny_vit
from vp_exporter.lowering import lower_onnx, plugin_nodes
from vp_exporter.lowering.onnx import check_onnx
from vp_exporter.plan import PlanModel
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_kernels.onnx import inline

SAME = 5e-4


def answer(path: Path, images: torch.Tensor, level: ort.GraphOptimizationLevel) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"images": images.numpy()})[0]
    return found


STEPS = {"every": EVERY_REDUCER, "other": OTHER_FIELDS, "few": [OTHER_FIELDS[0], OTHER_FIELDS[6]]}


# "few" has the operator type missing in the others; lowering all that they stand for takes half a minute.
@pytest.fixture(scope="module", params=["every", "few", pytest.param("other", marks=pytest.mark.exhaustive)])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, Path]:
    """The portable model; its counterpart on the operators, with functions and in standard operators.

    The files differ only after the export, which takes most of a minute and is done once.
    """
    model = make(STEPS[request.param], num_heads=HEADS)
    folder = tmp_path_factory.mktemp(request.param)
    ready = ReducedViT(model.vit, model.description, model.plan, "vp").for_export()
    functions, standard = lower_onnx(ready, folder / "functions.onnx"), folder / "standard.onnx"
    onnx.save(inline(onnx.load(str(functions))), str(standard))  # same as `functions=False`: test_static_plan
    check_onnx(standard, ready)
    return model, functions, standard


@pytest.mark.slow
def test_one_answer(lowered: tuple[Model, Path, Path]) -> None:
    model, functions, standard = lowered
    for batch in (1, 5):
        images = images_of(batch)
        with torch.no_grad():
            expected = model.reduced(images).numpy()
        for path in (functions, standard):
            for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
                assert near_ties(model, images, answer(path, images, level), expected, SAME) <= 1


@pytest.mark.slow
def test_what_stands_in_the_files(lowered: tuple[Model, Path, Path]) -> None:
    given, functions, standard = lowered
    ready = ReducedViT(given.vit, given.description, given.plan, "vp")
    model = onnx.load(str(functions))
    ours = [node for node in model.graph.node if node.domain == "vp"]
    kinds = Counter(node.op_type for node in ours)
    assert sum(count for kind, count in kinds.items() if kind.startswith("Attention")) == ready.fused_attentions
    assert {function.name for function in model.functions if function.domain == "vp"} == set(kinds)
    assert all(
        node.name.startswith("blocks.") and node.name.rpartition("/")[2].startswith(node.op_type) for node in ours
    )
    twin = onnx.load(str(standard))
    assert not twin.functions
    assert {node.domain for node in twin.graph.node} == {""}
    assert {entry.domain for entry in twin.opset_import} <= {"", "vp"}
    # Profilers can still recognise what belongs to a reducer.
    scopes = {node.name.partition("/")[0] for node in twin.graph.node}
    assert any(scope.endswith(".fused_reduce") for scope in scopes)


@pytest.mark.slow
def test_static_plan(tmp_path: Path) -> None:
    vit, description = tiny_vit(heads=2)
    plan = random_plan(PlanModel.of(description), scales=True)
    ready = ReducedViT(vit, description, plan, "vp").for_export()
    path = lower_onnx(ready, tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node if node.domain == "vp"}
    assert kinds == {"AttentionBias", "GatherNorm"}
    twin = lower_onnx(ready, tmp_path / "standard.onnx", functions=False)
    assert onnx.load(str(twin)) == inline(onnx.load(str(path)))
    images = torch.randn(3, 3, *description.image_size)
    with torch.no_grad():
        expected = ReducedViT(vit, description, plan)(images).numpy()
    found = answer(path, images, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.slow
def test_plugin_nodes_say_which_plugin_they_are(tmp_path: Path) -> None:
    """An engine without the library runs the same file through its function bodies."""
    steps = EVERY_REDUCER[:2]  # every operator type is covered by the files above
    portable, fused = both(steps)
    path = lower_onnx(fused.for_export(), tmp_path / "plugins.onnx", functions=False, plugins=True)
    ours = [node for node in onnx.load(str(path)).graph.node if node.domain == "vp"]
    assert len(ours) == plugin_nodes(path) > len(portable.blocks)
    for node in ours:
        named = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert (named["plugin_namespace"], named["plugin_version"]) == (b"vp", b"1")
    images = images_of(2)
    with torch.no_grad():
        expected = portable(images).numpy()
    found = answer(path, images, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert near_ties(make(steps, num_heads=HEADS), images, found, expected, SAME) <= 1
