"""Token counts and dtypes for testing kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from _pytest.mark.structures import ParameterSet

from tests.kernels.support import DTYPES, TOKENS
from tests.pairwise import thinned


def counts_and_types(counts: Iterable[int] = TOKENS) -> list[ParameterSet]:
    """(N, dtype): by default every count, and every dtype around each edge of a tile."""
    return thinned(itertools.product(counts, DTYPES), lambda n, dtype: {n, (edge(n), dtype)})


def widths_and_types(widths: Iterable[int]) -> list[ParameterSet]:
    """(D, dtype): by default every width, and every dtype with each size of a tile that holds a row."""
    return thinned(itertools.product(widths, DTYPES), lambda width, dtype: {width, ((width - 1).bit_length(), dtype)})


def edge(n: int) -> int:
    """Key of a token count: equal for counts around one edge of a tile, or around one grid of patches."""
    return next((at for at in (2, 16, 64, 128, 197, 256) if abs(n - at) <= 1), n)
