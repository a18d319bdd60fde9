"""Static masks that a search must beat, at the same count of patches in every block, so at the same cost."""

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

# The importance is a squared gradient: its root is in the gradient's own unit, and a distance is not squared either.
POWER = 0.5


def baselines(
    counts: Sequence[int],
    description: ModelSpec,
    importance: np.ndarray,
    *,
    seeds: Iterable[int] = range(5),
    power: float = POWER,
) -> dict[str, np.ndarray]:
    """Masks at given counts, none of which runs the model.

    - "center": nearest to the image's centre (vp_exporter.methods.static).
    - "grid": block 0 keeps the even grid of vp_exporter.methods.static. Those of two counts are not nested, so later
      blocks keep the first of them in unweighted farthest-point order, beginning in the corner.
    - "random S": drawn by seed S; nested.
    - "fisher prior": from the first block to the last, keep the patches whose loss from this block on costs most, of
      those still alive. (From the last to the first would let the last block decide who is embedded.)
    - "fisher farthest-point": the first patches of one farthest-point order weighted by importance[0] ** power.

    Args:
        counts: patches alive in each block, never rising.
        description: of the model.
        importance: float [depth, patches], the cost of losing a patch there (vp_exporter.searching.mask.fisher).
        seeds: of the random masks.
        power: flattens (below 1) the weights of the farthest-point order; 0 takes all alike.

    Returns:
        name -> lifetimes int64 [patches] (vp_exporter.searching.mask.encoding).

    Raises:
        SearchError: counts or an importance that do not fit the model.
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
    """`farthest_point` with the weights that an importance float [patches] makes; one of zeros takes all alike."""
    top = importance.max()
    return farthest_point(grid, (importance / top if top > 0 else np.ones(len(importance))) ** power)


def nested(order: Sequence[int], counts: Sequence[int], patches: int | None = None) -> np.ndarray:
    """Every block keeps the first of one order.

    Args:
        order: positions of patches, most wanted first; at least counts[0] of them.
        counts: patches alive in each block, never rising.
        patches: of the model; None where the order names them all.

    Returns:
        lifetimes int64 [patches].

    Raises:
        SearchError: counts that rise or do not fit, or an order that is too short or names a patch twice.
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
    """From the first block to the last, keep the most important in this block of those still alive.

    Args:
        importance: float [depth, patches].
        counts: patches alive in each block, never rising.

    Returns:
        lifetimes int64 [patches]; ties go to the lowest position.

    Raises:
        SearchError: counts that rise or do not fit.
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
    """Order patches so that the first of them are spread over the image, and denser where the weight is larger.

    The first is the heaviest; each next one has the largest weight x distance to the nearest chosen before it
    (Gonzalez 1985, weighted). Distances are Euclidean, in patches; ties go to the lowest position.

    Args:
        grid: rows and columns of patches.
        weights: float [patches], 0 or more.
        among: order these only; None for all.

    Returns:
        Positions, each once.
    """
    rest = np.arange(grid[0] * grid[1]) if among is None else np.sort(np.asarray(among, dtype=np.int64))
    distances = np.sqrt(squared_distances(grid))
    weight, chosen = np.asarray(weights, dtype=np.float64)[rest], np.zeros(len(rest), dtype=bool)
    nearest = np.ones(len(rest))  # the first is chosen by weight alone
    order: list[int] = []
    for turn in range(len(rest)):
        # A chosen one scores below all, also where every weight that is left is 0.
        at = int(np.argmax(np.where(chosen, -1.0, weight * nearest)))
        chosen[at] = True
        order.append(int(rest[at]))
        distance = distances[rest[at], rest]
        nearest = distance if turn == 0 else np.minimum(nearest, distance)
    return order


def _random(patches: int, seed: int, count: int) -> tuple[int, ...]:
    return random_patches(patches, count, seed)


def _by_count(pick: Callable[[int], Sequence[int]], counts: Sequence[int], patches: int) -> np.ndarray:
    """Lifetimes int64 [patches] of sets that are nested by themselves."""
    life = np.zeros(patches, dtype=np.int64)
    for count in counts:
        life[list(pick(count))] += 1
    return life


def _check(counts: Sequence[int], patches: int) -> None:
    """Counts that a plan can have."""
    if not counts or counts[0] > patches or counts[-1] < 1 or any(a < b for a, b in pairwise(counts)):
        raise SearchError(
            f"counts of patches {list(counts)}",
            expected=f"at least 1 and at most {patches}, never rising with the block",
        )
