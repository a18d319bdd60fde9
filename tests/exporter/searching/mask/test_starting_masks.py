"""Starting masks with spread-out drops, against a brute-force energy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vp_exporter.searching.mask.encoding import counts_of, mask_of
from vp_exporter.searching.mask.starting_masks import PULLS, REACHES, drop, energy, kernel, starting_masks


def slow_energy(grid: tuple[int, int], reach: float, worth: np.ndarray, dropped: list[int]) -> float:
    total = sum(worth[i] for i in dropped)
    for i, j in combinations(dropped, 2):
        (r, c), (s, d) = divmod(i, grid[1]), divmod(j, grid[1])
        total += np.exp(-((r - s) ** 2 + (c - d) ** 2) / (2 * reach**2))
    return float(total)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 5), reach=st.floats(0.3, 3.0))
def test_energy_is_the_sum_over_pairs(data: st.DataObject, rows: int, columns: int, reach: float) -> None:
    patches = rows * columns
    dropped = data.draw(st.sets(st.integers(0, patches - 1)))
    worth = np.array(data.draw(st.lists(st.floats(0, 2), min_size=patches, max_size=patches)))
    mask = np.isin(np.arange(patches), list(dropped))
    expected = slow_energy((rows, columns), reach, worth, sorted(dropped))
    assert energy(kernel((rows, columns), reach), worth, mask) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("grid", "count"), [((3, 4), 4), ((4, 3), 6), ((2, 6), 9)])
@pytest.mark.parametrize("reach", REACHES)
def test_small_grids_reach_the_optimum(grid: tuple[int, int], count: int, reach: float) -> None:
    patches, near = grid[0] * grid[1], kernel(grid, reach)
    worth = np.random.default_rng(0).random(patches)
    found = drop(near, worth, count, np.zeros(patches, dtype=bool), seed=0)
    assert found.sum() == count
    best = min(slow_energy(grid, reach, worth, list(chosen)) for chosen in combinations(range(patches), count))
    assert energy(near, worth, found) == pytest.approx(best, rel=1e-9)


def test_two_of_two_by_two_lie_on_a_diagonal() -> None:
    found = drop(kernel((2, 2), 1.0), np.zeros(4), 2, np.zeros(4, dtype=bool), seed=0)
    assert found.tolist() in ([True, False, False, True], [False, True, True, False])


def test_the_worthless_go_where_nothing_repels() -> None:
    worth = np.array([3.0, 1.0, 2.0, 0.5])
    found = drop(np.zeros((4, 4)), worth, 2, np.zeros(4, dtype=bool), seed=0)
    assert found.tolist() == [False, True, False, True]


@pytest.mark.parametrize("counts", [(16, 16, 16), (11, 11, 11), (16, 10, 4), (9, 5, 1)])
def test_masks_have_the_counts_and_revive_nothing(counts: tuple[int, ...]) -> None:
    importance = np.random.default_rng(1).random(16)
    found = starting_masks(counts, (4, 4), importance)
    assert len(found) == len(REACHES) * len(PULLS)
    for name, life in found.items():
        assert counts_of(life, len(counts)) == counts, name
        assert mask_of(life, len(counts)).sum() == sum(counts)
    again = starting_masks(counts, (4, 4), importance)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_importance_holds_patches_back() -> None:
    importance = np.ones(64)
    importance[:8] = 1e4  # the first row
    found = starting_masks((40,), (8, 8), importance)
    for reach in REACHES:
        free, held = (found[f"spread {reach:g}{name}"][:8].sum() for name in ("", " by importance"))
        assert held > free


def test_no_importance_at_all_is_no_error() -> None:
    found = starting_masks((5, 5), (3, 3), np.zeros(9))
    assert np.array_equal(found["spread 1.2"], found["spread 1.2 by importance"])
