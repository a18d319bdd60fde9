"""Baselines that a method must beat: static masks at block 0 that look at no image."""

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
    """Keeps ceil(keep rate x patches) patches from the start: the others are never embedded."""

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
    """`count` of `patches` positions without replacement, ascending; fewer are a subset of more at the same seed."""
    order = np.argsort(np.random.default_rng(seed).random(patches), kind="stable")
    return tuple(sorted(order[:count].tolist()))


def grid_patches(grid: tuple[int, int], count: int) -> tuple[int, ...]:
    """`count` positions spread evenly: as many in each row as in the others (but for 1), evenly within it, and every
    other row shifted by half a gap, so that half of the patches is a chessboard."""
    rows, columns = grid
    keep = []
    for row in range(rows):
        here = (row + 1) * count // rows - row * count // rows
        # (j + 1/4) or (j + 3/4) gaps of columns / here, in whole numbers.
        keep += [row * columns + (4 * j + (3 if row % 2 else 1)) * columns // (4 * here) for j in range(here)]
    return tuple(keep)


def center_patches(grid: tuple[int, int], patch_size: tuple[int, int], count: int) -> tuple[int, ...]:
    """The `count` positions nearest to the image's centre, measured in pixels; ties to the lowest position."""
    rows, columns = grid
    y = patch_size[0] * (2 * np.arange(rows) - (rows - 1))  # twice the distance, to stay in whole numbers
    x = patch_size[1] * (2 * np.arange(columns) - (columns - 1))
    squared = (y[:, None] ** 2 + x[None, :] ** 2).reshape(-1)
    return tuple(sorted(np.argsort(squared, kind="stable")[:count].tolist()))
