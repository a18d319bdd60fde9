"""Counts: how many tokens leave at each block, from one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def rounded(value: float) -> int:
    """The nearest whole number; halves go up."""
    return math.floor(value + 0.5)


def slope(shape: str, blocks: int, r: float) -> list[float]:
    """r at each of `blocks` acting blocks, its mean being `r` (ToMe, Bolya et al. 2023: constant, or linear).

    "decreasing" runs from 2r at the first to 0 at the last, "increasing" the other way; one block alone gets r.
    """
    if shape == "constant" or blocks == 1:
        return [float(r)] * blocks
    rising = [2 * r * i / (blocks - 1) for i in range(blocks)]
    return rising if shape == "increasing" else rising[::-1]


def whole(values: Sequence[float]) -> list[int]:
    """Whole numbers whose running sums are the rounded running sums: a total of 12 x 12.5 is 150, not 144 or 156.

    (ToMe's own code truncates each number: its (16, -1) leaves 10 of 197 tokens after 12 blocks, this leaves 5.)
    """
    counts, total, before = [], 0.0, 0
    for value in values:
        total += value
        now = rounded(round(total, 9))  # the inner rounding hides the noise of the sum
        counts.append(now - before)
        before = now
    return counts


def cut(counts: Sequence[int], patches: int, limit: Callable[[int], int]) -> list[int]:
    """Counts that no block need refuse: each is cut to `limit` of the patch tokens that are left, as ToMe does.

    The first block's count is left alone: there it is a mistake of the caller's, and the step says so.
    """
    done: list[int] = []
    for count in counts:
        taken = min(count, limit(patches)) if any(done) else count
        done.append(taken)
        patches = max(1, patches - taken)
    return done


def share_of(share: float, count: int) -> int:
    """ceil(share * count), where 0.1 * 30 is 3 and not 3.0000000000000004."""
    return max(1, math.ceil(round(share * count, 9)))
