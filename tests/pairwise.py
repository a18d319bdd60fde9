"""Thinned products of parameters: by default every pair of values is tested, on request every combination.

The rest is marked `exhaustive`, which pyproject.toml deselects (`make test-exhaustive` runs everything).

allpairspy is not used: under constraints, its search stops before every allowed pair has been found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

Row = Sequence[Any]


def pairwise(*axes: Iterable[Any], allowed: Callable[..., bool] = lambda *_: True) -> list[ParameterSet]:
    """The product of `axes` for `pytest.mark.parametrize`, in its usual order.

    Any two values of two axes that occur together in an allowed row do so in a row that is not `exhaustive`. For two
    axes that is the whole product; see `thinned`.

    Args:
        axes: Values of each argument.
        allowed: Called with a row as arguments; rows for which it is false are left out.
    """
    values = [list(axis) for axis in axes]
    places = list(itertools.product(*(range(len(axis)) for axis in values)))
    rows = [tuple(axis[at] for axis, at in zip(values, row, strict=True)) for row in places]
    kept = [number for number, row in enumerate(rows) if allowed(*row)]
    pairs = [set(itertools.combinations(enumerate(places[number]), 2)) for number in kept]
    return _marked([rows[number] for number in kept], pairs)


def thinned(rows: Iterable[Row], goals: Callable[..., Iterable[Hashable]]) -> list[ParameterSet]:
    """Rows for `pytest.mark.parametrize`; the fewest that reach every goal of any row are not `exhaustive`.

    Args:
        goals: Called with a row as arguments; returns what the row tests.
    """
    listed = list(rows)
    return _marked(listed, [set(goals(*row)) for row in listed])


def covering(goals: Sequence[set[Any]]) -> list[int]:
    """Indices of sets that together cover the union of all, greedily chosen, in order."""
    left = set().union(*goals)
    chosen = []
    while left:
        best = max(range(len(goals)), key=lambda number: len(goals[number] & left))  # max returns the first
        chosen.append(best)
        left -= goals[best]
    return sorted(chosen)


def _marked(rows: list[Row], goals: Sequence[set[Any]]) -> list[ParameterSet]:
    usual = set(covering(goals))
    return [pytest.param(*row, marks=[] if at in usual else pytest.mark.exhaustive) for at, row in enumerate(rows)]
