"""The ONNX file: same function as torch at any batch size, without wasteful nodes or local paths."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.exporter.tiny import DEPTH, KINDS, random_plan, tiny_vit
from vp_engines.errors import BuildError
from vp_exporter.lowering import lower_onnx
from vp_exporter.lowering import onnx as lowering
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.rewrite.attention import AttentionForm
from vp_exporter.rewrite.reduced_vit import ReducedViT

BATCHES = (1, 3, 8, 64)
BLOCKS = 2  # both drop tokens; each takes a second to lower
# The standard operator, and ONNX Runtime's own, which is available in every opset.
ATTENTION = {"sdpa": "Attention", "packed": "MultiHeadAttention"}
# Not needed in a graph of constant shapes.
USELESS = {"Shape", "Expand", "ConstantOfShape", "Where", "Range", "If", "Loop", "Scan", "Size"}


def images_for(model: ReducedViT, batch: int, seed: int = 1) -> torch.Tensor:
    shape = (batch, model.description.in_chans, *model.description.image_size)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(path: Path, images: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"images": images.numpy()})
    return np.asarray(result)


def expected(model: ReducedViT, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(images).numpy()
    return result


def reduced_vit(
    kind: str = "class-token", *, dense: bool = False, scales: bool = False, depth: int = BLOCKS
) -> ReducedViT:
    vit, description = tiny_vit(kind, depth=depth)
    plan: ReductionPlan | None = None if dense else random_plan(PlanModel.of(description), scales=scales)
    return ReducedViT(vit, description, plan)


def operators(path: Path) -> Counter[str]:
    """Count every operator in the file, including functions and subgraphs."""
    model = onnx.load(str(path), load_external_data=False)
    found: Counter[str] = Counter()

    def walk(nodes: Any) -> None:
        for node in nodes:
            found[node.op_type] += 1
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    walk(graph.node)

    walk(model.graph.node)
    for function in model.functions:
        walk(function.node)
    return found


def free_text(path: Path) -> list[str]:
    """All texts in the file except names of values and weights: notes, doc strings, paths."""
    model = onnx.load(str(path))
    notes = [model.doc_string, model.domain, model.graph.doc_string]
    parts: list[Any] = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]
    parts += [*model.graph.initializer, *model.graph.value_info, *model.functions]
    parts += [node for function in model.functions for node in function.node]
    for part in parts:
        notes.append(part.doc_string)
        notes += [f"{entry.key}={entry.value}" for entry in part.metadata_props]
    return [note for note in notes if note]


def agrees_at_every_batch(path: Path, model: ReducedViT, tolerance: float = 1e-4) -> None:
    """Check one file at several batch sizes against the torch model before folding."""
    for batch in BATCHES:
        images = images_for(model, batch)
        result, wanted = run(path, images), expected(model, images)
        assert result.dtype == np.float32
        assert result.shape == wanted.shape
        assert np.abs(result - wanted).max() <= tolerance, f"batch {batch}"


@pytest.fixture(scope="module", params=KINDS)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReducedViT]:
    """Every kind of model under a plan with key biases, in ONNX Runtime's form.

    The first is deeper: one block drops nothing, between blocks that do.
    """
    model = reduced_vit(request.param, scales=True, depth=DEPTH if request.param == "class-token" else BLOCKS)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert lower_onnx(model.for_export("fp32", "packed"), path) == path
    return path, model


@pytest.mark.slow
def test_equals_torch_at_every_batch(lowered: tuple[Path, ReducedViT]) -> None:
    agrees_at_every_batch(*lowered)


@pytest.mark.slow
def test_one_attention_node_a_block_and_nothing_useless(lowered: tuple[Path, ReducedViT]) -> None:
    path, model = lowered
    found = operators(path)
    assert found[ATTENTION["packed"]] == len(model.blocks)
    assert not USELESS & set(found)


@pytest.mark.slow
def test_names_nothing_of_this_machine(lowered: tuple[Path, ReducedViT]) -> None:
    path = lowered[0]
    assert free_text(path) == []
    content = path.read_bytes()
    for word in ("site-packages", "vp_exporter", str(Path(__file__).parents[3]), str(Path.home()) + "/", ".py"):
        assert word.encode() not in content
    assert onnx.load(str(path)).producer_name == "vp-export"


@pytest.mark.slow
def test_one_file_with_its_weights(lowered: tuple[Path, ReducedViT]) -> None:
    path, model = lowered
    assert os.listdir(path.parent) == ["model.onnx"]
    graph = onnx.load(str(path), load_external_data=False).graph
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer)
    assert path.stat().st_size > sum(p.numel() for block in model.blocks for p in block.block[0].parameters()) * 4


@pytest.mark.slow
def test_signature(lowered: tuple[Path, ReducedViT]) -> None:
    path, model = lowered
    graph = onnx.load(str(path)).graph
    (images,), (output,) = graph.input, graph.output
    height, width = model.description.image_size
    axes = [[axis.dim_param or axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in (images, output)]
    assert (images.name, axes[0]) == ("images", ["batch", 3, height, width])
    classes = model.description.num_classes
    assert (output.name, axes[1]) == (("logits", ["batch", classes]) if classes else ("features", ["batch", 64]))
    assert images.type.tensor_type.elem_type == output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sdpa", "packed"])
def test_dense_model(tmp_path: Path, form: AttentionForm) -> None:
    model = reduced_vit(dense=True)
    path = lower_onnx(model.for_export("fp32", form), tmp_path / "dense.onnx")
    agrees_at_every_batch(path, model)
    found = operators(path)
    assert found[ATTENTION[form]] == BLOCKS
    assert not USELESS & set(found)
    assert found["Gather"] <= 1  # no token is dropped: at most the class token is selected


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.exhaustive), 22])
def test_older_opsets(tmp_path: Path, opset: int) -> None:
    model = reduced_vit(scales=True)
    path = lower_onnx(model.for_export("fp32", "packed"), tmp_path / "older.onnx", opset=opset)
    assert [entry.version for entry in onnx.load(str(path)).opset_import if entry.domain == ""] == [opset]
    found = operators(path)
    assert found[ATTENTION["packed"]] == BLOCKS
    assert not USELESS & set(found)
    agrees_at_every_batch(path, model)


def test_an_opset_that_torch_does_not_write_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch continues in another opset if its conversion fails, which must be reported."""
    model = reduced_vit(dense=True)
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kw: export(*args, **{**kw, "opset_version": 20}))
    with pytest.raises(BuildError, match=r"cannot be written in opset 18: torch [\d.+a-z]+ wrote 20; choose another"):
        lower_onnx(model.for_export("fp32", "packed"), tmp_path / "model.onnx", opset=18)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.exhaustive), 23])
