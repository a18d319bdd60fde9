"""Search for schedules of data-dependent reducers with minimal loss at a MAC budget.

A schedule is `alive`, the patch tokens that leave each block. It starts from the papers' uniform schedule, shapes with
few parameters, and the optimum of a sensitivity table; `bayesian_optimisation` continues from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from vp_exporter.methods.schedule import rounded
from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.schedule.bayesian_optimisation import BayesianOptimisation
from vp_exporter.searching.schedule.sensitivity import LEVELS, Sensitivity, allocate, measure
from vp_exporter.searching.schedule.space import Extras, Space, uniform, usual_shapes
from vp_exporter.searching.scoring import Scorer, merit, settled

SETTLED = 3  # schedules evaluated on the held-out images, plus as many other starts
LOOK, STAYING = 256, 3  # after this many held-out images, this many schedules continue
_GRID, _COSTS = 24, 1200  # levels of a count and of the budget in the dynamic program


@dataclass(frozen=True)
class Scheduled:
    """Result of a schedule search.

    Attributes:
        plan: The winner; on the held-out images no worse than `uniform_plan`.
        kl, uniform_kl: Mean KL on the held-out images, nats, temperature 1.
        rows: This search's rows of the trace; losses are those used by the search (roots, softened).
    """

    plan: ReductionPlan
    uniform_plan: ReductionPlan
    uniform_kl: float
    kl: float
    rows: list[dict[str, Any]] = field(default_factory=list)


def sensitivity(
    scorer: Scorer, space: Space, limits: Limits, temperature: float, *, images: int = 32
) -> Sensitivity | None:
    """Sensitivity table of a space without a static step, on the first batches that hold `images` images.

    Takes at most a third of the evaluations: with fewer, it has fewer levels, or is omitted.
    """
    counts = sorted({min(space.start - 1, max(space.least(space.start), rounded(share * space.start)))
                     for share in LEVELS} - {0}, reverse=True)  # fmt: skip
    if limits.evaluations is not None:
        levels = (limits.evaluations - limits.spent) // 3 // max(1, space.decided)
        counts = counts[-1:] if levels == 1 else counts[: min(levels, len(counts))]
    if not counts:
        return None
    extras = Extras.of(space.method, space.description.depth)

    def plan_at(block: int, count: int) -> ReductionPlan:
        return space.plan_of([space.start] * block + [count] * (space.description.depth - block), extras)

    def left() -> bool:
        if not limits.left:
            return False
        limits.spend()
        return True

    return measure(
        scorer, plan_at, counts, range(space.decided), space.start, batches=scorer.calibration.first(images),
        temperature=temperature, left=left,
    )  # fmt: skip


def planned(space: Space, table: Sensitivity, power: float = 1.0) -> tuple[int, ...] | None:
    """Optimum of a sensitivity table; losses add up for `power` 1, their roots for 1/2.

    Counts are on a grid, and MACs of blocks are rounded up; the remaining budget is filled afterwards.
    """
    model, depth = space.description, space.description.depth
    counts = sorted({rounded(float(x)) for x in np.linspace(1, space.start, _GRID)}, reverse=True)
    losses = np.full((depth, len(counts), len(counts)), np.inf)
    costs = np.zeros(losses.shape, dtype=np.int64)
    unit = space.dense / _COSTS
    for block in range(depth):
        lost = [table.at(block, count / space.start) ** power for count in counts]
        for i, n in enumerate(counts):
            for o in range(i, len(counts)):
                m = counts[o]
                if block >= space.decided:
                    if i != o:
                        continue
                    m = space.least(n)
                elif m < space.least(n):
                    continue
                macs = sum(space.block_macs(block, n, m)) + (block == depth - 1) * model.head_macs[1] * m
                losses[block, i, o] = 0.0 if block >= space.decided else lost[o] - lost[i]
                costs[block, i, o] = math.ceil(macs / unit)
    fixed = space.start * model.patch_embed_macs + model.head_macs[0]
    fixed += model.head_macs[1] * model.prefix_tokens * model.pool_include_prefix
    budget = math.floor((space.budget - fixed) / unit)
    path = allocate(losses, costs, budget) if budget > 0 else None
    if path is None:
        return None
    return space.fill([a - b for a, b in pairwise([space.start, *(counts[o] for o in path[: space.decided])])])


def search_schedule(
    scorer: Scorer,
    method: str,
    target: float,
    *,
    evaluations: int | None = 300,
    seconds: float | None = None,
    seed: int = 0,
    temperature: float = 3.0,
    trace: Trace | None = None,
) -> Scheduled:
    """Search counts and settings of a reducer, with the papers' uniform schedule as the baseline.

    Args:
        target: Maximum MACs as a share of the dense model's.
        evaluations, seconds: Limits (vp_exporter.searching.limits).
        temperature: Of the losses used by the search; held-out losses are plain.

    Raises:
        SearchError: if the method is unknown, or the budget is out of reach.
        PlanError: if the uniform schedule does not reach the budget, or the model lacks something that the method
            needs.
    """
    trace = Trace() if trace is None else trace
    first = len(trace.rows)
    space = Space(method, scorer.description, target)
    even = uniform(method, scorer.description, target)
    optimisation = BayesianOptimisation(
        scorer, space, Limits(evaluations, seconds, scorer.workers), seed=seed, temperature=temperature, trace=trace
    )
    begin(optimisation, even, sensitivity(scorer, space, optimisation.limits, temperature))
    optimisation.improve()
    return settle(scorer, optimisation, even, trace.rows[first:])


def begin(
    optimisation: BayesianOptimisation,
    even: ReductionPlan,
    table: Sensitivity | None,
    more: Sequence[tuple[int, ...] | None] = (),
    *,
    shapes: bool = True,
) -> None:
    """Start from the uniform schedule, optima of a table, `more`, and the usual shapes."""
    space = optimisation.space
    alive = [row.mlp - space.description.prefix_tokens for row in even.tokens()]
    weights = [a - b for a, b in pairwise((space.description.patches, *alive))]
    optima = [planned(space, table, power) for power in (1.0, 0.5)] if table else []
    optimisation.begin([space.scaled(weights), *optima, *more, *(usual_shapes(space) if shapes else ())])


def settle(
    scorer: Scorer, optimisation: BayesianOptimisation, even: ReductionPlan, rows: list[dict[str, Any]]
) -> Scheduled:
    """Evaluate the best schedules, other starts and the uniform one on the held-out images; frees the scorer's memory.

    Other starts are included because the best ones are fitted to the search images. The first LOOK held-out images
    select the few that run on all. Among those whose plain KL is not above the uniform schedule's, the one of least
    merit wins (scoring.settled).
    """
    held = scorer.calibration.held

    def losses_of(plan: ReductionPlan, batches: Sequence[int]) -> tuple[float, float]:
        return scorer.loss(plan, batches), scorer.loss(plan, batches, optimisation.temperature)

    plans = optimisation.finalists(SETTLED)
    look = scorer.calibration.first(LOOK, held)
    if len(look) < len(held):
        plans = sorted(plans, key=lambda plan: merit(*losses_of(plan, look)))[:STAYING]
    plans = [dataclasses.replace(even, method=optimisation.space.method, budget=optimisation.best.plan.budget), *plans]
    losses = [losses_of(plan, held) for plan in plans]
    best = settled(losses)
    scorer.forget()
    return Scheduled(plans[best], even, losses[0][0], losses[best][0], rows)
