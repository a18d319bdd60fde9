"""Static masks whose dropped patches lie apart: each one leaves neighbours that tell nearly the same.

What a patch is worth hangs on which of its neighbours stay. Learning that from pairs takes more images than a search
has; that it falls with the distance is known beforehand. So dropped patches repel each other here, and the model is
only asked which of a few such masks is best: a choice among few does not overfit, as exchanges of single patches do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vp_exporter.searching.mask.encoding import life_of

REACHES = (0.8, 1.2, 2.0)  # patches; of the repulsion
PULLS = (0.0, 0.3)  # what the importance counts against the repulsion
TRIES = 16  # random beginnings; the one that ends lowest is taken


def starting_masks(
    counts: Sequence[int], grid: tuple[int, int], importance: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """A mask for each reach of the repulsion, with and without the importance.

    Args:
        counts: patches alive in each block, never rising.
        importance: float [patches], of losing each from the first block on.
        seed: of the beginnings.

    Returns:
        lifetimes int64 [patches] by name. What later blocks drop joins what the first ones have dropped.
    """
    patches = grid[0] * grid[1]
    root = np.sqrt(np.maximum(importance, 0.0))  # a gradient's own unit
    worth = root / root.mean() if root.mean() > 0 else np.zeros(patches)
    found = {}
    for reach in REACHES:
        near = kernel(grid, reach)
        for pull in PULLS:
            dropped, rows = np.zeros(patches, dtype=bool), []
            for count in counts:
                if patches - count > int(dropped.sum()):
                    # The usual repulsion on a dropped patch makes the two terms of one scale.
                    scale = pull * (patches - count) * float(near.sum()) / patches**2
                    dropped = drop(near, scale * worth, patches - count, dropped, seed)
                rows.append(~dropped)
            name = f"spread {reach:g}" + (" by importance" if pull else "")
            found[name] = life_of(np.stack(rows))
    return found


def squared_distances(grid: tuple[int, int]) -> np.ndarray:
    """Between the middles of patches, in patches, squared: int64 [patches, patches]."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    square: np.ndarray = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    return square


def kernel(grid: tuple[int, int], reach: float) -> np.ndarray:
    """How strongly dropped patches repel each other: exp(-distance^2 / (2 reach^2)), float64 [patches, patches].

    Args:
        reach: in patches. A patch does not repel itself.
    """
    near: np.ndarray = np.exp(-squared_distances(grid) / (2 * reach**2))
    np.fill_diagonal(near, 0.0)
    return near


def energy(near: np.ndarray, worth: np.ndarray, dropped: np.ndarray) -> float:
    """The repulsion of all pairs of dropped patches, each once, and what the dropped ones are worth."""
    mask = dropped.astype(np.float64)
    return float(mask @ near @ mask / 2 + worth @ mask)


def drop(near: np.ndarray, worth: np.ndarray, count: int, fixed: np.ndarray, seed: int) -> np.ndarray:
    """Patches of least energy, among TRIES descents by the best exchange from random beginnings.

    Args:
        near: float [patches, patches], of `kernel`; worth: float [patches].
        count: how many to drop.
        fixed: bool [patches], dropped already; at most `count`.

    Returns:
        bool [patches], dropped; `fixed` is among them.
    """
    rng, best, least = np.random.default_rng(seed), fixed, np.inf
    for _ in range(TRIES):
        dropped = fixed.copy()
        dropped[rng.permutation(np.flatnonzero(~fixed))[: count - int(fixed.sum())]] = True
        _descend(near, worth, dropped, fixed)
        reached = energy(near, worth, dropped)
        if reached < least - 1e-12:
            best, least = dropped, reached
    return best


def _descend(near: np.ndarray, worth: np.ndarray, dropped: np.ndarray, fixed: np.ndarray) -> None:
    """Exchange a dropped patch for a kept one, the best pair each time, until none lowers the energy; in place."""
    while True:
        field = near @ dropped + worth
        out, into = np.flatnonzero(dropped & ~fixed), np.flatnonzero(~dropped)
        if not len(out) or not len(into):
            return
        change = field[into] - near[np.ix_(out, into)] - field[out][:, None]
        at = int(change.argmin())
        if change.flat[at] >= -1e-12:
            return
        i, j = divmod(at, len(into))
        dropped[out[i]], dropped[into[j]] = False, True
