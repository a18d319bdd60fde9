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
    first, last = (2.0 * r, 0.0) if shape == "decreasing" else (0.0, 2.0 * r)
    step = (last - first) / (blocks - 1)
    return [first + step * i for i in range(blocks)]


def counts_of(shape: str, blocks: int, r: float) -> list[int]:
    """Tokens that leave each of `blocks` acting blocks.

    A slope is cut to whole numbers block by block, as ToMe's code does: its (16, -1) removes 187 tokens, not 192.
    """
    values = slope(shape, blocks, r)
    return whole(values) if shape == "constant" or blocks == 1 else [max(0, int(value)) for value in values]


def whole(values: Sequence[float]) -> list[int]:
    """Whole numbers whose running sums are the rounded running sums: a total of 12 x 12.5 is 150, not 144 or 156."""
    counts, total, before = [], 0.0, 0
    for value in values:
        total += value
        now = rounded(round(total, 9))  # the inner rounding hides the noise of the sum
        counts.append(now - before)
        before = now
    return counts


def cut(counts: Sequence[int], patches: int, limit: Callable[[int], int], *, first: bool = False) -> list[int]:
    """Counts that no block need refuse: each is cut to `limit` of the patch tokens that are left, as ToMe does.

    The first acting block's count is cut only where `first` says so: otherwise it is a mistake of the caller's, and the
    step says so.
    """
    done: list[int] = []
    for count in counts:
        taken = min(count, limit(patches)) if first or any(done) else count
        done.append(taken)
        patches = max(1, patches - taken)
    return done


def share_of(share: float, count: int) -> int:
    """ceil(share * count), where 0.1 * 30 is 3 and not 3.0000000000000004."""
    return max(1, math.ceil(round(share * count, 9)))
