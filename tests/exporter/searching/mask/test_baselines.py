"""Static baselines: counts are kept, masks are nested, orders match naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exporter.tiny import tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.methods.static import center_patches, grid_patches, random_patches
from vp_exporter.searching.mask.baselines import POWER, baselines, farthest_point, nested, ranked
from vp_exporter.searching.mask.encoding import counts_of, life_of, mask_of, plan_of

_, MODEL = tiny_vit()
NAMES = ["center", "grid", *(f"random {seed}" for seed in range(5)), "fisher prior", "fisher farthest-point"]
COUNTS = st.lists(st.integers(1, MODEL.patches), min_size=MODEL.depth, max_size=MODEL.depth).map(
    lambda counts: tuple(sorted(counts, reverse=True))
)


def importance_of(seed: int, *, ties: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=(MODEL.depth, MODEL.patches))
    return np.floor(values) if ties else values


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99), ties=st.booleans())
def test_every_baseline_keeps_the_counts_and_revives_nothing(counts: tuple[int, ...], seed: int, ties: bool) -> None:
    found = baselines(counts, MODEL, importance_of(seed, ties=ties))
    assert list(found) == NAMES
    for life in found.values():
        assert life.dtype == np.int64
        assert life.shape == (MODEL.patches,)
        assert counts_of(life, MODEL.depth) == counts
        assert np.array_equal(life_of(mask_of(life, MODEL.depth)), life)
        assert [row.attention for row in plan_of(life, MODEL).tokens()] == [MODEL.prefix_tokens + n for n in counts]


@given(counts=COUNTS, seed=st.integers(0, 4))
def test_center_and_random_are_those_of_the_methods_at_every_block(counts: tuple[int, ...], seed: int) -> None:
    found = baselines(counts, MODEL, importance_of(0))
    for block, count in enumerate(counts):
        center = np.flatnonzero(found["center"] > block)
        assert tuple(center) == center_patches(MODEL.grid, MODEL.patch_size, count)
        drawn = np.flatnonzero(found[f"random {seed}"] > block)
        assert tuple(drawn) == random_patches(MODEL.patches, count, seed)


@given(counts=COUNTS)
def test_grid_is_that_of_the_methods_in_the_first_block(counts: tuple[int, ...]) -> None:
    life = baselines(counts, MODEL, importance_of(0))["grid"]
    assert tuple(np.flatnonzero(life)) == grid_patches(MODEL.grid, counts[0])


def test_later_grid_sets_stay_spread() -> None:
    """In a full 4 x 4 grid, the farthest points from the corner are the four corners."""
    life = baselines((16, 16, 4, 4), MODEL, importance_of(0))["grid"]
    assert np.flatnonzero(life == 4).tolist() == [0, 3, 12, 15]


@given(counts=COUNTS, seed=st.integers(0, 99), ties=st.booleans())
def test_fisher_prior_drops_the_least_important_of_those_alive(counts: tuple[int, ...], seed: int, ties: bool) -> None:
    importance = importance_of(seed, ties=ties)
    alive = set(range(MODEL.patches))
    life = ranked(importance, counts)
    for block, count in enumerate(counts):
        while len(alive) > count:  # ties: the highest position is dropped first
            alive.remove(min(alive, key=lambda i: (importance[block, i], -i)))
        assert set(np.flatnonzero(life > block)) == alive
    assert np.array_equal(baselines(counts, MODEL, importance)["fisher prior"], life)


@given(count=st.integers(1, 16), seed=st.integers(0, 99))
def test_fisher_prior_at_a_single_count_is_the_top_of_the_first_row(count: int, seed: int) -> None:
    importance = importance_of(seed)
    life = ranked(importance, (count,) * MODEL.depth)
    assert set(np.flatnonzero(life)) == set(sorted(range(16), key=lambda i: -importance[0, i])[:count])
    assert set(life.tolist()) <= {0, MODEL.depth}


def slow_farthest(grid: tuple[int, int], weights: np.ndarray, among: list[int]) -> list[int]:
    """O(n^3): every step, every candidate, every chosen one."""
    order: list[int] = []
    while len(order) < len(among):
        best, best_score = -1, -1.0
        for i in sorted(among):
            if i in order:
                continue
            score = float(weights[i])
            if order:
                score *= min(
                    math.sqrt((i // grid[1] - j // grid[1]) ** 2 + (i % grid[1] - j % grid[1]) ** 2) for j in order
                )
            if score > best_score:
                best, best_score = i, score
        order.append(best)
    return order


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 6), seed=st.integers(0, 999), kind=st.integers(0, 2), data=st.data()
)
def test_farthest_points_are_those_of_the_slow_loop(
    rows: int, columns: int, seed: int, kind: int, data: st.DataObject
) -> None:
    patches = rows * columns
    weights = np.random.default_rng(seed).exponential(size=patches)
    if kind == 1:
        weights = np.floor(weights)  # ties, and zeros
    if kind == 2:
        weights = np.ones(patches)
    among = data.draw(st.lists(st.integers(0, patches - 1), min_size=1, unique=True))
    assert farthest_point((rows, columns), weights, among) == slow_farthest((rows, columns), weights, among)
    everywhere = farthest_point((rows, columns), weights)
    assert everywhere == slow_farthest((rows, columns), weights, list(range(patches)))
    assert sorted(everywhere) == list(range(patches))


@given(counts=COUNTS, seed=st.integers(0, 99))
def test_fisher_farthest_point_keeps_prefixes_of_one_order(counts: tuple[int, ...], seed: int) -> None:
    importance = importance_of(seed)
    found = baselines(counts, MODEL, importance)["fisher farthest-point"]
    order = slow_farthest(MODEL.grid, (importance[0] / importance[0].max()) ** POWER, list(range(16)))
    for block, count in enumerate(counts):
        assert set(np.flatnonzero(found > block)) == set(order[:count])
    assert found[int(np.argmax(importance[0]))] == MODEL.depth


@pytest.mark.parametrize("level", [0.0, 1.0, 1e-300])
def test_ties_everywhere_are_settled_by_position(level: float) -> None:
    counts, flat = (9, 9, 5, 2), np.full((MODEL.depth, MODEL.patches), level)
    first, again = baselines(counts, MODEL, flat), baselines(counts, MODEL, flat.copy())
    for name, life in first.items():
        assert np.array_equal(life, again[name])
    assert np.flatnonzero(first["fisher prior"] == 4).tolist() == [0, 1]
    assert np.flatnonzero(first["fisher prior"]).tolist() == list(range(9))
    assert np.flatnonzero(first["fisher farthest-point"] == 4).tolist() == [0, 15]


def test_nested_is_prefixes_of_the_order() -> None:
    assert nested([2, 0, 3, 1], (3, 2, 2)).tolist() == [3, 0, 3, 1]
    assert nested([4, 1], (2, 1), 6).tolist() == [0, 1, 0, 0, 2, 0]


@pytest.mark.parametrize("counts", [(), (3, 4), (5, 1), (2, 0)])
def test_bad_counts_are_one_clear_line(counts: tuple[int, ...]) -> None:
    with pytest.raises(SearchError, match="counts of patches"):
        nested([0, 1, 2, 3], counts)
    with pytest.raises(SearchError, match="counts of patches"):
        ranked(np.ones((len(counts), 4)), counts)


def test_other_bad_input_is_one_clear_line() -> None:
    for order in ([0, 1], [0, 1, 1], [0, 1, 9]):
        with pytest.raises(SearchError, match="an order of"):
            nested(order, (3, 1), 4)
    with pytest.raises(SearchError, match="2 counts"):
        baselines((3, 2), MODEL, importance_of(0))
    bad = importance_of(0)
    bad[1, 1] = np.nan
    for wrong in (bad, -importance_of(0), importance_of(0)[:2]):
        with pytest.raises(SearchError, match="importance"):
            baselines((3, 2, 2, 2), MODEL, wrong)
