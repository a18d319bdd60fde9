"""Find the plan of a family whose MACs are closest to a target, from token counts alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.methods.base import Family, Steps
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs

TOLERANCE = 0.005  # as a share of the dense MACs
_SAMPLES = 64
_HALVINGS = 40


def solve(family: Family, model: ModelSpec, target: float) -> tuple[Steps, dict[str, Any]]:
    """Steps closest to `target`, a share of the dense MACs (those of count_macs, without the reducers' arithmetic).

    A coarse sweep brackets the target, then bisection. Rounding makes the MACs non-monotonic along a family (one token
    more removed at one block may mean one fewer at the next), hence the sweep, and hence the closest of all plans tried
    is returned rather than the last.

    Returns:
        The steps, and {setting of the family, "macs_share"} for the plan's provenance.

    Raises:
        PlanError: if the target is out of reach by more than `TOLERANCE`; names the reachable range and the block.
    """

    dense, target_model = count_macs(model).total, PlanModel.of(model)
    seen: dict[float, float | None] = {}
    refused: list[PlanError] = []

    def share(u: float) -> float | None:
        """Share of the dense MACs; None if there is no plan at u, or it removes nothing."""
        if u not in seen:
            seen[u] = None
            try:
                steps = family.at(u)
                macs = count_macs(model, ReductionPlan(target_model, steps)).total
                seen[u] = macs / dense if macs < dense else None
            except PlanError as error:
                refused.append(error)
        return seen[u]

    def halve(low: float, high: float, upwards: Callable[[float | None], bool]) -> None:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if upwards(share(middle)) else (low, middle)

    samples = [i / _SAMPLES for i in range(_SAMPLES + 1)]
    for low, high in pairwise(samples):  # find the ends of the valid range
        first, last = share(low), share(high)
        if first is None and last is not None:
            halve(low, high, lambda found: found is None)
        elif first is not None and last is None:
            halve(low, high, lambda found: found is not None)
    for (low, first), (high, last) in pairwise(sorted(seen.items())):  # find where it crosses the target
        if first is not None and last is not None and (first > target) != (last > target):
            falls = first > target
            halve(low, high, partial(_towards, target, falls))

    found_shares = {u: value for u, value in seen.items() if value is not None}
    if not found_shares:
        raise PlanError(
            f"`target_macs={target:g}` is out of reach: no plan of this method fits the model",
            fix=f"of the last one tried, {refused[-1]}" if refused else "choose a model with more patches",
        )
    best = min(found_shares, key=lambda u: (abs(found_shares[u] - target), u))
    least, most = min(found_shares.values()), max(found_shares.values())
    if not least - TOLERANCE <= target <= most + TOLERANCE:
        why = family.bound
        if target > most:
            steps = family.at(next(u for u, value in found_shares.items() if value == most))
            lost = (
                target_model.prefix_tokens + target_model.patches - ReductionPlan(target_model, steps).tokens()[-1].mlp
            )
            why = f"the least that it removes is {lost} tokens, at block {steps[0].block} first"
        raise PlanError(
            f"`target_macs={target:g}` is out of reach",
            expected=f"{least:.4f} to {most:.4f} of the dense MACs: {why}",
            fix="choose a share in reach",
        )
    return family.at(best), {**family.setting(best), "macs_share": round(found_shares[best], 6)}


def _towards(target: float, falls: bool, found: float | None) -> bool:
    """Whether the target lies beyond a plan of share `found`, if shares fall (or rise) along the family."""
    return found is not None and (found > target) == falls