def test_explicit_form(tmp_path: Path, opset: int) -> None:
    model = reduced_vit(scales=True)
    path = lower_onnx(model.for_export("fp32", "explicit"), tmp_path / "explicit.onnx", opset=opset)
    assert [entry.version for entry in onnx.load(str(path)).opset_import if entry.domain == ""] == [opset]
    found = operators(path)
    assert found["Attention"] == 0
    assert found["Softmax"] == BLOCKS
    assert not USELESS & set(found)
    assert free_text(path) == []
    agrees_at_every_batch(path, model)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ReducedViT]]:
    """The dense and the reduced model in fp16."""
    folder = tmp_path_factory.mktemp("fp16")
    models = {"dense": reduced_vit(dense=True), "reduced": reduced_vit()}
    return {
        name: (lower_onnx(model.for_export("fp16", "packed"), folder / f"{name}.onnx"), model)
        for name, model in models.items()
    }


@pytest.mark.slow
def test_fp16_errs_at_most_twice_as_much_as_dense(halves: dict[str, tuple[Path, ReducedViT]]) -> None:
    """Against fp32 torch, over 64 images."""
    errors = {}
    for name, (path, model) in halves.items():
        images = images_for(model, 64)
        errors[name] = np.abs(run(path, images) - expected(model, images)).max()
    assert 0 < errors["reduced"] <= 2 * errors["dense"]


