"""Properties of every reducer on any tokens: sizes, hulls, prefix tokens, batches, ties, counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.exporter.reducers.cases import (
    PURE_MERGES,
    VARIANTS,
    WITHOUT_CLASS_TOKEN,
    as_statistics,
    as_stream,
    make_plan,
    make_step,
    middle,
    model_of,
    needs_class,
    rough_image,
    tau_between,
)
from tests.exporter.reducers.oracle_model import run
from tests.exporter.reducers.oracles import ORACLES, Image
from tests.exporter.reducers.test_parity import CLEAR, CLEAR_IN_MODEL
from tests.exporter.rewrite.test_reduced_vit import images_for
from tests.exporter.tiny import DEPTH, KINDS
from vp_exporter.model.describe import describe
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.reducers import InnerStep, Tokens, ops, step_from_dict
from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens
from vp_exporter.rewrite.reduced_vit import ReducedViT

QUIET = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)
# Every output row is a mean, or an unchanged token.
MEANS = (
    *PURE_MERGES,
    "diffrate",
    "diffrate-similarity",
    "ppt-prune",
    "ppt-prune-position",
    "ppt-mixed",
    "topk",
    "topk-ats",
    "evit",
)


def drawn(
    variant: str, seed: int, *, sized: bool = True, **more: float
) -> tuple[InnerStep, Stream, AttentionStatistics]:
    """A step, and four images of noise for it."""
    step, images = drawn_images(variant, seed, sized=sized, **more)
    return step, as_stream(images, sized=sized), as_statistics(images)


def drawn_images(variant: str, seed: int, *, sized: bool = True, **more: float) -> tuple[InnerStep, list[Image]]:
    rng = np.random.default_rng(seed)
    prefix = int(rng.integers(1 if needs_class(variant) else 0, 6))
    grid = (int(rng.integers(1, 5)), int(rng.integers(3, 6)))
    images = [rough_image(prefix, grid, rng, sized=sized) for _ in range(4)]
    if variant == "ppt-mixed":
        more["tau"] = tau_between(images)
    tokens = Tokens(prefix, grid[0] * grid[1], None)
    step = make_step(variant, tokens, lambda low, high: int(rng.integers(low, high + 1)), **more)
    return step, images


def reduced(step: InnerStep, stream: Stream, statistics: AttentionStatistics) -> Stream:
    return reduce_tokens(stream, step.choose(stream, statistics), carry_size=True)


@pytest.mark.parametrize("variant", [*PURE_MERGES, "evit-fuse", "gtp-class-semantic", "gtp-graph-semantic"])
@QUIET
@given(seed=seeds, sized=st.booleans())
def test_sizes_add_up(variant: str, seed: int, sized: bool) -> None:
    """Output sizes sum to the number of input patches (gtp: at alpha 1, if every token has a neighbour)."""
    more = {"alpha": 1.0} if variant.startswith("gtp") else {}
    step, stream, statistics = drawn(variant, seed, sized=sized, **more)
    before = torch.full((4,), float(stream.x.shape[1])) if stream.size is None else stream.size.sum(1)
    out = reduced(step, stream, statistics)
    after = torch.full((4,), float(out.x.shape[1])) if out.size is None else out.size.sum(1)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("variant", MEANS)
@QUIET
@given(seed=seeds, sized=st.booleans())
def test_what_leaves_lies_in_the_hull_of_what_came(variant: str, seed: int, sized: bool) -> None:
    """With the identity as tokens, the output is the weights themselves."""
    step, stream, statistics = drawn(variant, seed, sized=sized)
    tokens = stream.x.shape[1]
    identity = replace(stream, x=torch.eye(tokens).expand(4, -1, -1))
    weights = reduce_tokens(identity, step.choose(stream, statistics), carry_size=True).x
    assert weights.min() >= -1e-6
    torch.testing.assert_close(weights.sum(2), torch.ones(weights.shape[:2]))
    homes = (weights > 1e-6).sum(1)
    assert (homes <= 1).all()
    if variant in PURE_MERGES:
        assert (homes == 1).all()  # nothing is lost


@pytest.mark.parametrize("variant", VARIANTS)
@QUIET
@given(seed=seeds, sized=st.booleans())
def test_prefix_tokens_stay_in_front_untouched(variant: str, seed: int, sized: bool) -> None:
    step, stream, statistics = drawn(variant, seed, sized=sized)
    out, prefix = reduced(step, stream, statistics), stream.prefix
    assert torch.equal(out.x[:, :prefix], stream.x[:, :prefix])
    assert out.size is None or (out.size[:, :prefix] == 1).all()
    assert out.prefix == prefix
    assert out.patches == step.apply(Tokens(prefix, stream.patches, None)).patches


def at(statistics: AttentionStatistics, index: torch.Tensor) -> AttentionStatistics:
    return AttentionStatistics(**{name: value[index] for name, value in vars(statistics).items() if value is not None})


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@QUIET
@given(seed=seeds)
def test_images_do_not_see_each_other(variant: str, seed: int) -> None:
    """A permuted batch gives permuted results, and an image alone makes the same choice, except for near-ties.

    Vectorised code may add in another order, or round differently at the end of a tensor.
    """
    step, images = drawn_images(variant, seed)
    for image in images:
        ORACLES[step.reducer](image, **step.fields())
    clear = torch.tensor([image.margin >= CLEAR for image in images])
    stream, statistics = as_stream(images, sized=True), as_statistics(images)
    out = reduced(step, stream, statistics)
    assert out.positions is not None
    assert out.size is not None
    assert stream.positions is not None
    assert stream.size is not None
    for chosen in (torch.tensor([2, 0, 3, 1]), torch.tensor([1])):
        part = replace(stream, x=stream.x[chosen], size=stream.size[chosen], positions=stream.positions[chosen])
        if stream.links:
            part = replace(part, links={key: t[chosen] if len(t) > 1 else t for key, t in stream.links.items()})
        mine = reduced(step, part, at(statistics, chosen))
        assert mine.positions is not None
        assert mine.size is not None
        sure, mine_sure = chosen[clear[chosen]], clear[chosen]
        assert torch.equal(mine.positions[mine_sure], out.positions[sure])
        torch.testing.assert_close(mine.x[mine_sure], out.x[sure])
        torch.testing.assert_close(mine.size[mine_sure], out.size[sure])


# For 8 equal patch tokens after a class token: fields, output positions, sizes.
EQUAL = {
    "tome": ({"r": 3}, [7, 0, 2, 4, 6], [1, 4, 1, 1, 1]),
    "ppt": ({"r": 3, "tau": 1.0}, [7, 0, 2, 4, 6], [1, 4, 1, 1, 1]),
    "evit": ({"tokens_out": 5, "fuse": True}, [0, 1, 2, 3], [1, 1, 1, 5]),
    "topk": ({"tokens_out": 5}, [0, 1, 2, 3], [1, 1, 1, 1]),
    "diffrate": ({"prune_to": 7, "merge_to": 5}, [0, 1, 2, 3], [3, 1, 1, 1]),
    "bat": ({"tokens_out": 6, "clusters": 2, "pairs": 1}, [2, 1, 3, 4, 5], [1, 2, 1, 3, 1]),
    "pitome": ({"r": 3, "margin": 0.5}, [6, 7, 1, 3, 5], [1, 1, 4, 1, 1]),
    "gtp": ({"r": 3, "alpha": 1.0, "graph": "semantic", "neighbours": 1}, [0, 1, 2, 3, 4], [1.6] * 5),
}


@pytest.mark.parametrize("reducer", EQUAL)
def test_ties_go_to_the_lowest_index(reducer: str) -> None:
    fields, positions, sizes = EQUAL[reducer]
    step = step_from_dict({"block": 0, "reducer": reducer, **fields})
    assert isinstance(step, InnerStep)
    stream = Stream(torch.ones(2, 9, 4), 1, positions=ops.grid_codes(list(range(8)), 8), columns=8)
    out = reduced(
        step, stream, AttentionStatistics(torch.ones(2, 9) / 9, torch.ones(2, 9, 4), torch.ones(2, 9), torch.ones(2, 9))
    )
    assert out.positions is not None
    assert out.positions.tolist() == [positions] * 2
    size = torch.ones(2, out.x.shape[1]) if out.size is None else out.size
    torch.testing.assert_close(size[:, 1:], torch.tensor([sizes] * 2).float())


# whole models


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_as_many_as_the_plan_says(kind: str) -> None:
    vit, description = model_of(kind)
    fitting = [v for v in VARIANTS if description.class_token or not needs_class(v)]

    @settings(QUIET, max_examples=10)
    @given(chosen=st.dictionaries(st.integers(0, DEPTH - 1), st.sampled_from(fitting)), seed=seeds)
    def check(chosen: dict[int, str], seed: int) -> None:
        rng = np.random.default_rng(seed)
        plan = make_plan(description, chosen, lambda low, high: int(rng.integers(low, high + 1)))
        images = images_for(description)
        with torch.no_grad():
            blocks = ReducedViT(vit, description, plan).block_tokens(images)
        assert [list(x.shape) for x in blocks] == [[2, row.mlp, description.embed_dim] for row in plan.tokens()]

    check()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_again_is_the_same_and_the_batch_does_not_matter(variant: str) -> None:
    vit, description = model_of("class-token")
    plan = make_plan(description, {1: variant, 2: variant}, middle, proportional=True)
    model, clear = ReducedViT(vit, description, plan), []
    for image in images_for(description, 8):
        margins: list[float] = []
        run(vit, description, plan, image, margins)
        # else another batch may choose differently, and be equally right
        if min(margins, default=np.inf) >= CLEAR_IN_MODEL:
            clear.append(image)
    assert len(clear) >= 5
    images = torch.stack(clear[:5])
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(model(images), logits)
        mixed = torch.tensor([3, 1, 4, 0, 2])
        torch.testing.assert_close(model(images[mixed]), logits[mixed], atol=1e-5, rtol=1e-5)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_steps_it_is_the_dense_model(kind: str) -> None:
    vit, description = model_of(kind)
    images = images_for(description)
    plan = ReductionPlan(PlanModel.of(description), proportional_attention=True)
    with torch.no_grad():
        assert torch.equal(ReducedViT(vit, description, plan)(images), ReducedViT(vit, description)(images))


@pytest.mark.parametrize("proportional", [False, True])
def test_sizes_of_a_whole_model_add_up(proportional: bool) -> None:
    vit, description = model_of("registers-swiglu")
    chosen = {0: "tome", 1: "bat-size", 2: "pitome", 3: "ppt-pool"}
    model = ReducedViT(vit, description, make_plan(description, chosen, middle, proportional=proportional))
    total = float(description.prefix_tokens + description.patches)
    with torch.no_grad():
        for stream in model._streams(images_for(description)):
            assert stream.size is not None
            torch.testing.assert_close(stream.size.sum(1), torch.full((2,), total))


@pytest.mark.parametrize("kind", [*WITHOUT_CLASS_TOKEN, "class-token", "average-pool-fc-norm-class-token", "eva"])
def test_merging_equal_tokens_changes_nothing_under_proportional_attention(kind: str) -> None:
    """Two equal tokens and one of size 2 are equivalent in every later softmax and average."""
    vit, description = model_of(kind)
    vit = copy.deepcopy(vit)
    images, side = images_for(description), description.patch_size[0]
    cells = images.reshape(2, 3, description.grid[0], side, description.grid[1], side)
    for column in range(0, description.grid[1] - 1, 2):
        cells[:, :, :, :, column + 1] = cells[:, :, :, :, column]
    with torch.no_grad():
        if vit.pos_embed is not None:
            vit.pos_embed.zero_()
        steps = (step_from_dict({"block": 1, "reducer": "tome", "r": description.patches // 5}),)
        plan = ReductionPlan(PlanModel.of(description), steps, proportional_attention=True)
        dense, *merged = (
            ReducedViT(vit, description, p)(images) for p in (None, plan, replace(plan, proportional_attention=False))
        )
    torch.testing.assert_close(merged[0], dense, atol=2e-5, rtol=2e-5)
    assert (merged[1] - dense).abs().max() > 1e-4  # without sizes in the logits it is another function


# multiply-accumulates


@pytest.fixture(scope="module")
def deit() -> ReducedViT:
    torch.manual_seed(0)
    name = "deit_small_patch16_224"
    vit = timm.create_model(name)
    return ReducedViT(vit, describe(vit, name))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reducer_adds_little_to_the_counted_macs(deit: ReducedViT, variant: str) -> None:
    """torch's counter agrees with count_macs, plus only the products of the reducers themselves."""
    description = deit.description
    plan = make_plan(description, {3: variant, 6: variant, 9: variant}, lambda low, high: max(low, min(high, 60)))
    assert len(plan.steps) == 3
    model = ReducedViT(deit.vit, description, plan).for_export("fp32", "explicit")
    with FlopCounterMode(display=False, depth=99) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *description.image_size))
    counts = counter.get_flop_counts()
    own = sum(
        sum(counts.get(f"ReducedViT.blocks.{step.block}.{part}", {}).values())
        for step in plan.steps
        for part in ("statistics", "reduce")
    ) + sum(counts.get("ReducedViT.graphs.0", {}).values())
    base = count_macs(description, plan).total
    assert counter.get_total_flops() - own == 2 * base
    assert 0 < own <= 2 * base * (0.03 if "graph-" in variant else 0.01)
