"""r at each block, by hand and as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vp_exporter.methods.options import SHAPES
from vp_exporter.methods.schedule import counts_of, cut, share_of, slope, whole


def test_shapes_by_hand() -> None:
    assert slope("constant", 3, 13) == [13, 13, 13]
    assert slope("decreasing", 5, 8) == [16, 12, 8, 4, 0]
    assert slope("increasing", 5, 8) == [0, 4, 8, 12, 16]
    assert slope("decreasing", 1, 8) == slope("increasing", 1, 8) == [8]


def test_rounding_by_hand() -> None:
    assert whole([2.5, 2.5, 2.5, 2.5]) == [3, 2, 3, 2]
    assert whole([0.3] * 10) == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0]  # sums .3 .6 .9 1.2 1.5 1.8 2.1 2.4 2.7 3
    assert whole([13.0] * 12) == [13] * 12


def test_a_slope_is_truncated_block_by_block() -> None:
    """ToMe's (16, -1) over 12 blocks leaves 10 of 197 tokens; with rounded counts it would be 5."""
    down = [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert counts_of("decreasing", 12, 16) == down
    assert counts_of("increasing", 12, 16) == down[::-1]
    assert 197 - sum(down) == 10
    assert counts_of("increasing", 12, 13)[-1] == 26  # floating-point noise does not truncate 26 / 11 * 11 to 25
    assert counts_of("decreasing", 12, 13)[-1] == 0
    assert counts_of("constant", 4, 2.5) == [3, 2, 3, 2]  # for a MAC target, total counts matter
    assert counts_of("decreasing", 1, 13) == [13]


@given(
    shape=st.sampled_from(SHAPES), blocks=st.integers(1, 40), r=st.one_of(st.integers(1, 200), st.floats(0.01, 200.0))
)
def test_the_sum_is_blocks_times_r(shape: str, blocks: int, r: float) -> None:
    exact = slope(shape, blocks, r)
    counts = whole(exact)
    assert sum(exact) == pytest.approx(blocks * r)
    assert abs(sum(counts) - blocks * r) <= 0.5 + 1e-6
    assert all(abs(count - value) < 1 + 1e-6 for count, value in zip(counts, exact, strict=True))
    assert min(counts) >= 0
    if shape != "constant" and blocks > 1:
        assert exact == sorted(exact, reverse=shape == "decreasing")
        assert sorted((exact[0], exact[-1])) == pytest.approx([0, 2 * r])


def test_cut_to_half_by_hand() -> None:
    """197 tokens, r = 16: the last block has 20 patch tokens and merges 10 (ToMe's README: 11 tokens left)."""
    counts = cut([16] * 12, 196, lambda n: n // 2)
    assert counts == [16] * 11 + [10]
    assert 197 - sum(counts) == 11


def test_the_first_block_is_not_cut() -> None:
    assert cut([120, 120], 196, lambda n: n // 2) == [120, 38]
    assert cut([0, 120, 120], 196, lambda n: n // 2) == [0, 120, 38]
    assert cut([120, 120], 196, lambda n: n // 2, first=True) == [98, 49]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_cut_leaves_what_every_step_takes(counts: list[int], patches: int) -> None:
    done = cut(counts, patches, lambda n: n // 2)
    acting = 0
    for asked, taken in zip(counts, done, strict=True):
        assert taken <= asked
        assert not acting or taken == min(asked, patches // 2)
        acting += taken > 0
        patches = max(1, patches - taken)


def test_share_of() -> None:
    assert share_of(0.7, 196) == 138  # 137.2
    assert share_of(0.1, 30) == 3  # 0.1 * 30 is a little above 3 in floating point
    assert share_of(0.5, 10) == 5
    assert share_of(1e-9, 196) == 1
