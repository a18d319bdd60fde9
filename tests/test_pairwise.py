"""Coverings of products: every allowed pair, few rows, deterministic."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairwise import covering, pairwise, thinned

axes = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def usual(params: list[Any]) -> list[tuple[Any, ...]]:
    return [param.values for param in params if not param.marks]


def pairs(rows: list[tuple[Any, ...]]) -> set[Any]:
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@settings(max_examples=50, deadline=None)
@given(lengths=axes, banned=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))), odd=st.booleans())
def test_every_allowed_pair_is_covered(lengths: list[int], banned: set[tuple[int, int]], odd: bool) -> None:
    def allowed(*row: int) -> bool:
        return (row[0], row[-1]) not in banned and not (odd and sum(row) % 3 == 0)

    found = pairwise(*(range(length) for length in lengths), allowed=allowed)
    product = [row for row in itertools.product(*(range(length) for length in lengths)) if allowed(*row)]
    assert [param.values for param in found] == product  # in the usual order, so that ids and order are stable
    assert pairs(usual(found)) == pairs(product)


def test_it_is_fewer_and_the_same_each_time() -> None:
    found = pairwise("abcde", "fghi", "jkl", "mno")
    assert len(found) == 180
    assert 20 <= len(usual(found)) <= 25  # 5 x 4 is the minimum of any covering
    assert found == pairwise("abcde", "fghi", "jkl", "mno")


def test_values_need_not_be_hashable_nor_distinct() -> None:
    assert len(usual(pairwise([[1], [1]], [{}, {}], [[], []]))) == 4


def test_goals_of_ones_own() -> None:
    rows = [(kind, size) for kind in "ab" for size in range(6)]
    found = usual(thinned(rows, lambda kind, size: {kind, size}))
    assert {kind for kind, _ in found} == set("ab")
    assert {size for _, size in found} == set(range(6))
    assert len(found) == 6


def test_what_adds_nothing_is_left_out() -> None:
    assert covering([{1}, {1, 2, 3}, {3, 4}, set(), {4}]) == [1, 2]
    assert covering([]) == []


def test_the_marker_is_deselected_by_default(pytestconfig: pytest.Config) -> None:
    words = pytestconfig.getini("addopts")
    assert words[words.index("-m") + 1] == "not exhaustive"


def test_what_is_left_out_is_written_down() -> None:
    """docs/testing.md lists every file that thins its cases."""
    root = Path(__file__).parent
    words = ("pairwise(", "thinned(", "covering(", "counts_and_types(", "widths_and_types(")
    helpers = {Path("pairwise.py"), Path("test_pairwise.py"), Path("kernels/counts.py")}
    thinned_files = {
        path.relative_to(root)
        for path in root.rglob("test_*.py")
        if "tests.pairwise import" in (text := path.read_text()) or "tests.kernels.counts import" in text
        if any(word in text for word in words)
    } - helpers
    table = (root.parent / "docs" / "testing.md").read_text()
    assert thinned_files
    assert sorted(str(path) for path in thinned_files if f"`{path.as_posix()}" not in table) == []
