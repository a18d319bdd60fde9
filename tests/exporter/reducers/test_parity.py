"""Every reducer against its oracle in oracles.py, alone and in a whole model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.exporter.reducers.cases import (
    VARIANTS,
    WITHOUT_CLASS_TOKEN,
    as_statistics,
    as_stream,
    exact_image,
    make_plan,
    make_step,
    middle,
    model_of,
    needs_class,
    rough_image,
    score_variances,
    tau_between,
    widest_gap,
)
from tests.exporter.reducers.oracle_model import run
from tests.exporter.reducers.oracles import ORACLES, Image
from tests.exporter.rewrite.test_reduced_vit import images_for
from tests.exporter.tiny import DEPTH, KINDS
from tests.pairwise import thinned
from vp_exporter.errors import PlanError
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers import InnerStep, Tokens, ops, step_from_dict
from vp_exporter.reducers.stream import reduce_tokens
from vp_exporter.rewrite.attention import AttentionForm
from vp_exporter.rewrite.reduced_vit import ReducedViT

CLEAR = 1e-5  # relative difference that float32 can resolve in one step
CLEAR_IN_MODEL = 5e-5  # likewise, after several blocks
CLOSE = {"atol": 1e-4, "rtol": 1e-5}
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


def check_step(step: InnerStep, images: list[Image], *, sized: bool, shared: bool, clear: float = 0.0) -> int:
    """Compare tokens, order, sizes and positions of every image; returns the number of near-ties skipped."""
    fields = step.fields()
    stream = as_stream(images, sized=sized, shared_places=shared)
    out = reduce_tokens(stream, step.choose(stream, as_statistics(images)), carry_size=True)
    skipped = 0
    for at, image in enumerate(images):
        x, size, positions = ORACLES[step.reducer](image, **fields)
        if image.margin < clear:
            skipped += 1
            continue
        places = ops.grid_codes(positions.tolist(), image.grid[1])[0]
        assert out.positions is not None
        assert out.positions[at if len(out.positions) > 1 else 0].tolist() == places.tolist()
        assert out.x[at].shape == x.shape
        np.testing.assert_allclose(out.x[at].numpy(), x, atol=2e-6 * max(1.0, np.abs(x).max()), rtol=2e-5)
        sizes = np.ones(len(x)) if out.size is None else out.size[at].numpy()
        np.testing.assert_allclose(sizes, size, rtol=1e-6)
    return skipped


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_and_order_exactly(variant: str) -> None:
    """Equal scores, and equal, parallel and zero keys: no rounding, so no image is skipped."""

    @settings(QUIET, max_examples=60)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        def draw(count: int, high: int) -> list[int]:
            return data.draw(st.lists(st.integers(0, high), min_size=count, max_size=count))

        def pick(low: int, high: int) -> int:
            return data.draw(st.integers(low, high))

        prefix, grid = pick(1 if needs_class(variant) else 0, 3), (pick(1, 3), pick(3, 4))
        sized = data.draw(st.booleans())
        images = [exact_image(prefix, grid, draw, sized=sized) for _ in range(2)]
        step = make_step(variant, Tokens(prefix, grid[0] * grid[1], None), pick, exact=True)
        check_step(step, images, sized=sized, shared=data.draw(st.booleans()))

    check()


@pytest.mark.parametrize("variant", ["ppt-prune", "ppt-mixed", "ppt-pool"])
def test_values_without_any_length(variant: str) -> None:
    """Scores of 0 have no shares, and so no variance below tau."""
    images = [exact_image(1, (2, 4), lambda count, high: [high] * count, sized=False) for _ in range(2)]
    assert not images[0].values.any()
    step = make_step(variant, Tokens(1, 8, None), middle, exact=True)
    check_step(step, images, sized=False, shared=False)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_noise(variant: str) -> None:
    count: Counter[str] = Counter()

    @settings(QUIET, max_examples=40)
    @given(seed=st.integers(0, 2**32 - 1), prefix=st.integers(1 if needs_class(variant) else 0, 3), sized=st.booleans())
    def check(seed: int, prefix: int, sized: bool) -> None:
        rng = np.random.default_rng(seed)
        grid = (int(rng.integers(1, 5)), int(rng.integers(3, 6)))
        images = [rough_image(prefix, grid, rng, sized=sized) for _ in range(3)]
        more = {"tau": tau_between(images)} if variant == "ppt-mixed" else {}
        step = make_step(
            variant, Tokens(prefix, grid[0] * grid[1], None), lambda a, b: int(rng.integers(a, b + 1)), **more
        )
        count["skipped"] += check_step(step, images, sized=sized, shared=False, clear=CLEAR)
        count["images"] += len(images)

    check()
    assert count["images"] >= 100
    assert count["skipped"] <= 0.05 * count["images"], count


def check_model(kind: str, plan: ReductionPlan, images: torch.Tensor, forms: tuple[AttentionForm, ...] = ()) -> int:
    """Compare tokens of every block and logits, as built and as lowered in `forms`; returns the number of near-ties."""
    vit, description = model_of(kind)
    reduced = ReducedViT(vit, description, plan)
    kept, truth = [], []
    for at, image in enumerate(images):
        margins: list[float] = []
        tokens, logits = run(vit, description, plan, image, margins)
        if min(margins, default=math.inf) >= CLEAR_IN_MODEL:
            kept.append(at)
            truth.append((tokens, logits))
    with torch.no_grad():
        for twin in (reduced, *(reduced.for_export("fp32", form) for form in forms)):
            blocks, out = twin.block_tokens(images), twin(images)
            for at, (tokens, logits) in zip(kept, truth, strict=True):
                for block, mine in enumerate(blocks):
                    torch.testing.assert_close(
                        mine[at].double(), tokens[block], **CLOSE, msg=lambda m, b=block: f"block {b}: {m}"
                    )
                torch.testing.assert_close(out[at].double(), logits, **CLOSE)
    return len(images) - len(kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant"),
    thinned(
        [(k, v) for k in KINDS for v in VARIANTS if k not in WITHOUT_CLASS_TOKEN or not needs_class(v)],
        lambda kind, variant: {variant, (kind, VARIANTS[variant][0])},
    ),
)
def test_whole_model(kind: str, variant: str) -> None:
    """At blocks 1 and 2, without and with proportional attention, in every form of attention.

    By default every kind of model with every reducer, and every variant once.
    """
    _, description = model_of(kind)
    for proportional in (False, True):
        plan = make_plan(description, {1: variant, 2: variant}, middle, proportional=proportional)
        assert len(plan.steps) == 2
        forms: tuple[AttentionForm, ...] = ("sdpa", "packed", "explicit") if proportional else ()
        assert check_model(kind, plan, images_for(description), forms) <= 1


@pytest.mark.parametrize("kind", ["class-token", "distilled"])
def test_ppt_decides_for_each_image(kind: str) -> None:
    """Some images of the batch merge and the others prune: tau is in the widest gap between their variances."""
    vit, description = model_of(kind)
    images = images_for(description, 6)
    dropping = ReducedViT(vit, description, make_plan(description, {1: "ppt-prune"}, middle))
    spread = score_variances(dropping, 1, images)
    tau = widest_gap(spread)
    plan = make_plan(description, {1: "ppt-mixed"}, middle, proportional=True, tau=tau)
    assert check_model(kind, plan, images) <= 1
    with torch.no_grad():
        mixed, *pure = (
            ReducedViT(vit, description, make_plan(description, {1: "ppt-mixed"}, middle, proportional=True, tau=t))(
                images
            )
            for t in (tau, 0.0, 1e9)
        )
    merges = [bool(torch.allclose(row, other, atol=1e-6)) for row, other in zip(mixed, pure[1], strict=True)]
    assert merges == [value < tau for value in spread]
    assert len(set(merges)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class-token", "registers-swiglu", "average-pool-fc-norm-class-token", "distilled"])
def test_any_plan(kind: str) -> None:
    """Any reducer at any block, after static steps and under key biases."""
    _, description = model_of(kind)
    count: Counter[str] = Counter()

    @settings(QUIET, max_examples=15)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        chosen = data.draw(st.dictionaries(st.integers(0, DEPTH - 1), st.sampled_from(list(VARIANTS)), min_size=1))
        seed = data.draw(st.integers(0, 1000))
        rng = np.random.default_rng(seed)
        plan = make_plan(
            description,
            chosen,
            lambda a, b: int(rng.integers((a + b) // 2, b + 1)),
            proportional=data.draw(st.booleans()),
        )
        if data.draw(st.booleans()):
            plan = with_static_front(plan, rng)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, *description.image_size, generator=generator)
        count["skipped"] += check_model(kind, plan, images)
        count["images"] += 2

    check()
    assert count["images"] >= 30
    assert count["skipped"] <= 0.2 * count["images"], count


def with_static_front(plan: ReductionPlan, rng: np.random.Generator) -> ReductionPlan:
    """The plan with one in five patches dropped at its first block, and key biases everywhere."""
    model, first = plan.model, plan.steps[0].block
    keep = sorted(rng.permutation(model.patches)[: model.patches - model.patches // 5].tolist())
    steps = [step_from_dict({"block": first, "reducer": "static", "keep": keep})]
    tokens = steps[0].apply(Tokens(model.prefix_tokens, model.patches, tuple(range(model.patches))))
    for step in plan.steps:
        try:
            tokens = step.apply(tokens)
        except PlanError:  # needs more tokens than the static step leaves
            continue
        steps.append(step)
    plan = replace(plan, steps=tuple(steps))
    bias = {block: rng.normal(size=row.attention) for block, row in enumerate(plan.tokens())}
    return replace(plan, key_bias={block: tuple(row.tolist()) for block, row in bias.items()})
