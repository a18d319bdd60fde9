"""Baseline masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vp_exporter.methods import MethodRequest, build_plan
from vp_exporter.methods.static import center_patches, grid_patches, random_patches
from vp_exporter.model.spec import ModelSpec

GRIDS = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(grid=GRIDS, share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_every_mask_holds_its_count(grid: tuple[int, int], share: float, seed: int) -> None:
    patches = grid[0] * grid[1]
    count = max(1, round(share * patches))
    for keep in (
        random_patches(patches, count, seed),
        grid_patches(grid, count),
        center_patches(grid, (16, 16), count),
    ):
        assert len(keep) == count
        assert list(keep) == sorted(set(keep))
        assert 0 <= keep[0] <= keep[-1] < patches


@given(grid=GRIDS, share=st.floats(0, 1))
def test_grid_is_even(grid: tuple[int, int], share: float) -> None:
    """Rows differ by at most 1; within a row, so do the gaps."""
    count = max(1, round(share * grid[0] * grid[1]))
    rows, columns = np.divmod(np.array(grid_patches(grid, count)), grid[1])
    per_row = np.bincount(rows, minlength=grid[0])
    assert per_row.max() - per_row.min() <= 1
    for row in range(grid[0]):
        gaps = np.diff(columns[rows == row])
        assert not gaps.size or gaps.max() - gaps.min() <= 1


def test_half_of_a_grid_is_a_chessboard() -> None:
    board = np.zeros(16, dtype=int)
    board[list(grid_patches((4, 4), 8))] = 1
    assert board.reshape(4, 4).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_center() -> None:
    assert center_patches((4, 4), (16, 16), 4) == (5, 6, 9, 10)
    assert center_patches((3, 3), (16, 16), 1) == (4,)
    assert center_patches((3, 3), (16, 16), 2) == (1, 4)  # four are equally near: the lowest position
    assert center_patches((3, 3), (32, 8), 3) == (3, 4, 5)  # patches four times as high as wide
    assert center_patches((14, 14), (16, 16), 196) == tuple(range(196))


def test_random_is_seeded_and_nested() -> None:
    assert random_patches(196, 50, 1) == random_patches(196, 50, 1)
    assert random_patches(196, 50, 1) != random_patches(196, 50, 2)
    assert set(random_patches(196, 50, 1)) < set(random_patches(196, 90, 1))


@pytest.mark.parametrize("method", ["random", "grid", "center"])
def test_plan(method: str, deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest(method, keep_rate=0.6), deit_s)
    assert [step.block for step in plan.steps] == [0]
    assert {row.attention for row in plan.tokens()} == {1 + 118}  # ceil(117.6) and the class token
    assert not plan.proportional_attention
    assert plan.method == method


def test_seed_reaches_the_plan(deit_s: ModelSpec) -> None:
    plans = [build_plan(MethodRequest("random", keep_rate=0.6, seed=seed), deit_s) for seed in (None, 0, 1)]
    assert plans[0].steps == plans[1].steps != plans[2].steps
    assert [plan.provenance["seed"] for plan in plans] == [0, 0, 1]
