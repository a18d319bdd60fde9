"""Scores against a plain loop over the models, with and without shared prefixes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exporter.searching.samples import calibrated, images, scorer
from tests.exporter.tiny import random_plan
from vp_exporter.errors import SearchError
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep, step_from_dict
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.calibration import Calibration, split
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.mask.encoding import counts_of, life_of, mask_of, plan_of, same_until
from vp_exporter.searching.scoring import block_keys, kl, merit, settled


def naive_kl(dense: torch.Tensor, reduced: torch.Tensor) -> list[float]:
    found = []
    for a, b in zip(dense.double().tolist(), reduced.double().tolist(), strict=True):
        p = [math.exp(x) for x in a]
        q = [math.exp(x) for x in b]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        found.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return found


def plans_of(model) -> list[ReductionPlan]:
    """Static, tuned, and data-dependent plans with shared prefixes of different length."""
    static = random_plan(model, scales=True)
    tome = [{"block": 1, "reducer": "tome", "r": 3}, {"block": 2, "reducer": "tome", "r": 2}]
    mixed = [{"block": 0, "reducer": "static", "keep": list(range(12))}, *tome]
    gtp = {"block": 2, "reducer": "gtp", "r": 2, "alpha": 0.1}
    found = [ReductionPlan(model), static, random_plan(model)]
    for steps in (tome[:1], tome, mixed, [*mixed[:1], *tome[1:]]):
        for proportional in (False, True):
            made = tuple(step_from_dict(step) for step in steps)
            found.append(ReductionPlan(model, made, proportional_attention=proportional))
    found.append(ReductionPlan(model, (step_from_dict(tome[0]), step_from_dict(gtp))))
    return found


@pytest.mark.parametrize("kind", ["class-token", "average-pool", "distilled"])
def test_losses_are_those_of_the_models(kind: str) -> None:
    score = scorer(kind)
    calibration = score.calibration
    plan = random_plan(PlanModel.of(score.description))
    batches = calibration.search
    got = score.losses(plan, batches)
    with torch.no_grad():
        pictures = torch.cat([calibration.images(batch) for batch in batches])
        dense = ReducedViT(score.vit, score.description)(pictures)
        reduced = ReducedViT(score.vit, score.description, plan)(pictures)
    np.testing.assert_allclose(got.numpy(), naive_kl(dense, reduced), rtol=1e-4, atol=1e-9)
    found = score.score(plan, batches)
    assert found.kl == pytest.approx(float(got.mean()))
    assert found.agreement == pytest.approx(100 * float((dense.argmax(1) == reduced.argmax(1)).float().mean()))
    labels = torch.cat([calibration.labels(batch) for batch in batches])
    assert found.top1 == pytest.approx(100 * float((reduced.argmax(1) == labels).float().mean()))
    assert score.evaluations == 1, "the second question was answered from the memo"


def test_a_shared_prefix_changes_no_answer_and_is_not_computed_again() -> None:
    plain, quick = scorer(), scorer()
    batches = plain.calibration.search
    plans = plans_of(PlanModel.of(plain.description))
    expected = [plain.logits(plan, batches) for plan in plans]
    assert plain.blocks_run == plain.blocks_asked
    for remembered in plans:
        quick.remember(remembered, batches)
        quick.memo.clear()
        for plan, want in zip(plans, expected, strict=True):
            assert torch.equal(quick.logits(plan, batches), want), (remembered.steps, plan.steps)
    assert quick.blocks_run < quick.blocks_asked
    quick.forget()
    quick.memo.clear()
    assert torch.equal(quick.logits(plans[1], batches), expected[1])


def test_candidates_that_differ_late_run_late_blocks_only() -> None:
    score = scorer()
    description, batches = score.description, score.calibration.search
    life = np.full(description.patches, description.depth)
    life[:4], life[4:8] = 3, 0
    other = life.copy()
    other[0], other[15] = life[15], life[0]  # differs from block 3 on
    assert same_until(life, other) == 3
    score.remember(plan_of(life, description), batches)
    before = score.blocks_run
    score.losses(plan_of(other, description), batches)
    assert score.blocks_run - before == len(batches)


def test_keys_name_what_decides() -> None:
    model = PlanModel.of(scorer().description)
    plans = plans_of(model)
    for first in plans:
        for second in plans:
            same = [a == b for a, b in zip(block_keys(first), block_keys(second), strict=True)]
            assert same == sorted(same, reverse=True), "once plans differ they differ"
            assert all(same) == (first.fingerprint() == second.fingerprint()) or not first.steps or not second.steps


def test_softened_loss_is_held_to_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    np.testing.assert_allclose(kl(a, b, 3.0).numpy(), 9 * np.array(naive_kl(a.double() / 3, b.double() / 3)), rtol=1e-9)
    assert (kl(a, a) == 0).all()


def test_a_view_that_holds_more_out_shares_answers_and_leaves_the_other_one_alone() -> None:
    whole = scorer()
    view = whole.holding_out(8)
    assert (view.calibration.search, view.calibration.held) == ((0, 1), (2, 3))
    assert (whole.calibration.search, whole.calibration.held) == ((0, 1, 2), (3,))
    plan = random_plan(PlanModel.of(whole.description))
    view.losses(plan, (0, 3))
    seen = whole.images_seen
    assert torch.equal(whole.losses(plan, (0, 3)), view.losses(plan, (0, 3)))
    assert whole.images_seen == seen, "answered from what the view has run"


@given(st.floats(1e-9, 10), st.floats(1e-4, 3), st.floats(1.01, 4))
def test_merit_falls_with_either_loss(plain: float, root: float, factor: float) -> None:
    assert merit(plain, root) < min(merit(plain * factor, root), merit(plain, root * factor))
    assert merit(plain, math.sqrt(plain)) == pytest.approx(math.log(plain))
    assert math.isfinite(merit(0.0, 0.0))


def test_what_is_kept_never_has_a_higher_kl_than_the_first() -> None:
    assert settled([(0.2, 0.3), (0.21, 0.01), (0.19, 0.2), (0.18, 0.25)]) == 2
    assert settled([(0.2, 0.3), (0.2, 0.3)]) == 0
    assert settled([(0.2, 0.3), (0.1, 0.9)]) == 0, "its root tells against it"


def test_not_finite_is_refused() -> None:
    score = scorer()
    plan = random_plan(PlanModel.of(score.description))
    with torch.no_grad():
        score.vit.blocks[-1].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(SearchError, match="NaN or infinite"):
        score.losses(plan, score.calibration.search)
    pictures = images(score.description, 8)
    with pytest.raises(SearchError, match="NaN or infinite"):
        Calibration.of_tensors(pictures, None, score.vit, score.description, batch_size=4)


def test_batches_are_cut_and_split() -> None:
    _, _, calibration = calibrated(count=18, batch_size=4)
    assert (calibration.search, calibration.held) == ((0, 1, 2, 3), (4,))
    assert calibration.count(calibration.held) == 2
    with pytest.raises(SearchError, match="7 calibration images; expected at least 8"):
        split(7, 4, 0.25)
    with pytest.raises(SearchError, match="held-out share"):
        split(70, 4, 1.0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
@settings(max_examples=50)
def test_lifetimes_and_masks_are_one(values: list[int]) -> None:
    life = np.array(values)
    mask = mask_of(life, 6)
    assert np.array_equal(life_of(mask), life)
    assert counts_of(life, 6) == tuple(mask.sum(axis=1))


def test_a_revived_patch_is_refused() -> None:
    with pytest.raises(SearchError, match="revives"):
        life_of(np.array([[1, 0], [1, 1]]))


def test_lifetimes_as_a_plan() -> None:
    description = scorer().description
    life = np.full(description.patches, 4)
    life[3], life[7] = 0, 2
    plan = plan_of(life, description)
    assert [(step.block, len(step.keep)) for step in plan.steps if isinstance(step, StaticStep)] == [(0, 15), (2, 14)]


def test_limits_end() -> None:
    limits = Limits(evaluations=2)
    limits.spend()
    assert limits.left
    limits.spend()
    assert not limits.left
    assert not Limits(seconds=0).left
    assert Limits().left
    with pytest.raises(SearchError):
        Limits(evaluations=-1)
    trace = Trace()
    trace.add("greedy", 0.2, 0.1)
    assert trace.rows == [{"stage": "greedy", "evaluation": 1, "loss": 0.2, "best": 0.1}]
