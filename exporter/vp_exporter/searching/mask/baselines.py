"""Baseline masks for a search, with the same number of patches in every block and thus at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from vp_exporter.errors import SearchError
from vp_exporter.methods.static import center_patches, grid_patches, random_patches
from vp_exporter.model.spec import ModelSpec
from vp_exporter.searching.mask.starting_masks import squared_distances

PRIOR = "fisher prior"

# The importance is a squared gradient; its root has the gradient's unit, as distances are not squared either.
POWER = 0.5


def baselines(
    counts: Sequence[int],
    description: ModelSpec,
    importance: np.ndarray,
    *,
    seeds: Iterable[int] = range(5),
    power: float = POWER,
) -> dict[str, np.ndarray]:
    """Masks at given counts, none of which needs to run the model.

    - "center": nearest to the image centre (vp_exporter.methods.static).
    - "grid": block 0 keeps the even grid of vp_exporter.methods.static. Grids of different counts are not nested, so
      later blocks keep the first of them in unweighted farthest-point order, starting in the corner.
    - "random S": random with seed S; nested.
    - "fisher prior": from the first block to the last, keep the remaining patches whose loss from this block on costs
      most. (From the last to the first, the last block would decide which patches are embedded.)
    - "fisher farthest-point": the first patches of one farthest-point order weighted by importance[0] ** power.

    Args:
        counts: Patches in each block, non-increasing.
        description: Description of the model.
        importance: float [depth, patches], cost of losing a patch there (vp_exporter.searching.mask.fisher).
        seeds: Seeds of the random masks.
        power: Exponent of the weights of the farthest-point order; 0 gives equal weights.

    Returns:
        name -> lifetimes int64 [patches] (vp_exporter.searching.mask.encoding).

    Raises:
        SearchError: if counts or importance do not fit the model.
    """
    patches, grid = description.patches, description.grid
    _check(counts, patches)
    if len(counts) != description.depth:
        raise SearchError(f"{len(counts)} counts", expected=f"{description.depth}, one for each block")
    importance = np.asarray(importance, dtype=np.float64)
    if importance.shape != (description.depth, patches) or not (np.isfinite(importance) & (importance >= 0)).all():
        raise SearchError(
            f"an importance of shape {list(importance.shape)}, or with NaN, infinite or negative values",
            expected=f"finite values, 0 or more, of shape [{description.depth}, {patches}]",
        )
    even = grid_patches(grid, counts[0])
    found = {
        "center": _by_count(lambda count: center_patches(grid, description.patch_size, count), counts, patches),
        "grid": nested(farthest_point(grid, np.ones(patches), among=even), counts, patches),
    }
    for seed in seeds:
        found[f"random {seed}"] = _by_count(partial(_random, patches, seed), counts, patches)
    found[PRIOR] = ranked(importance, counts)
    found["fisher farthest-point"] = nested(farthest_point_order(importance[0], grid, power=power), counts, patches)
    return found


def farthest_point_order(importance: np.ndarray, grid: tuple[int, int], *, power: float = POWER) -> list[int]:
    """`farthest_point` weighted by an importance, float [patches]; if it is all zeros, with equal weights."""
    top = importance.max()
    return farthest_point(grid, (importance / top if top > 0 else np.ones(len(importance))) ** power)


def nested(order: Sequence[int], counts: Sequence[int], patches: int | None = None) -> np.ndarray:
    """Let every block keep the first patches of one order.

    Args:
        order: Patch positions, best first; at least counts[0] of them.
        counts: Patches in each block, non-increasing.
        patches: Patches of the model; None if the order includes all.

    Returns:
        lifetimes int64 [patches].

    Raises:
        SearchError: if counts increase or do not fit, or the order is too short or has duplicates.
    """
    patches = len(order) if patches is None else patches
    _check(counts, patches)
    if len(order) < counts[0] or len(set(order)) != len(order) or not set(order) <= set(range(patches)):
        raise SearchError(
            f"an order of {len(order)} patches, {len(set(order))} of them different",
            expected=f"{counts[0]} or more different ones of 0 to {patches - 1}",
        )
    return _by_count(lambda count: order[:count], counts, patches)


def ranked(importance: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """From the first block to the last, keep the most important of the remaining patches.

    Args:
        importance: float [depth, patches].
        counts: Patches in each block, non-increasing.

    Returns:
        lifetimes int64 [patches]; ties go to the lowest position.

    Raises:
        SearchError: if counts increase or do not fit.
    """
    patches = importance.shape[1]
    _check(counts, patches)
    life, alive = np.zeros(patches, dtype=np.int64), np.arange(patches)
    for row, count in zip(importance, counts, strict=True):
        if count < len(alive):
            alive = np.sort(alive[np.argsort(-row[alive], kind="stable")[:count]])
        life[alive] += 1
    return life


def farthest_point(grid: tuple[int, int], weights: np.ndarray, among: Sequence[int] | None = None) -> list[int]:
    """Order patches such that the first ones are spread over the image, more densely where the weight is larger.

    The first is the heaviest; each next one maximises weight x distance to the nearest one chosen before (Gonzalez
    1985, weighted). Distances are Euclidean, in patches; ties go to the lowest position.

    Args:
        grid: Rows and columns of patches.
        weights: float [patches], 0 or more.
        among: Patches to order; None for all.

    Returns:
        Positions, without duplicates.
    """
    rest = np.arange(grid[0] * grid[1]) if among is None else np.sort(np.asarray(among, dtype=np.int64))
    distances = np.sqrt(squared_distances(grid))
    weight, chosen = np.asarray(weights, dtype=np.float64)[rest], np.zeros(len(rest), dtype=bool)
    nearest = np.ones(len(rest))  # the first is chosen by weight alone
    order: list[int] = []
    for turn in range(len(rest)):
        # Chosen patches rank below all others, even those of weight 0.
        at = int(np.argmax(np.where(chosen, -1.0, weight * nearest)))
        chosen[at] = True
        order.append(int(rest[at]))
        distance = distances[rest[at], rest]
        nearest = distance if turn == 0 else np.minimum(nearest, distance)
    return order


def _random(patches: int, seed: int, count: int) -> tuple[int, ...]:
    return random_patches(patches, count, seed)


def _by_count(pick: Callable[[int], Sequence[int]], counts: Sequence[int], patches: int) -> np.ndarray:
    """Lifetimes int64 [patches] from sets that are nested."""
    life = np.zeros(patches, dtype=np.int64)
    for count in counts:
        life[list(pick(count))] += 1
    return life


def _check(counts: Sequence[int], patches: int) -> None:
    """Check that counts are valid in a plan."""
    if not counts or counts[0] > patches or counts[-1] < 1 or any(a < b for a, b in pairwise(counts)):
        raise SearchError(
            f"counts of patches {list(counts)}",
            expected=f"at least 1 and at most {patches}, never rising with the block",
        )
