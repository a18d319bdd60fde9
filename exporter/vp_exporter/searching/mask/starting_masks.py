"""Starting masks whose dropped patches are spread out, such that each leaves similar neighbours.

The value of a patch depends on which of its neighbours remain. A search has too few images to learn this from pairs,
but it is known to fall with the distance. So dropped patches repel each other here, and the model only selects among a
few such masks: unlike exchanges of single patches, this does not overfit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vp_exporter.searching.mask.encoding import life_of

REACHES = (0.8, 1.2, 2.0)  # of the repulsion, in patches
PULLS = (0.0, 0.3)  # weight of the importance relative to the repulsion
TRIES = 16  # random initialisations, of which the best is taken


def starting_masks(
    counts: Sequence[int], grid: tuple[int, int], importance: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Masks for each reach of the repulsion, with and without the importance.

    Args:
        counts: Patches in each block, non-increasing.
        importance: float [patches], of losing each from the first block on.
        seed: Seed of the initialisations.

    Returns:
        lifetimes int64 [patches] by name. Patches dropped by a block stay dropped in later ones.
    """
    patches = grid[0] * grid[1]
    root = np.sqrt(np.maximum(importance, 0.0))  # has the unit of a gradient
    worth = root / root.mean() if root.mean() > 0 else np.zeros(patches)
    found = {}
    for reach in REACHES:
        near = kernel(grid, reach)
        for pull in PULLS:
            dropped, rows = np.zeros(patches, dtype=bool), []
            for count in counts:
                if patches - count > int(dropped.sum()):
                    # Scale the importance to the typical repulsion on a dropped patch.
                    scale = pull * (patches - count) * float(near.sum()) / patches**2
                    dropped = drop(near, scale * worth, patches - count, dropped, seed)
                rows.append(~dropped)
            name = f"spread {reach:g}" + (" by importance" if pull else "")
            found[name] = life_of(np.stack(rows))
    return found


def squared_distances(grid: tuple[int, int]) -> np.ndarray:
    """Squared distances between patch centres, in patches: int64 [patches, patches]."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    square: np.ndarray = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    return square


def kernel(grid: tuple[int, int], reach: float) -> np.ndarray:
    """Repulsion between dropped patches: exp(-distance^2 / (2 reach^2)), float64 [patches, patches].

    Args:
        reach: In patches. The diagonal is 0.
    """
    near: np.ndarray = np.exp(-squared_distances(grid) / (2 * reach**2))
    np.fill_diagonal(near, 0.0)
    return near


def energy(near: np.ndarray, worth: np.ndarray, dropped: np.ndarray) -> float:
    """Energy: repulsion of all pairs of dropped patches, each counted once, plus the importance of dropped patches."""
    mask = dropped.astype(np.float64)
    return float(mask @ near @ mask / 2 + worth @ mask)


def drop(near: np.ndarray, worth: np.ndarray, count: int, fixed: np.ndarray, seed: int) -> np.ndarray:
    """Patches to drop at minimal energy, from TRIES descents by best exchange with random initialisation.

    Args:
        near: float [patches, patches], from `kernel`; worth: float [patches].
        count: Number of patches to drop.
        fixed: bool [patches], patches already dropped; at most `count`.

    Returns:
        bool [patches], dropped patches, including `fixed`.
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
    """Repeatedly make the best exchange of a dropped for a kept patch until none lowers the energy; in place."""
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
