"""Sensitivity of the loss to a single reduction at each block, and the best schedule if such losses are additive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.scoring import Scorer

LEVELS = (0.7, 0.25)  # shares of the patch tokens kept by one step


@dataclass(frozen=True)
class Sensitivity:
    """Losses of plans with one step.

    Attributes:
        shares: Shares of the patch tokens that the step keeps, descending, below 1.
        losses: [depth][shares], nats; if measured as roots (Scorer.losses), the square of the mean.
    """

    shares: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def at(self, block: int, share: float) -> float:
        """Loss if `share` of the tokens remains after a block: non-increasing in the share, and 0 at a share of 1.

        Linear in the log of the share between measured shares; extrapolated with the last slope, so halving the rest
        again costs as much as the last halving.
        """
        x = np.array([0.0, *(-math.log(share) for share in self.shares)])
        y = np.maximum.accumulate([0.0, *self.losses[block]])
        at = -math.log(share)
        if at <= x[-1]:
            return float(np.interp(at, x, y))
        return float(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))


def measure(
    scorer: Scorer,
    plan_at: Callable[[int, int], ReductionPlan],
    counts: Sequence[int],
    blocks: Sequence[int],
    patches: int,
    *,
    batches: Sequence[int],
    temperature: float | None = None,
    left: Callable[[], bool] = lambda: True,
) -> Sensitivity | None:
    """Run one-step plans: every count at every block.

    Args:
        plan_at: (block, patch tokens that leave it) -> the plan with this step alone.
        counts: Descending, below `patches`.
        blocks: Blocks to measure; others are assumed to cost nothing.
        left: Called before each plan, which it counts; False stops.

    Returns:
        The table; None if stopped by `left`.
    """
    depth = scorer.description.depth
    # The dense plan shares no prefix with these, since the key of a prefix includes proportional attention and token
    # sizes. A plan that only acts at the last block has the same key and is dense up to there.
    scorer.remember(plan_at(depth - 1, counts[-1]), batches)
    losses = [[0.0] * len(counts) for _ in range(depth)]
    for block in blocks:
        for level, count in enumerate(counts):
            if not left():
                return None
            loss = scorer.loss(plan_at(block, count), batches, temperature)
            losses[block][level] = loss if temperature is None else loss**2  # roots do not add up
    return Sensitivity(tuple(count / patches for count in counts), tuple(map(tuple, losses)))


def allocate(losses: np.ndarray, costs: np.ndarray, budget: int) -> tuple[int, ...] | None:
    """Levels with the minimal sum of losses within a budget, by dynamic programming over (block, level, cost).

    Args:
        losses: float [blocks, L, L], of block b if level i enters and level o leaves; infinite if impossible.
        costs: Integers [blocks, L, L], at least 0.
        budget: Maximum sum of the costs.

    Returns:
        The level after each block, with level 0 before the first; None if nothing fits.
    """
    blocks, levels, _ = losses.shape
    value = np.full((levels, budget + 1), np.inf)  # lowest loss at this cost or less
    value[0] = 0.0
    came_from = np.zeros((blocks, levels, budget + 1), dtype=np.int64)
    for block in range(blocks):
        after = np.full_like(value, np.inf)
        for entering, leaving in zip(*np.nonzero(np.isfinite(losses[block])), strict=True):
            cost = int(costs[block, entering, leaving])
            if cost > budget:
                continue
            reached = value[entering, : budget + 1 - cost] + losses[block, entering, leaving]
            better = reached < after[leaving, cost:]
            after[leaving, cost:][better] = reached[better]
            came_from[block, leaving, cost:][better] = entering
        value = after
    level, left = int(value[:, budget].argmin()), budget
    if not np.isfinite(value[level, budget]):
        return None
    path = []
    for block in reversed(range(blocks)):
        path.append(level)
        entering = int(came_from[block, level, left])
        left -= int(costs[block, entering, level])
        level = entering
    return tuple(path[::-1])
