"""Every reducer on every engine: the same logits as torch at any batch size, from efficient graphs.

Lowering and compiling take seconds per block, so each model has a different reducer in every block.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn as nn
from onnx import numpy_helper
from torch import Tensor

from tests.engines.backends import tiny_vit as engines
from tests.exporter.reducers.cases import (
    VARIANTS,
    as_statistics,
    as_stream,
    exact_image,
    make_plan,
    middle,
    model_of,
    own_files,
    score_variances,
    widest_gap,
)
from tests.exporter.reducers.oracle_model import run as oracle
from tests.exporter.rewrite.test_reduced_vit import images_for
from tests.pairwise import thinned
from vp_engines.backends import get_backend
from vp_engines.backends.base import BuildOptions, BuildSource, Precision, RunOptions, TensorSpec
from vp_engines.errors import BuildError
from vp_exporter.exporting import _lower
from vp_exporter.lowering.program import dynamic_batch
from vp_exporter.model.describe import describe
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import REDUCERS, InnerStep, ops, step_from_dict
from vp_exporter.reducers.evit import EvitStep
from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens
from vp_exporter.rewrite.reduced_vit import ReducedViT

TOLERANCE = 1e-4
CLEAR = 1e-4  # images without a closer tie must agree
BATCHES = (1, 3, 8)

Steps = list[tuple[str, dict[str, Any]]]
# A class token and 64 patch tokens enter the first block.
EVERY_REDUCER: Steps = [
    ("tome", {"r": 4}),
    ("ppt", {"r": 4, "tau": 0.0, "order": "score"}),  # tau is set between the images' variances
    ("gtp", {"r": 4, "alpha": 0.3, "score": "graph", "graph_from": "patches"}),
    ("evit", {"tokens_out": 49, "fuse": True}),
    ("diffrate", {"prune_to": 45, "merge_to": 41, "weights": "equal"}),
    ("bat", {"tokens_out": 33, "clusters": 4, "pairs": 3}),
    ("pitome", {"r": 4, "margin": 0.3, "matching": "bipartite"}),
    ("topk", {"tokens_out": 25, "score": "ats"}),
]
OTHER_FIELDS: Steps = [
    ("bat", {"tokens_out": 61, "clusters": 2, "pairs": 2, "weights": "size"}),
    ("gtp", {"r": 4, "alpha": 0.3, "score": "graph", "graph": "semantic"}),
    ("gtp", {"r": 4, "alpha": 0.3, "graph": "spatial"}),
    ("evit", {"tokens_out": 49, "fuse": False}),
    ("bat", {"tokens_out": 41, "clusters": 3, "pairs": 0}),
    ("topk", {"tokens_out": 37}),
    ("diffrate", {"prune_to": 35, "merge_to": 33, "weights": "similarity"}),
    ("pitome", {"r": 4, "margin": 0.3, "matching": "protect"}),
    ("ppt", {"r": 3, "tau": 0.0, "order": "position"}),
    ("tome", {"r": 2}),  # has no other fields, but every reducer should be in this model too
    ("gtp", {"r": 3, "alpha": 0.3, "score": "graph", "graph_from": "patches", "graph": "spatial", "theta": 0.7}),
]
# The slowest to build, by default; all reducers are exhaustive.
FEW: Steps = [step for step in EVERY_REDUCER if step[0] in ("tome", "ppt", "evit", "bat")]
NO_CLASS_TOKEN: Steps = [
    ("tome", {"r": 9, "order": "similarity"}),
    ("pitome", {"r": 9, "margin": 0.3}),
    ("gtp", {"r": 9, "alpha": 0.3, "score": "graph", "graph_from": "patches", "graph": "semantic"}),
]


class Model(NamedTuple):
    vit: nn.Module
    description: ModelSpec
    plan: ReductionPlan
    reduced: ReducedViT


def make(steps: Steps, *, proportional: bool = True, **arguments: Any) -> Model:
    """A ViT of 8 x 8 patches with a step in every block."""
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    args = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "num_classes": 7, "depth": len(steps)}
    vit = timm.create_model(name, **{**args, **arguments}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.08))
    description = describe(vit, name)
    entries = [{"block": block, "reducer": reducer, **fields} for block, (reducer, fields) in enumerate(steps)]
    plan = ReductionPlan(
        PlanModel.of(description), tuple(step_from_dict(e) for e in entries), proportional_attention=proportional
    )
    return Model(vit, description, plan, ReducedViT(vit, description, plan))


def images_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def between_variances(steps: Steps) -> Model:
    """Set ppt's tau to the widest gap between the variances of the images' scores."""
    spread = score_variances(make(steps).reduced, 1, images_of(8))
    return make([(name, {**fields, "tau": widest_gap(spread)} if name == "ppt" else fields) for name, fields in steps])


@pytest.fixture(scope="module")
def every() -> Model:
    return between_variances(EVERY_REDUCER)


@pytest.fixture(scope="module")
def few() -> Model:
    return between_variances(FEW)


@pytest.fixture(scope="module")
def others() -> Model:
    return make(OTHER_FIELDS, proportional=False)


@pytest.fixture(scope="module")
def without_class_token() -> Model:
    return make(NO_CLASS_TOKEN, class_token=False, global_pool="avg")


# Lowering takes half a minute. For OpenVINO, every reducer is in OTHER_FIELDS.
HALF_OF_EVERY = pytest.param("half_of_every", marks=pytest.mark.exhaustive)
PLAIN = pytest.param("plain", marks=pytest.mark.exhaustive)


def lower(model: Model, engine: str, folder: Path, precision: Precision = "fp32") -> BuildSource:
    return _lower(get_backend(engine), model.reduced, precision, folder / "model.onnx")


@pytest.fixture(scope="module")
def packed(every: Model, tmp_path_factory: pytest.TempPathFactory) -> BuildSource:
    """Lowered for ONNX Runtime."""
    return lower(every, "ort", tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def plain(every: Model, tmp_path_factory: pytest.TempPathFactory) -> BuildSource:
    """Lowered for OpenVINO and TensorRT."""
    return lower(every, "openvino", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def half(few: Model, tmp_path_factory: pytest.TempPathFactory) -> BuildSource:
    return lower(few, "trt-rtx", tmp_path_factory.mktemp("half"), "fp16")


@pytest.fixture(scope="module")
def half_of_every(every: Model, tmp_path_factory: pytest.TempPathFactory) -> BuildSource:
    return lower(every, "trt-rtx", tmp_path_factory.mktemp("half_of_every"), "fp16")


@pytest.fixture(scope="module")
def other_fields(others: Model, tmp_path_factory: pytest.TempPathFactory) -> BuildSource:
    return lower(others, "openvino", tmp_path_factory.mktemp("others"))


def agrees(model: Model, engine: str, source: BuildSource, out: Path) -> None:
    """Build once and run several batch sizes. An image may only differ if the oracle finds a near-tie."""
    backend = get_backend(engine)
    if not backend.available("build").ok:
        pytest.skip(backend.available("build").reason)
    result = backend.build(source, out, BuildOptions())
    files = engines.contents(result, out)
    ties = 0
    with backend.open(
        result.artefact, files, source.inputs, source.outputs, result.requirements, RunOptions(threads=1)
    ) as runner:
        for batch in BATCHES:
            images = images_of(batch)
            with torch.no_grad():
                wanted = model.reduced(images).numpy()
            ties += near_ties(model, images, runner.run(images.numpy())["logits"], wanted, TOLERANCE)
    assert ties <= 1, f"{ties} of {sum(BATCHES)} images differ"


def near_ties(model: Model, images: Tensor, found: Any, wanted: Any, tolerance: float) -> int:
    """Number of images with different logits; fails unless their decisions are near-ties."""
    errors = torch.as_tensor(np.abs(np.asarray(found) - np.asarray(wanted)).max(axis=1))
    for image in images[errors > tolerance]:
        margins: list[float] = []
        oracle(model.vit, model.description, model.plan, image, margins)
        assert min(margins) < CLEAR, f"an image without near-ties differs by {errors.max():.3e}"
    return int((errors > tolerance).sum())


def test_every_reducer_is_here() -> None:
    for steps in (EVERY_REDUCER, OTHER_FIELDS):
        assert {name for name, _ in steps} == set(REDUCERS) - {"static"} - own_files()


@pytest.mark.slow
def test_ort(every: Model, packed: BuildSource, tmp_path: Path) -> None:
    agrees(every, "ort", packed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_other_fields(others: Model, other_fields: BuildSource, engine: str, tmp_path: Path) -> None:
    agrees(others, engine, other_fields, tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_openvino(every: Model, plain: BuildSource, tmp_path: Path) -> None:
    agrees(every, "openvino", plain, tmp_path)


@pytest.mark.slow
def test_without_class_token(without_class_token: Model, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    agrees(without_class_token, "ort", lower(without_class_token, "ort", tmp_path), out)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["few", pytest.param("every", marks=pytest.mark.exhaustive)])
def test_aoti(of: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Model = request.getfixturevalue(of)
    agrees(model, "aoti", lower(model, "aoti", tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["half", "other_fields", PLAIN, HALF_OF_EVERY])
def test_tensorrt_builds(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Built for a GPU that is not present; every attention is recognised (and so fused, in fp16)."""
    backend = get_backend("trt-rtx")
    if not backend.available("build").ok:
        pytest.skip("TensorRT-RTX is not installed")
    model: BuildSource = request.getfixturevalue(source)
    result = backend.build(model, tmp_path, BuildOptions(compute_capability="8.9"))
    assert model.attention_blocks > 0
    assert (tmp_path / result.artefact).stat().st_size > 100_000


