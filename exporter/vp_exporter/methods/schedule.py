"""Number of tokens to remove at each block, from a single number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def rounded(value: float) -> int:
    """Round to the nearest integer, halves up."""
    return math.floor(value + 0.5)


def slope(shape: str, blocks: int, r: float) -> list[float]:
    """Tokens to remove at each of `blocks` acting blocks, with mean `r` (ToMe, Bolya et al. 2023: constant or linear).

    "decreasing" runs from 2r at the first block to 0 at the last, "increasing" the reverse; a single block gets r.
    """
    if shape == "constant" or blocks == 1:
        return [float(r)] * blocks
    first, last = (2.0 * r, 0.0) if shape == "decreasing" else (0.0, 2.0 * r)
    step = (last - first) / (blocks - 1)
    return [first + step * i for i in range(blocks)]


def counts_of(shape: str, blocks: int, r: float) -> list[int]:
    """Integer number of tokens to remove at each of `blocks` acting blocks.

    A slope is truncated block by block, as in ToMe's code: its (16, -1) removes 187 tokens, not 192.
    """
    values = slope(shape, blocks, r)
    return whole(values) if shape == "constant" or blocks == 1 else [max(0, int(value)) for value in values]


def whole(values: Sequence[float]) -> list[int]:
    """Round so that running sums are the rounded running sums: 12 x 12.5 gives 150 in total, not 144 or 156."""
    counts, total, before = [], 0.0, 0
    for value in values:
        total += value
        now = rounded(round(total, 9))  # the inner rounding removes floating-point noise
        counts.append(now - before)
        before = now
    return counts


def cut(counts: Sequence[int], patches: int, limit: Callable[[int], int], *, first: bool = False) -> list[int]:
    """Clip each count to `limit` of the remaining patch tokens, as ToMe does.

    The first acting block's count is only clipped if `first` is set; otherwise too large a value is the caller's
    mistake, for the step to report.
    """
    done: list[int] = []
    for count in counts:
        taken = min(count, limit(patches)) if first or any(done) else count
        done.append(taken)
        patches = max(1, patches - taken)
    return done


def share_of(share: float, count: int) -> int:
    """ceil(share * count) without floating-point noise: 0.1 * 30 gives 3, not 4."""
    return max(1, math.ceil(round(share * count, 9)))
