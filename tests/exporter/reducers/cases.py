"""Every reducer in all variants, with batches of synthetic tokens and plans.

There are two kinds of tokens. "Exact" ones are constructed such that float32 and float64 compute every comparison
without rounding: there are many ties, and each must be broken as specified, in every image. "Rough" ones are noise,
where two candidates may be closer than float32 can resolve; the oracle's margin identifies those images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from tests.exporter.reducers.oracles import Image
from tests.exporter.tiny import tiny_vit
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import REDUCERS, InnerStep, Tokens, ops, step_from_dict
from vp_exporter.reducers.graph import TokenGraph, code_index
from vp_exporter.reducers.stream import AttentionStatistics, Stream
from vp_exporter.rewrite.reduced_vit import ReducedViT

Pick = Callable[[int, int], int]  # an integer from low to high, inclusive

# id -> reducer and its fields other than counts.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tome": ("tome", {}),
    "tome-similarity": ("tome", {"order": "similarity"}),
    "ppt-pool": ("ppt", {"tau": 1e9}),
    "ppt-prune": ("ppt", {"tau": 0.0, "order": "score"}),
    "ppt-prune-position": ("ppt", {"tau": 0.0, "order": "position"}),
    "ppt-mixed": ("ppt", {"tau": None, "order": "score"}),  # set to a value between the variances of the images
    "evit-fuse": ("evit", {"fuse": True}),
    "evit": ("evit", {"fuse": False}),
    "topk": ("topk", {"score": "class"}),
    "topk-ats": ("topk", {"score": "ats"}),
    "diffrate": ("diffrate", {"weights": "equal"}),
    "diffrate-similarity": ("diffrate", {"weights": "similarity"}),
    "bat": ("bat", {"weights": "attention"}),
    "bat-size": ("bat", {"weights": "size"}),
    "bat-clusters-only": ("bat", {"pairs": 0}),
    "bat-pairs-only": ("bat", {"clusters": 0}),
    "pitome": ("pitome", {"margin": 0.5, "matching": "protect"}),
    "pitome-bipartite": ("pitome", {"margin": 0.5, "matching": "bipartite"}),
    **{
        f"gtp-{score}-{graph}": ("gtp", {"alpha": 0.3, "score": score, "graph": graph})
        for score in ("class", "graph")
        for graph in ("mixed", "spatial", "semantic")
    },
    **{
        f"gtp-patches-{graph}": ("gtp", {"alpha": 0.3, "score": "graph", "graph": graph, "graph_from": "patches"})
        for graph in ("mixed", "spatial", "semantic")
    },
    "gtp-sparse": ("gtp", {"alpha": 0.3, "score": "graph", "graph_from": "patches", "theta": 0.6}),
    "gtp-sparse-class": ("gtp", {"alpha": 0.3, "score": "class", "graph": "spatial", "theta": 0.8}),
}
# Reducers that lose nothing and average: every output token is a mean of input tokens.
PURE_MERGES = (
    "tome",
    "tome-similarity",
    "ppt-pool",
    "bat",
    "bat-size",
    "bat-clusters-only",
    "bat-pairs-only",
    "pitome",
    "pitome-bipartite",
)
WITHOUT_CLASS_TOKEN = ("average-pool", "map-pool", "rms-norm-swiglu")  # kinds of tests/exporter/tiny.py
GTP_PATCHES = ("gtp-patches-mixed", "gtp-patches-spatial", "gtp-patches-semantic", "gtp-sparse")
NEED_NONE = (
    "tome", "tome-similarity", "pitome", "pitome-bipartite",
    "gtp-graph-mixed", "gtp-graph-spatial", "gtp-graph-semantic", *GTP_PATCHES,
)  # fmt: skip


def own_files() -> set[str]:
    """Reducers with a test file of their own, test_NAME.py (`contract.py`), which are not in these cases."""
    return {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")} & set(REDUCERS)


def needs_class(variant: str) -> bool:
    return variant not in NEED_NONE


def make_step(
    variant: str, tokens: Tokens, pick: Pick, block: int = 0, *, exact: bool = False, **more: Any
) -> InnerStep:
    """The variant with counts that fit `tokens` (at least 2 patch tokens; 3 for pairs and clusters alone).

    Args:
        exact: Choose counts and fields for which no comparison is rounded.
        more: Fields to set explicitly.
    """
    reducer, fixed = VARIANTS[variant]
    prefix, n = tokens.prefix, tokens.patches
    fields = dict(fixed)
    if reducer in ("tome", "ppt", "pitome"):
        fields["r"] = pick(1, n // 2)
    elif reducer == "gtp":
        fields |= {"r": pick(1, n - 1), "neighbours": pick(1, 4)}
    elif reducer in ("evit", "topk"):
        fields["tokens_out"] = pick(prefix + 1 + int(fields.get("fuse", False)), prefix + n)
    elif reducer == "diffrate":
        fields["prune_to"] = pick(prefix + 1, prefix + n)
        fields["merge_to"] = pick(prefix + 1, fields["prune_to"])
    else:
        fields |= _bat_counts(variant, prefix, n, pick, exact)
    if exact and reducer == "pitome":
        fields["margin"] = -1.25  # cosines minus it are above 0: no exponential
    if fields.get("tau", 0) is None and "tau" not in more:
        fields["tau"] = 1e-3
    step = step_from_dict({"block": block, "reducer": reducer, **fields, **more})
    assert isinstance(step, InnerStep)
    return step


def _bat_counts(variant: str, prefix: int, n: int, pick: Pick, exact: bool) -> dict[str, int]:
    if variant == "bat-pairs-only":
        inattentive = 0
    else:
        inattentive = pick(1 if variant == "bat-clusters-only" else 0, n)
        if exact and inattentive:  # their mean is taken: dividing by a power of 2 is exact
            inattentive = 2 ** (inattentive.bit_length() - 1)
    clusters = pick(1, inattentive) if inattentive else 0
    pairs = 0 if variant == "bat-clusters-only" else pick(0, (n - inattentive) // 2)
    return {"tokens_out": prefix + n - inattentive - pairs + clusters, "clusters": clusters, "pairs": pairs}


# Rows whose length is a power of 2 (or 0), so that unit rows and cosines are exact; some are parallel or equal.
EXACT_ROWS = [
    [1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, -1], [1, 1, 1, 1], [2, 2, 2, 2],
    [1, -1, 1, -1], [1, 1, -1, -1], [-0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0],
]  # fmt: skip


# Without the zero row: its cosine to itself is 0, but each embedded patch must be its own nearest.
EXACT_PATCHES = np.array(EXACT_ROWS[:-1], dtype=float)


def exact_image(prefix: int, grid: tuple[int, int], draw: Callable[[int, int], Sequence[int]], *, sized: bool) -> Image:
    """Tokens of width 4 with many ties. `draw(count, high)` gives integers from 0 to high."""
    n = grid[0] * grid[1]
    total, heads, most = prefix + n, 2, len(EXACT_ROWS) - 1
    rows = np.array(EXACT_ROWS, dtype=float)
    keys = rows[list(draw(total, most))]
    attention = np.random.default_rng(draw(1, 1000)[0]).integers(1, 5, (1, total, total)) / 64
    attention[0, 0] = np.array(draw(total, 3)) / 64 + 1 / 64  # the row used by most reducers
    size = [1.0] * prefix + [(1.0, 2.0, 0.5, 4.0)[i] for i in (draw(n, 3) if sized else [0] * n)]
    return Image(
        rows[list(draw(total, most))], np.array(size), np.arange(n), prefix, grid,
        np.concatenate([attention] * heads), np.stack([keys] * heads), np.stack([keys[::-1]] * heads),
        EXACT_PATCHES[np.arange(n) % len(EXACT_PATCHES)], np.arange(n),
    )  # fmt: skip


def rough_image(prefix: int, grid: tuple[int, int], rng: np.random.Generator, *, sized: bool) -> Image:
    """Noise; class attention takes few distinct values, so that scores tie."""
    n = grid[0] * grid[1]
    total, heads, width = prefix + n, 3, 5

    def noise(*shape: int) -> np.ndarray:
        return np.asarray(rng.normal(size=shape).astype(np.float32).astype(float))

    attention = rng.exponential(size=(heads, total, total)) ** 2 + 0.01
    attention[:, 0] = rng.choice(attention[0, 0], size=total)
    size = [1.0] * prefix + list(rng.choice([1.0, 2.0, 3.0, 0.7], n) if sized else np.ones(n))
    return Image(
        noise(total, 8), np.array(size), rng.permutation(n), prefix, grid,
        attention / attention.sum(-1, keepdims=True), noise(heads, total, width), noise(heads, total, width),
        noise(n, 6), np.arange(n),
    )  # fmt: skip


def as_stream(images: Sequence[Image], *, sized: bool, shared_places: bool = False) -> Stream:
    """A batch as passed to reducers. `shared_places`: one table of positions for all images."""
    places = [ops.grid_codes(image.positions.tolist(), image.grid[1]) for image in images]
    columns = images[0].grid[1]
    return Stream(
        batch(image.x for image in images),
        images[0].prefix,
        batch(image.size for image in images) if sized else None,
        positions=places[0] if shared_places else torch.cat(places),
        columns=columns,
        links=Links(images),
        code_index=code_index(images[0].embedded_at.tolist(), columns),
    )


class Links(dict[tuple[str, int], torch.Tensor]):
    """Graphs of the embedded patches, each computed on demand."""

    def __init__(self, images: Sequence[Image]) -> None:
        super().__init__()
        self.images = images

    def __missing__(self, asked: tuple[str, int]) -> torch.Tensor:
        first = self.images[0]
        places, more = first.embedded_at.tolist(), 1 if first.prefix else 2
        graph = TokenGraph(places, first.grid[1], asked[0], asked[1] + more, 0)
        self[asked] = graph(batch(image.embedded for image in self.images))
        return self[asked]


def as_statistics(images: Sequence[Image]) -> AttentionStatistics:
    """Attention statistics of a batch, rounded to float32 once."""
    rows = [range(len(image.x)) for image in images]
    graph = [image.attention.diagonal(axis1=1, axis2=2).max(0) * image.attention.sum(1).max(0) for image in images]
    return AttentionStatistics(
        batch([image.class_attention(j) for j in row] for image, row in zip(images, rows, strict=True)),
        batch(image.keys.sum(0) for image in images),
        batch([image.value_norm(j) for j in row] for image, row in zip(images, rows, strict=True)),
        batch(graph),
    )


def batch(arrays: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(array, dtype=np.float32) for array in arrays]))


def tau_between(images: Sequence[Image]) -> float:
    """A tau for ppt in the widest gap between the images' variances, so that both policies occur."""
    scores = [np.array([image.class_attention(j) * image.value_norm(j) for j in image.patches]) for image in images]
    return widest_gap([float((score / score.sum()).var(ddof=1)) for score in scores])