FORBIDDEN = {
    *("ScatterElements", "ScatterND", "Scatter"),  # the order of several sources is undefined
    *("NonZero", "If", "Loop", "Scan", "Shape", "Size", "Range", "ConstantOfShape", "Unique", "Compress"),
}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["packed", "half", "other_fields", PLAIN, HALF_OF_EVERY])
def test_graph(source: str, request: pytest.FixtureRequest) -> None:
    """No data-dependent shapes, one attention per block, small TopKs, and names that tell what a node is for."""
    lowered: BuildSource = request.getfixturevalue(source)
    model = onnx.shape_inference.infer_shapes(onnx.load(str(lowered.onnx)), data_prop=True)
    assert not model.functions
    found = Counter(node.op_type for node in model.graph.node)
    assert not FORBIDDEN & set(found)
    steps = {"other_fields": OTHER_FIELDS, "half": FEW}.get(source, EVERY_REDUCER)
    maps = sum(fields.get("score") == "graph" for _, fields in steps)  # gtp's score needs the map itself
    assert (
        found["MultiHeadAttention" if source == "packed" else "Attention"]
        == lowered.attention_blocks
        == len(steps) - maps
    )
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.input)
    }
    parts: set[str] = set()
    for node in model.graph.node:
        scope, _, kind = node.name.rpartition("/")
        parts.add(scope)
        assert kind.split(".")[0] == node.op_type
        if node.op_type == "Expand":  # the packed attention's mask of log sizes, which its kernel does not broadcast
            assert source == "packed"
            assert scope.startswith("blocks.")
            assert not scope.endswith((".statistics", ".reduce"))
        thins = node.op_type == "TopK" and source == "other_fields" and scope == f"blocks.{len(steps) - 1}"
        if node.op_type in ("TopK", "GatherND", "OneHot", "ArgMax") and not thins:  # theta sorts an attention map
            assert scope.endswith((".statistics", ".reduce")) or scope.startswith("graphs.")
        if node.op_type == "TopK":
            k, axis = int(constants[node.input[1]].item()), shapes[node.input[0]][-1]
            assert 1 <= k <= axis <= 3840  # TensorRT's limit
            assert axis <= 64 or thins  # no axis is longer than the number of patch tokens
    for block in range(len(steps)):
        assert {f"blocks.{block}.statistics", f"blocks.{block}.reduce"} <= parts