@pytest.mark.slow
def test_fp16_takes_and_gives_float32(halves: dict[str, tuple[Path, ReducedViT]]) -> None:
    for path, _ in halves.values():
        graph = onnx.load(str(path)).graph
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert kinds == {onnx.TensorProto.FLOAT}
        weights = Counter[int]()
        for tensor in graph.initializer:
            weights[tensor.data_type] += int(np.prod(tensor.dims))
        assert weights[onnx.TensorProto.FLOAT16] > 100_000
        assert weights[onnx.TensorProto.FLOAT] < 1000


@pytest.mark.slow
def test_bf16_lowers(tmp_path: Path) -> None:
    path = lower_onnx(reduced_vit(scales=True).for_export("bf16"), tmp_path / "bf16.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path)).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in graph.initializer}
    assert operators(path)[ATTENTION["sdpa"]] == BLOCKS
    assert not USELESS & set(operators(path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReducedViT]:
    model = reduced_vit()
    return lower_onnx(model.for_export("fp32", "packed"), tmp_path_factory.mktemp("plain") / "model.onnx"), model


@pytest.mark.slow
def test_check_accepts_what_was_lowered(plain: tuple[Path, ReducedViT]) -> None:
    lowering.check_onnx(*plain)


def test_check_refuses_a_fixed_batch(tmp_path: Path, plain: tuple[Path, ReducedViT]) -> None:
    path, model = plain
    file = onnx.load(str(path))
    for value in (*file.graph.input, *file.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    del file.graph.value_info[:]
    onnx.save(file, str(tmp_path / "fixed.onnx"))
    with pytest.raises(BuildError, match=r"has images \[2, 3, 64, 64\]; expected images \['batch', 3, 64, 64\]"):
        lowering.check_onnx(tmp_path / "fixed.onnx", model)


def test_check_refuses_another_signature(plain: tuple[Path, ReducedViT]) -> None:
    with pytest.raises(BuildError, match=r"has logits \['batch', 7\]; expected features \['batch', 64\]"):
        lowering.check_onnx(plain[0], reduced_vit("features"))


def test_check_refuses_a_graph_that_breaks_the_specification(tmp_path: Path, plain: tuple[Path, ReducedViT]) -> None:
    path, model = plain
    file = onnx.load(str(path))
    file.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(file, str(tmp_path / "broken.onnx"))
    with pytest.raises(BuildError, match=r"the ONNX file fails its check: .*NoSuchOperator") as caught:
        lowering.check_onnx(tmp_path / "broken.onnx", model)
    assert "\n" not in str(caught.value)


def test_large_models_put_their_weights_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: tuple[Path, ReducedViT]
) -> None:
    inline, model = plain
    monkeypatch.setattr(lowering, "MAX_INLINE_BYTES", 0)
    path = lower_onnx(model.for_export("fp32", "packed"), tmp_path / "large.onnx")
    assert sorted(os.listdir(tmp_path)) == ["large.onnx", "large.onnx.data"]
    assert path.stat().st_size < inline.stat().st_size / 2
    locations = {
        entry.value
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"large.onnx.data"}  # relative: the pair may move together
    for batch in BATCHES:
        images = images_for(model, batch)
        np.testing.assert_allclose(run(path, images), run(inline, images), atol=1e-5, rtol=1e-5)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("large.onnx", "large.onnx.data"):
        (tmp_path / name).rename(moved / name)
    agrees_at_every_batch(moved / "large.onnx", model)


@pytest.mark.slow
def test_again_is_the_same_file_and_prints_nothing(
    tmp_path: Path, plain: tuple[Path, ReducedViT], capfd: pytest.CaptureFixture[str]
) -> None:
    path, model = plain
    capfd.readouterr()
    again = lower_onnx(model.for_export("fp32", "packed"), tmp_path / "again.onnx")
    assert again.read_bytes() == path.read_bytes()
    assert capfd.readouterr() == ("", "")
