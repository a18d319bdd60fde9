"""Mixed plans: a static drop at block 0 followed by a data-dependent reducer, under one budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vp_exporter.errors import SearchError
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.schedule.bayesian_optimisation import BayesianOptimisation
from vp_exporter.searching.schedule.search import Scheduled, begin, sensitivity, settle
from vp_exporter.searching.schedule.space import Space, uniform
from vp_exporter.searching.scoring import Scorer

DROPS = (0, 8, 16, 32, 48, 64)  # patches dropped by a static step at block 0
_SHORT = 24  # evaluations per size if only time is limited


def search_mixed(
    scorer: Scorer,
    life_order: Sequence[int] | np.ndarray,
    method: str = "diffrate",
    target: float = 0.65,
    *,
    drops: Sequence[int] = DROPS,
    evaluations: int | None = 400,
    seconds: float | None = None,
    seed: int = 0,
    temperature: float = 3.0,
    trace: Trace | None = None,
) -> Scheduled:
    """Drop the lowest-ranked patches at block 0 and search the reducer's schedule for the rest; choose both jointly.

    Each drop size gets a short search, together half of the evaluations; the best continues with the rest.

    Args:
        life_order: All patches, best first.
        drops: Sizes to try, except those that leave less than half of the patches or meet the budget alone.

    Returns:
        The winner, with method "static+" and the reducer's name; the uniform schedule is that of the reducer alone.

    Raises:
        SearchError: if the order is invalid, no size fits, or the budget is out of reach.
        PlanError: if the uniform schedule does not reach the budget, or the model lacks something that the method
            needs.
    """
    description = scorer.description
    order = [int(patch) for patch in life_order]
    if sorted(order) != list(range(description.patches)):
        raise SearchError(f"an order of {len(order)} patches", expected=f"each of 0 to {description.patches - 1} once")
    whole = Space(method, description, target)
    even = uniform(method, description, target)
    trace = Trace() if trace is None else trace
    first = len(trace.rows)
    spaces = [whole] if 0 in drops else []
    for drop in sorted({drop for drop in drops if 0 < drop <= description.patches // 2}):
        # Skip sizes that meet the budget alone, leaving nothing to schedule.
        space = dataclasses.replace(whole, keep=tuple(sorted(order[: description.patches - drop])))
        if space.macs([0] * space.decided) > space.budget:
            spaces.append(space)
    if not spaces:
        raise SearchError(f"no drop of {list(drops)} fits", expected=f"0 to {description.patches // 2}")
    limits = Limits(evaluations, seconds, scorer.workers)
    table = sensitivity(scorer, whole, limits, temperature)
    share = _SHORT if evaluations is None else max(1, (evaluations - limits.spent) // 2 // len(spaces))
    best: BayesianOptimisation | None = None
    for space in spaces:
        if best is not None and not limits.left:
            break
        until = limits.spent + share
        # Start from the best of the previous sizes.
        extras, more = (None, []) if best is None else (best.best.extras, [space.scaled(best.best.removed)])
        optimisation = BayesianOptimisation(
            scorer, space, limits, seed=seed, temperature=temperature, trace=trace, extras=extras
        )
        begin(optimisation, even, table, more, shapes=best is None)
        optimisation.improve(until)
        if best is None or optimisation.expected < best.expected:
            best = optimisation
    assert best is not None
    best.improve()
    found = settle(scorer, best, even, trace.rows[first:])
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, method=f"static+{method}"))