class Choices(nn.Module):
    """Steps on given statistics, without a model: positions that stay, and sizes."""

    def __init__(self, steps: list[InnerStep], prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.steps, self.prefix, self.columns = steps, prefix, grid[1]
        self.register_buffer("places", ops.grid_codes(list(range(grid[0] * grid[1])), grid[1]))

    def forward(self, packed: Tensor) -> Tensor:
        """[B, N, 10]: tokens, keys, class attention, value norm -> float32 [B, ...], all results concatenated."""
        x, keys, scores, norm = packed.split([4, 4, 1, 1], dim=2)
        statistics = AttentionStatistics(scores[:, :, 0], keys, norm[:, :, 0], scores[:, :, 0])
        stream = Stream(x, self.prefix, positions=self.places, columns=self.columns)
        answers = []
        for step in self.steps:
            out = reduce_tokens(stream, step.choose(stream, statistics), carry_size=True)
            assert out.positions is not None
            answers.append(out.positions.float())
            if out.size is not None:
                answers.append(out.size)
        return torch.cat(answers, dim=1)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildSource, np.ndarray, np.ndarray]:
    """Steps on tokens with many exact ties: their graph, its input and torch's results."""
    prefix, grid = 1, (3, 4)
    fields: Steps = [
        ("tome", {"r": 4}),
        ("ppt", {"r": 4, "tau": 0.0}),
        ("evit", {"tokens_out": 7, "fuse": True}),
        ("topk", {"tokens_out": 7}),
        ("diffrate", {"prune_to": 10, "merge_to": 6}),
        ("bat", {"tokens_out": 8, "clusters": 2, "pairs": 3}),
        ("pitome", {"r": 4, "margin": -1.25}),
        ("gtp", {"r": 5, "alpha": 0.5, "neighbours": 2}),
    ]
    steps = [step_from_dict({"block": 0, "reducer": name, **entry}) for name, entry in fields]
    model = Choices([step for step in steps if isinstance(step, InnerStep)], prefix, grid).eval()
    rng = np.random.default_rng(0)
    images = [
        exact_image(prefix, grid, lambda count, high: rng.integers(0, high + 1, count).tolist(), sized=False)
        for _ in range(64)
    ]
    statistics = as_statistics(images)
    assert statistics.keys is not None
    assert statistics.class_attention is not None
    assert statistics.value_norm is not None
    norm = (statistics.value_norm / 2**0.5).round(decimals=3)  # powers of 2 again, so that products are exact
    packed = torch.cat(
        [as_stream(images, sized=False).x, statistics.keys, statistics.class_attention[:, :, None], norm[:, :, None]],
        dim=2,
    )
    path = tmp_path_factory.mktemp("choices") / "choices.onnx"
    torch.onnx.export(
        model, (packed[:2],), path, dynamic_shapes=dynamic_batch(), opset_version=23, dynamo=True, verbose=False,
        input_names=["packed"], output_names=["answers"], external_data=False,
    )  # fmt: skip
    with torch.no_grad():
        answers = model(packed).numpy()
    specs = [
        TensorSpec(name, "float32", ("batch", *a.shape[1:])) for name, a in (("packed", packed), ("answers", answers))
    ]
    return BuildSource("fp32", (specs[0],), (specs[1],), onnx=path), packed.numpy(), answers


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_ties_go_to_the_lowest_index(
    choices: tuple[BuildSource, np.ndarray, np.ndarray], engine: str, tmp_path: Path
) -> None:
    """Compare an engine with torch, for every image; test_parity.py compares torch with the oracles on such tokens."""
    source, packed, answers = choices
    np.testing.assert_allclose(answers_of(engine, source, packed, tmp_path), answers, atol=1e-6)


