"""The default reducers of each method against authors.py, an independent reading of the papers' code.

Tokens, their order, sizes and positions must agree with the authors' by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.exporter.reducers import authors
from tests.exporter.reducers.cases import as_statistics, as_stream, model_of, rough_image
from tests.exporter.reducers.oracles import Image
from vp_exporter.methods import MethodRequest, build_plan
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers import REDUCERS, InnerStep, ops
from vp_exporter.reducers.stream import reduce_tokens
from vp_exporter.rewrite.attention_statistics import attention_map

CLEAR = 1e-5  # relative difference that float32 can resolve in one step
GRID = (4, 5)

Author = Callable[[Image, InnerStep], authors.Reduced]


@pytest.fixture(scope="module")
def description() -> ModelSpec:
    return model_of("class-token")[1]


def made(method: str, description: ModelSpec, block: int = 0, **fields: Any) -> InnerStep:
    """The step that the method creates at a block."""
    step = REDUCERS[method].new(block, fields, description)
    assert isinstance(step, InnerStep)
    return step


def compare(step: InnerStep, author: Author, *, prefix: int = 1, sized: bool = True, images: int = 40) -> None:
    """Compare all images whose decisions float32 can resolve; only few may be skipped."""
    count: Counter[str] = Counter()
    for seed in range(images):
        image = rough_image(prefix, GRID, np.random.default_rng(seed), sized=sized)
        # The authors may break ties either way: make all scores different.
        image.attention[:, 0] += np.random.default_rng(seed + 1000).uniform(0, 0.01, len(image.x))
        stream = as_stream([image], sized=sized)
        out = reduce_tokens(stream, step.choose(stream, as_statistics([image])), carry_size=True)
        x, size, positions = author(image, step)
        count["images"] += 1
        if image.margin < CLEAR:
            count["skipped"] += 1
            continue
        assert out.positions is not None
        assert out.positions[0].tolist() == ops.grid_codes(positions.tolist(), GRID[1])[0].tolist()
        np.testing.assert_allclose(out.x[0].numpy(), x, atol=1e-5, rtol=2e-5)
        sizes = np.ones(len(x)) if out.size is None else out.size[0].numpy()
        np.testing.assert_allclose(sizes, np.maximum(size, 1e-6), rtol=1e-5, atol=1e-6)
    assert count["skipped"] <= 0.1 * count["images"], count


def ascending(image: Image, result: authors.Reduced, count: int) -> authors.Reduced:
    """The first `count` patch tokens in sequence order, as in our output if the order does not matter later."""
    x, size, positions = result
    place = {int(position): at for at, position in enumerate(image.positions)}
    order = sorted(range(count), key=lambda row: place[int(positions[row])]) + list(range(count, len(positions)))
    rows = [*range(image.prefix), *(image.prefix + row for row in order)]
    return x[rows], size[rows], positions[order]


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_pitome(description: ModelSpec, last: bool, sized: bool) -> None:
    """The first and the last block use different algorithms."""
    block, depth = (description.depth - 1 if last else 0), description.depth
    margin, half = authors.pitome_margin(block, depth), authors.pitome_half(block, depth)
    step = made("pitome", description, block, r=6)
    protected = 20 - 2 * 6 if last else 0
    compare(step, lambda image, _: ascending(image, authors.pitome(image, 6, margin, half), protected), sized=sized)


def test_pitome_without_a_class_token(description: ModelSpec) -> None:
    step = made("pitome", description, r=10)
    compare(step, lambda image, _: authors.pitome(image, 10, authors.pitome_margin(0, 4), "first"), prefix=0)


def test_pitome_halves_and_margins(description: ModelSpec) -> None:
    plan = build_plan(MethodRequest("pitome", r=1), description)
    depth = description.depth
    words = {"first": "bipartite", "second": "protect"}
    assert [step.fields()["matching"] for step in plan.steps] == [
        words[authors.pitome_half(block, depth)] for block in range(depth)
    ]
    assert [step.fields()["margin"] for step in plan.steps] == pytest.approx(
        [authors.pitome_margin(block, depth) for block in range(depth)], abs=1e-6
    )
    assert plan.proportional_attention == authors.PITOME_PROPORTIONAL_ATTENTION


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(("prune_to", "merge_to"), [(15, 9), (20, 12), (11, 11), (20, 1)])
def test_diffrate(description: ModelSpec, prune_to: int, merge_to: int, sized: bool) -> None:
    step = made("diffrate", description, prune_to=1 + prune_to, merge_to=1 + merge_to)

    compare(
        step,
        lambda image, _: ascending(image, authors.diffrate(image, prune_to, merge_to), merge_to),
        sized=sized,
    )
    assert step.proportional == authors.DIFFRATE_PROPORTIONAL_ATTENTION


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("neighbours", [1, 4, 8])
def test_gtp(description: ModelSpec, neighbours: int, sized: bool) -> None:
    step = made("gtp", description, r=7, neighbours=neighbours)
    compare(
        step,
        lambda image, _: authors.gtp(image, 7, authors.GTP_ALPHA, image.embedded, neighbours),
        sized=sized,
    )


def test_gtp_defaults(description: ModelSpec) -> None:
    plan = build_plan(MethodRequest("gtp", r=1), description)
    fields = plan.steps[0].fields()
    assert (fields["alpha"], fields["neighbours"], fields["theta"]) == (
        authors.GTP_ALPHA,
        authors.GTP_NEIGHBOURS,
        authors.GTP_THETA,
    )
    assert plan.proportional_attention == authors.GTP_PROPORTIONAL_ATTENTION


@pytest.mark.parametrize("theta", [1.0, 0.9, 0.6, 0.1])
def test_gtp_attention(theta: float) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 3, 9, 8)).astype(np.float32)
    size = rng.uniform(1, 4, 9).astype(np.float32)
    logits = q @ k.transpose(0, 2, 1) / 8**0.5
    mine = attention_map(
        torch.from_numpy(q)[None], torch.from_numpy(k)[None], torch.from_numpy(size).log()[None], theta
    )
    theirs = authors.gtp_attention(logits, theta, size)
    np.testing.assert_allclose(mine[0].numpy(), theirs, atol=1e-6)
    assert (mine[0] == 0).sum() == (theirs == 0).sum()


@pytest.mark.parametrize("sized", [True, False])
def test_ppt(description: ModelSpec, sized: bool) -> None:
    """Both policies: tau below every variance, then above."""
    prunes, pools = (made("ppt", description, r=8, tau=tau) for tau in (0.0, 1e9))
    compare(prunes, lambda image, _: authors.ppt_prune(image, 20 - 8), sized=sized)
    compare(pools, lambda image, _: authors.ppt_pool(image, 8), sized=sized)
    assert prunes.proportional == authors.PPT_PROPORTIONAL_ATTENTION


def test_ppt_chooses_as_they_do(description: ModelSpec) -> None:
    images = [rough_image(1, GRID, np.random.default_rng(seed), sized=False) for seed in range(30)]
    tau = float(np.median([authors.ppt_scores(image).var(ddof=1) for image in images]))
    step = made("ppt", description, r=8, tau=tau)
    stream = as_stream(images, sized=False)
    merge = step.choose(stream, as_statistics(images)).merge
    assert merge is not None
    assert merge.source_weight is not None
    found = ["pool" if weight else "prune" for weight in merge.source_weight[:, 0].tolist()]
    wanted = [authors.ppt_policy(image, tau) for image in images]
    assert [f for f, image in zip(found, images, strict=True) if image.margin >= CLEAR] == [
        w for w, image in zip(wanted, images, strict=True) if image.margin >= CLEAR
    ]
    assert set(wanted) == {"pool", "prune"}


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tome(prefix: int) -> None:
    """Without a prefix token their code sorts the rest of A by similarity, which affects later pairings."""
    kind = "class-token" if prefix else "average-pool"
    step = made("tome", model_of(kind)[1], r=7)
    compare(step, lambda image, _: authors.tome(image, 7), prefix=prefix)
    assert step.proportional == authors.TOME_PROPORTIONAL_ATTENTION


@pytest.mark.parametrize(("schedule", "inflect"), [("constant", 0), ("decreasing", -1), ("increasing", 1)])
@pytest.mark.parametrize("r", [1, 2, 7, 13, 16])
def test_tome_schedule(r: int, schedule: str, inflect: int) -> None:
    from vp_exporter.methods.schedule import counts_of

    for depth in (4, 12, 24, 32):
        assert counts_of(schedule, depth, r) == authors.tome_schedule(depth, r, inflect)