def widest_gap(values: Sequence[float]) -> float:
    """Midpoint of the widest gap between neighbouring values."""
    return max((high - low, (low + high) / 2) for low, high in pairwise(sorted(values)))[1]


def score_variances(model: ReducedViT, block: int, images: torch.Tensor) -> list[float]:
    """The variance that ppt compares with tau at a block, for each image."""
    spread: list[float] = []

    def look(_module: object, _args: object, statistics: AttentionStatistics) -> None:
        assert statistics.class_attention is not None
        assert statistics.value_norm is not None
        score = (statistics.class_attention * statistics.value_norm)[:, model.description.prefix_tokens :]
        spread.extend((score / score.sum(1, keepdim=True)).var(1).tolist())

    hook = model.blocks[block].statistics.register_forward_hook(look)
    with torch.no_grad():
        model(images)
    hook.remove()
    return spread


@cache
def model_of(kind: str) -> tuple[nn.Module, ModelSpec]:
    """`tiny_vit`, created once; its parameters must not be modified."""
    return tiny_vit(kind)


def make_plan(
    description: ModelSpec, variants: dict[int, str], pick: Pick, *, proportional: bool = False, **more: Any
) -> ReductionPlan:
    """A plan with a variant in each block; `more` is passed to every step."""
    tokens = Tokens(description.prefix_tokens, description.patches, tuple(range(description.patches)))
    steps = []
    for block, variant in sorted(variants.items()):
        if tokens.patches < 3:
            break
        steps.append(make_step(variant, tokens, pick, block, **more))
        tokens = steps[-1].apply(tokens)
    return ReductionPlan(PlanModel.of(description), tuple(steps), proportional_attention=proportional)


def middle(low: int, high: int) -> int:
    """A `Pick` of moderate counts: a third of the way up from half."""
    return max(low, min(high, (low + 2 * high) // 3))
