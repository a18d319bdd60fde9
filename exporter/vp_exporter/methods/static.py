"""Static baselines: masks at block 0 that do not depend on the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vp_exporter.methods.base import Family, Method, Steps
from vp_exporter.methods.options import MethodOptions
from vp_exporter.methods.schedule import share_of
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers import StaticStep


@dataclass(frozen=True)
class StaticMethod(Method):
    """Keeps ceil(keep rate x patches) patches at the input; the others are never embedded."""

    def steps(self, request: MethodOptions, model: ModelSpec) -> Steps:
        assert request.keep_rate is not None
        return self._kept(request, model, share_of(request.keep_rate, model.patches))

    def family(self, request: MethodOptions, model: ModelSpec) -> Family:
        def count(u: float) -> int:
            return model.patches - round(u * (model.patches - 1))

        return Family(
            at=lambda u: self._kept(request, model, count(u)),
            setting=lambda u: {"patches": count(u)},
            bound="block 0 keeps at least 1 patch token",
        )

    def _kept(self, request: MethodOptions, model: ModelSpec, count: int) -> Steps:
        if count == model.patches:
            return ()
        if self.name == "random":
            keep = random_patches(model.patches, count, request.seed or 0)
        elif self.name == "grid":
            keep = grid_patches(model.grid, count)
        else:
            keep = center_patches(model.grid, model.patch_size, count)
        return (StaticStep(0, keep),)


def random_patches(patches: int, count: int, seed: int) -> tuple[int, ...]:
    """Sample `count` of `patches` positions, ascending; with one seed, smaller samples are subsets of larger ones."""
    order = np.argsort(np.random.default_rng(seed).random(patches), kind="stable")
    return tuple(sorted(order[:count].tolist()))


def grid_patches(grid: tuple[int, int], count: int) -> tuple[int, ...]:
    """Spread `count` positions evenly: equally many per row (within 1), evenly spaced in each row.

    Every other row is shifted by half a gap, so half of the patches form a chessboard.
    """
    rows, columns = grid
    keep = []
    for row in range(rows):
        here = (row + 1) * count // rows - row * count // rows
        # (j + 1/4) or (j + 3/4) gaps of columns / here, in integers.
        keep += [row * columns + (4 * j + (3 if row % 2 else 1)) * columns // (4 * here) for j in range(here)]
    return tuple(keep)


def center_patches(grid: tuple[int, int], patch_size: tuple[int, int], count: int) -> tuple[int, ...]:
    """The `count` positions nearest to the image centre, in pixels; ties to the lowest position."""
    rows, columns = grid
    y = patch_size[0] * (2 * np.arange(rows) - (rows - 1))  # twice the distance, to keep integers
    x = patch_size[1] * (2 * np.arange(columns) - (columns - 1))
    squared = (y[:, None] ** 2 + x[None, :] ** 2).reshape(-1)
    return tuple(sorted(np.argsort(squared, kind="stable")[:count].tolist()))
