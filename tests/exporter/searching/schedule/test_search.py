"""Schedules: counts, budgets, the sensitivity table and its optimum, and a reproducible search."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vp_exporter.searching.schedule.search as schedule_module
from tests.exporter.tiny import DEPTH, tiny_vit
from vp_exporter.errors import PlanError, SearchError
from vp_exporter.methods.stages import bat_split
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.schedule import bayesian_optimisation
from vp_exporter.searching.schedule.bayesian_optimisation import BayesianOptimisation
from vp_exporter.searching.schedule.search import begin, planned, search_schedule, sensitivity, settle
from vp_exporter.searching.schedule.sensitivity import Sensitivity, allocate
from vp_exporter.searching.schedule.space import (
    CASCADES,
    METHODS,
    SCHEDULED,
    Extras,
    Space,
    steps_of,
    uniform,
    usual_shapes,
)
from vp_exporter.searching.scoring import Scorer, kl, merit

VIT, DESCRIPTION = tiny_vit()
AVERAGE = tiny_vit("average-pool-fc-norm-class-token")
SIXTEEN = DESCRIPTION.patches


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def scorer(images: torch.Tensor) -> Scorer:
    return Scorer(VIT, DESCRIPTION, Calibration.of_tensors(images, None, VIT, DESCRIPTION, batch_size=4))


def of_alive(method: str, alive: tuple[int, ...], extras: Extras | None = None) -> ReductionPlan:
    return ReductionPlan(PlanModel.of(DESCRIPTION), steps_of(method, alive, DESCRIPTION, extras))


alive_of_any = st.lists(st.integers(1, SIXTEEN), min_size=DEPTH, max_size=DEPTH).map(
    lambda counts: tuple(sorted(counts, reverse=True))
)
alive_of_halving = st.lists(
    st.floats(0, 1), min_size=DEPTH, max_size=DEPTH
).map(
    lambda shares: tuple(
        itertools.accumulate(shares, lambda n, share: n - int(share * (n // 2)), initial=SIXTEEN)  # type: ignore[arg-type]
    )[1:]
)
shares = st.lists(st.sampled_from([0.0, 0.08, 0.15, 0.25, 0.5, 0.75, 1.0]), min_size=DEPTH, max_size=DEPTH).map(tuple)
wholes = st.lists(st.sampled_from([0.0, 1.0]), min_size=DEPTH, max_size=DEPTH).map(tuple)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEDULED), st.data())
def test_steps_leave_what_the_schedule_says(method: str, data: st.DataObject) -> None:
    alive = data.draw(alive_of_halving if method in ("tome", "ppt") else alive_of_any)
    named = {name: data.draw(shares) for name in ("tau", "clusters", "dropped")}
    extras = Extras(**named, merged=data.draw(wholes))
    plan = of_alive(method, alive, data.draw(st.sampled_from([None, extras])))
    prefix = DESCRIPTION.prefix_tokens
    assert tuple(row.mlp - prefix for row in plan.tokens()) == alive
    acting = [b for b, (n, m) in enumerate(itertools.pairwise((SIXTEEN, *alive))) if n != m]
    assert [step.block for step in plan.steps] == acting


def test_settings_reach_the_steps() -> None:
    alive = (12, 8, 8, 4)
    assert [s.fields()["tau"] for s in steps_of("ppt", alive, DESCRIPTION, Extras(tau=(0, 0.1, 0.2, 1)))] == [0, 0.1, 1]
    steps = steps_of("diffrate", alive, DESCRIPTION, Extras(dropped=(0.0, 1.0, 0.5, 0.5)))
    assert [step.fields() for step in steps] == [
        {"prune_to": prune_to, "merge_to": merge_to, "weights": "equal"}  # as in the authors' code
        for prune_to, merge_to in ((17, 13), (9, 9), (7, 5))
    ]
    for step, (n, m) in zip(steps_of("bat", alive, DESCRIPTION), ((16, 12), (12, 8), (8, 4)), strict=True):
        assert (step.fields()["clusters"], step.fields()["pairs"]) == bat_split(n, m)
    assert [s.fields()["fuse"] for s in steps_of("evit", (16, 2, 2, 1), DESCRIPTION)] == [True, False]


def test_a_cascade_merges_where_it_is_told_to() -> None:
    alive = (12, 8, 7, 2)  # of 16; ToMe cannot take 5 of 7

    def steps(merged: tuple[float, ...] = ()) -> list[tuple[str, int]]:
        found = steps_of("tome+diffrate", alive, DESCRIPTION, Extras(merged=merged))
        return [(step.reducer, step.block) for step in found]

    assert steps() == [("tome", 0), ("tome", 1), ("diffrate", 2), ("diffrate", 3)]  # the first half
    assert steps((0, 1, 1, 1)) == [("diffrate", 0), ("tome", 1), ("tome", 2), ("diffrate", 3)]
    assert [step.reducer for step in steps_of("diffrate", alive, DESCRIPTION)] == ["diffrate"] * DEPTH
    merging, dropping = (
        Space("tome+evit", DESCRIPTION, 0.7).plan_of(alive, Extras(merged=merged))
        for merged in ((1.0,) * DEPTH, (0.0,) * DEPTH)
    )
    assert merging.proportional_attention  # as in ToMe's own plans
    assert not dropping.proportional_attention
    assert dropping.steps == Space("evit", DESCRIPTION, 0.7).plan_of(alive, Extras()).steps


@pytest.mark.parametrize("method", CASCADES)
def test_a_cascade_is_held_to_the_uniform_schedule_of_its_second_reducer(method: str) -> None:
    assert uniform(method, DESCRIPTION, 0.7) == uniform(method.removeprefix("tome+"), DESCRIPTION, 0.7)


@pytest.mark.slow
def test_where_a_cascade_merges_is_searched(scorer: Scorer) -> None:
    found = optimisation(scorer, Space("tome+diffrate", DESCRIPTION, 0.7))
    found.begin([found.space.scaled([1, 1, 1])])
    found.improve(30)
    assert len({one.extras.merged for one in found.found}) > 3
    shares, settings = zip(*(found._point(one.removed, one.extras) for one in found.found[:2]), strict=True)
    assert len({len(point) for point in (*shares, *settings)}) == 2  # both are points of one space


@pytest.mark.parametrize("alive", [(17, 16, 16, 16), (8, 9, 8, 8), (8, 8, 8, 0), (8, 8, 8)])
def test_a_schedule_that_is_none_is_refused(alive: tuple[int, ...]) -> None:
    with pytest.raises(SearchError, match="schedule"):
        steps_of("topk", alive, DESCRIPTION)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SCHEDULED),
    st.floats(0.55, 0.99),
    st.lists(st.integers(0, 16), min_size=DEPTH, max_size=DEPTH),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 8)),
    st.sampled_from([None, 12]),
    st.booleans(),
)
def test_every_schedule_keeps_the_budget(
    method: str, target: float, weights: list[int], move: tuple[int, int, int], left: int | None, average: bool
) -> None:
    description = AVERAGE[1] if average else DESCRIPTION
    space = Space(method, description, target, None if left is None else tuple(range(left)))
    found = space.scaled(weights)
    for removed in (found, None if found is None else space.shifted(found, *move)):
        if removed is None:
            continue
        macs = space.macs(removed)
        assert macs == count_macs(description, space.plan(removed, Extras())).total <= space.budget
        for block, count in enumerate(removed):  # no single token more fits
            back = (*removed[:block], count - 1, *removed[block + 1 :])
            assert count == 0 or space.macs(back) > space.budget


def test_a_shift_moves_tokens_from_one_block_to_the_other() -> None:
    space = Space("topk", DESCRIPTION, 0.7)
    start = space.scaled([1, 1, 1])
    assert start is not None
    moved = space.shifted(start, 0, 2, 1)
    assert moved is not None
    assert moved[0] == start[0] - 1
    assert moved[2] > start[2]
    assert space.shifted(start, 2, 0, 1) != start


@pytest.mark.parametrize(("method", "target"), [("tome", 0.05), ("topk", 0.2), ("evit", 1.0), ("pitome", 0.7)])
def test_what_cannot_be_is_said(method: str, target: float) -> None:
    with pytest.raises(SearchError, match=r"out of reach|no schedule"):
        Space(method, DESCRIPTION, target)


def test_a_reach_is_reached() -> None:
    space = Space("tome", DESCRIPTION, 0.9)
    least = space.macs(space.most) / space.dense
    assert Space("tome", DESCRIPTION, least + 1e-9).scaled([1, 1, 1]) == space.most
    with pytest.raises(SearchError, match="reach"):
        Space("tome", DESCRIPTION, least - 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [0.65, 0.8])
def test_the_uniform_schedule_lies_below_the_target(method: str, target: float) -> None:
    plan = uniform(method, DESCRIPTION, target)
    share = count_macs(DESCRIPTION, plan).total / count_macs(DESCRIPTION).total
    assert target - 0.05 < share <= target
    if method not in ("tome", "diffrate"):
        assert {step.block for step in plan.steps} <= {1, 2, 3}


@pytest.mark.parametrize("seed", range(6))
def test_dynamic_programming_finds_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks, levels = 4, 4
    losses = rng.random((blocks, levels, levels))
    losses[:, ~np.triu(np.ones((levels, levels), dtype=bool))] = np.inf
    losses[rng.random(losses.shape) < 0.15] = np.inf
    costs = rng.integers(0, 9, losses.shape)
    some = 0
    for budget in (4, 9, 14, 30):
        best, where = math.inf, None
        for path in itertools.product(range(levels), repeat=blocks):
            steps = list(enumerate(itertools.pairwise((0, *path))))
            cost = sum(int(costs[b, i, o]) for b, (i, o) in steps)
            loss = sum(float(losses[b, i, o]) for b, (i, o) in steps)
            if cost <= budget and loss < best:
                best, where = loss, path
        assert allocate(losses, costs, budget) == where
        some += where is not None
    assert some


def test_a_table_is_interpolated_and_never_falls() -> None:
    table = Sensitivity((0.5, 0.25), ((1.0, 3.0), (2.0, 1.0)))
    assert [table.at(0, share) for share in (1.0, 0.5, 0.25)] == [0.0, 1.0, 3.0]
    assert table.at(0, 0.5**1.5) == pytest.approx(2.0)
    assert table.at(0, 0.125) == pytest.approx(5.0)  # extrapolated with the last slope
    assert table.at(1, 0.25) == 2.0  # a lower loss with fewer tokens is noise
    assert Sensitivity((0.5,), ((1.0,),)).at(0, 0.25) == pytest.approx(2.0)


@pytest.mark.parametrize("method", ["tome", "diffrate", "evit"])
def test_sensitivities_are_the_losses_of_single_steps(scorer: Scorer, images: torch.Tensor, method: str) -> None:
    space = Space(method, DESCRIPTION, 0.7)
    asked = scorer.blocks_asked
    table = sensitivity(scorer, space, Limits(), 3.0, images=8)
    assert table is not None
    assert table.losses[DEPTH - 1] == (0.0,) * len(table.shares)  # not measured: the head only reads the class token
    dense = ReducedViT(VIT, DESCRIPTION)
    with torch.inference_mode():
        for block in range(DEPTH - 1):
            for share, loss in zip(table.shares, table.losses[block], strict=True):
                alive = (SIXTEEN,) * block + (round(share * SIXTEEN),) * (DEPTH - block)
                step = steps_of(method, alive, DESCRIPTION)
                plan = ReductionPlan(
                    PlanModel.of(DESCRIPTION), step, proportional_attention=method in ("tome", "diffrate")
                )
                direct = kl(dense(images[:8]), ReducedViT(VIT, DESCRIPTION, plan)(images[:8]), 3.0).sqrt().mean()
                assert loss == pytest.approx(float(direct) ** 2, rel=1e-3, abs=1e-8)
    assert scorer.blocks_run < scorer.blocks_asked - asked  # prefixes were shared


def test_few_evaluations_make_a_smaller_table_or_none(scorer: Scorer) -> None:
    space = Space("topk", DESCRIPTION, 0.7)
    assert sensitivity(scorer, space, Limits(8), 3.0) is None
    one = Limits(9)
    table = sensitivity(scorer, space, one, 3.0)
    assert table is not None
    assert (len(table.shares), one.spent) == (1, 3)


@pytest.mark.parametrize("average", [False, True])
def test_the_optimum_of_a_table_protects_the_dear_block(average: bool) -> None:
    description = AVERAGE[1] if average else DESCRIPTION
    space = Space("topk", description, 0.75)
    dear = Sensitivity((0.5, 0.1), tuple((9.0, 30.0) if block < 2 else (0.1, 0.3) for block in range(DEPTH)))
    found = planned(space, dear)
    assert found is not None
    assert found[:2] == (0, 0)
    assert 0.7 * space.dense < space.macs(found) <= space.budget


@pytest.mark.parametrize("method", SCHEDULED)
def test_at_the_last_block_patches_leave_for_free(images: torch.Tensor, method: str) -> None:
    space = Space(method, DESCRIPTION, 0.999)
    assert space.decided == DEPTH - 1
    alive = space.alive([0] * space.decided)
    assert alive == (SIXTEEN,) * (DEPTH - 1) + ((8,) if method in ("tome", "ppt") else (1,))
    with torch.inference_mode():
        reduced = ReducedViT(VIT, DESCRIPTION, space.plan_of(alive, Extras()))(images)
        torch.testing.assert_close(reduced, ReducedViT(VIT, DESCRIPTION)(images), rtol=0, atol=2e-5)
    averaged = Space(method, AVERAGE[1], 0.999)
    assert averaged.decided == DEPTH  # here every token is read
    assert averaged.alive([0] * DEPTH) == (AVERAGE[1].patches,) * DEPTH


@pytest.mark.slow
@pytest.mark.parametrize("method", SCHEDULED)
def test_a_search_beats_the_uniform_schedule(scorer: Scorer, method: str) -> None:
    found = search_schedule(scorer, method, 0.7, evaluations=20, trace=(trace := Trace()))
    held = scorer.calibration.held
    assert found.kl == pytest.approx(scorer.loss(found.plan, held))
    assert found.uniform_kl == pytest.approx(scorer.loss(found.uniform_plan, held))
    assert found.kl <= found.uniform_kl
    assert count_macs(DESCRIPTION, found.plan).total <= 0.7 * count_macs(DESCRIPTION).total
    assert found.plan.method == method
    assert found.plan.budget == {"target_macs": 0.7, "searched": True}
    reducers = {step.reducer for step in found.plan.steps}
    assert found.plan.proportional_attention == bool(reducers & {"tome", "ppt", "diffrate"})
    assert reducers <= set(method.split("+"))
    assert found.rows == trace.rows != []
    assert len(found.rows) <= 20


@pytest.mark.parametrize("evaluations", [0, 1, 5])
def test_a_search_of_next_to_nothing_still_ends_with_a_plan(scorer: Scorer, evaluations: int) -> None:
    found = search_schedule(scorer, "tome", 0.7, evaluations=evaluations)
    assert found.kl <= found.uniform_kl


def optimisation(scorer: Scorer, space: Space, **given: object) -> BayesianOptimisation:
    return BayesianOptimisation(scorer, space, Limits(), seed=0, temperature=3.0, trace=Trace(), **given)  # type: ignore[arg-type]


def test_the_uniform_schedule_is_returned_where_it_is_better_on_held_out_images(scorer: Scorer) -> None:
    space, even = Space("topk", DESCRIPTION, 0.7), uniform("topk", DESCRIPTION, 0.7)
    local = optimisation(scorer, space)
    local.begin([space.most])  # all but one leave at block 0
    found = settle(scorer, local, even, [])
    assert scorer.loss(local.best.plan, scorer.calibration.held) > found.kl == found.uniform_kl
    assert found.plan.steps == even.steps
    assert found.plan.budget == {"target_macs": 0.7, "searched": True}


def test_a_start_wins_where_what_was_fitted_is_worse_on_held_out_images(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, even = Space("topk", DESCRIPTION, 0.7), uniform("topk", DESCRIPTION, 0.7)
    local = optimisation(scorer, space)
    little = (0,) * (space.decided - 1) + (1,)
    local.begin([little])
    monkeypatch.setattr(bayesian_optimisation, "FINALISTS", 1)
    local.found.append(dataclasses.replace(local.found[0], plan=space.plan(space.most, local.extras), start=False))
    local._order = [1, 0]  # the overfitted one is ranked first
    found = settle(scorer, local, even, [])
    assert found.plan == local.found[0].plan
    assert found.kl == scorer.loss(found.plan, scorer.calibration.held) < found.uniform_kl


def test_a_first_look_says_which_schedules_meet_all_held_out_images(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = scorer.calibration.held
    assert len(held) > 1
    monkeypatch.setattr(schedule_module, "LOOK", scorer.calibration.count(held[:1]))
    monkeypatch.setattr(schedule_module, "STAYING", 1)
    space, even = Space("topk", DESCRIPTION, 0.7), uniform("topk", DESCRIPTION, 0.7)
    local = optimisation(scorer, space)
    begin(local, even, None)
    plans = local.finalists(schedule_module.SETTLED)
    assert len(plans) > 2
    found = settle(scorer, local, even, [])
    met = [plan for plan in plans if f"{plan.fingerprint()}/{held[-1]}" in scorer.memo]
    first = [(scorer.loss(plan, held[:1]), scorer.loss(plan, held[:1], 3.0)) for plan in plans]
    assert met == [plans[min(range(len(plans)), key=lambda i: merit(*first[i]))]]
    assert found.plan.steps in (met[0].steps, even.steps)


@pytest.mark.parametrize("method", SCHEDULED)
def test_usual_shapes_meet_the_budget_and_begin_where_they_say(method: str) -> None:
    space = Space(method, DESCRIPTION, 0.75)
    shapes = usual_shapes(space)
    assert len(shapes) == 2 * (DEPTH // 2 + 1) + 2
    for shape in shapes:
        assert shape is None or 0.6 * space.dense < space.macs(shape) <= space.budget
    even = [shape for shape in shapes[: DEPTH // 2 + 1] if shape is not None]
    assert [next(block for block, count in enumerate(shape) if count) for shape in even] == list(range(len(even)))


@pytest.mark.slow
def test_a_search_lowers_its_own_loss_and_decides_the_same_twice(images: torch.Tensor) -> None:
    def once() -> tuple[ReductionPlan, list[dict]]:
        calibration = Calibration.of_tensors(images, None, VIT, DESCRIPTION, batch_size=4)
        found = search_schedule(Scorer(VIT, DESCRIPTION, calibration), "bat", 0.65, evaluations=60, seed=3)
        return found.plan, found.rows

    (plan, rows), (again, rows_again) = once(), once()
    assert (plan, rows) == (again, rows_again)
    bests = [row["best"] for row in rows]
    assert bests == sorted(bests, reverse=True)
    starts = [row["loss"] for row in rows if row["stage"].endswith("start")]
    assert bests[-1] < min(starts)


def test_a_search_without_a_limit_ends_where_nothing_helps(scorer: Scorer) -> None:
    found = search_schedule(scorer, "topk", 0.8, evaluations=None)
    assert found.rows[-1]["best"] <= min(row["loss"] for row in found.rows) + 1e-9


def test_the_model_must_have_what_the_method_needs(images: torch.Tensor) -> None:
    vit, description = tiny_vit("map-pool")
    calibration = Calibration.of_tensors(images, None, vit, description, batch_size=8)
    with pytest.raises(PlanError, match="class token"):
        search_schedule(Scorer(vit, description, calibration), "evit", 0.7)
