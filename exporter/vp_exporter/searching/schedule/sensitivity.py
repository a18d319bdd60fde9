"""What one reduction alone costs at each block, and the schedule that is cheapest if such losses add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.scoring import Scorer

LEVELS = (0.7, 0.25)  # shares of the patch tokens that one step leaves


@dataclass(frozen=True)
class Sensitivity:
    """Losses of plans with one step.

    Attributes:
        shares: of the patch tokens that the step leaves, falling, below 1.
        losses: [depth][shares], nats; of losses that a search goes by (Scorer.losses), the square of the mean.
    """

    shares: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def at(self, block: int, share: float) -> float:
        """The loss where `share` of the tokens leaves a block: it never falls as more goes, and is 0 at a share of 1.

        Linear in the logarithm of the share between what was measured, and beyond it with the last slope: halving again
        what is left costs as much as halving did.
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
        counts: falling, below `patches`.
        blocks: those to measure; the others are taken to cost nothing.
        left: asked before each plan is run (it counts them); False ends it.

    Returns:
        The table; None where `left` ended it early.
    """
    depth = scorer.description.depth
    # The dense plan itself shares nothing with these: proportional attention and token sizes are part of what names a
    # prefix. A plan that acts at the last block alone is as dense before it, and named alike.
    scorer.remember(plan_at(depth - 1, counts[-1]), batches)
    losses = [[0.0] * len(counts) for _ in range(depth)]
    for block in blocks:
        for level, count in enumerate(counts):
            if not left():
                return None
            loss = scorer.loss(plan_at(block, count), batches, temperature)
            losses[block][level] = loss if temperature is None else loss**2  # roots do not add up, as changes do not
    return Sensitivity(tuple(count / patches for count in counts), tuple(map(tuple, losses)))


def allocate(losses: np.ndarray, costs: np.ndarray, budget: int) -> tuple[int, ...] | None:
    """The levels with the least sum of losses within a budget, by dynamic programming over (block, level, cost).

    Args:
        losses: float [blocks, L, L], of block b where level i enters and level o leaves; infinite where that cannot be.
        costs: whole numbers [blocks, L, L], at least 0.
        budget: on the sum of the costs.

    Returns:
        The level that leaves each block, where level 0 enters the first one; None where nothing fits.
    """
    blocks, levels, _ = losses.shape
    value = np.full((levels, budget + 1), np.inf)  # the least loss with at most this cost
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