def answers_of(engine: str, source: BuildSource, packed: np.ndarray, out: Path) -> np.ndarray:
    backend = get_backend(engine)
    result = backend.build(source, out, BuildOptions())
    files = engines.contents(result, out)
    with backend.open(
        result.artefact, files, source.inputs, source.outputs, result.requirements, RunOptions(threads=1)
    ) as runner:
        return runner.run(packed)["answers"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "precision"),
    thinned(
        itertools.product(VARIANTS, ["fp16", "bf16"]),
        lambda variant, precision: {variant, (VARIANTS[variant][0], precision)},
    ),
)
def test_low_precision_errs_at_most_twice_as_much_as_the_dense_model(variant: str, precision: str) -> None:
    """Against fp32; median of 48 images, since rounding makes some choose other tokens, which changes more."""
    vit, description = model_of("class-token")
    images = images_for(description, 48)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    reduced = ReducedViT(vit, description, make_plan(description, {1: variant, 2: variant}, middle, proportional=True))
    with torch.no_grad():
        dense = (copy.deepcopy(vit).to(dtype)(images.to(dtype)).float() - vit(images)).abs().amax(1)
        errors = (reduced.for_export(precision)(images) - reduced(images)).abs().amax(1)
    assert 0 < errors.median() <= 2 * dense.median()


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    """A merging and a pruning reducer, at two batch sizes."""
    vit, description = model_of("class-token")
    reduced = ReducedViT(vit, description, make_plan(description, {1: "tome", 2: "topk"}, middle, proportional=True))
    compiled = torch.compile(reduced, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            images = images_for(description, batch)
            torch.testing.assert_close(compiled(images), reduced(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_tensorrt_names_a_sort_that_is_too_long(tmp_path: Path) -> None:
    """TensorRT's TopK takes at most 3840 values; an image of 1024 pixels has 4096 patches."""
    rtx = get_backend("trt-rtx")
    if not rtx.available("build").ok:
        pytest.skip("TensorRT-RTX is not installed")
    args = {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": 1024, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **args).eval()
    description = describe(vit, "vit_tiny_patch16_224")
    plan = ReductionPlan(PlanModel.of(description), (EvitStep(0, tokens_out=3000, fuse=True),))
    source = _lower(rtx, ReducedViT(vit, description, plan), "fp16", tmp_path / "large.onnx")
    with pytest.raises(BuildError, match=r"blocks\.0\.reduce/TopK.* sorts 4096 tokens; expected at most 3840"):
        rtx.build(source, tmp_path, BuildOptions(1, 1, 1, compute_capability="8.9"))
