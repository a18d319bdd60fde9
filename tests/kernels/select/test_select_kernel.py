"""The Triton kernels of vp::select and vp::select_fuse, interpreted, against the references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.counts import counts_and_types, widths_and_types
from tests.kernels.support import TOKENS, assert_within, seeded
from tests.pairwise import thinned
from vp_kernels.select.kernel import launch_select, launch_select_fuse, variants
from vp_kernels.select.reference import select_fuse_reference, select_reference

NAN, INF = float("nan"), float("inf")


def by_rank(scores: Tensor, k: int, by_score: bool) -> Tensor:
    """The specification, literally: rank_i = #(j : s_j > s_i or s_j = s_i and j < i), NaN highest. No sort."""
    s, nan = scores.double(), scores.isnan()
    above = (s[:, :, None] > s[:, None, :]) & ~nan[:, :, None] | nan[:, :, None] & ~nan[:, None, :]  # [B, j, i]
    tie = (s[:, :, None] == s[:, None, :]) | nan[:, :, None] & nan[:, None, :]
    place = torch.arange(scores.shape[1])
    rank = (above | tie & (place[:, None] < place[None, :])).sum(dim=1)  # [B, i]
    if by_score:
        return torch.stack([torch.stack([(row == r).nonzero()[0, 0] for r in range(k)]) for row in rank])
    return torch.stack([(row < k).nonzero()[:, 0] for row in rank])


def check(scores: Tensor, k: int) -> None:
    for by_score in (False, True):
        found = launch_select(scores, k, by_score)
        assert found.dtype == torch.int64
        assert torch.equal(found, by_rank(scores, k, by_score))
        assert torch.equal(found, select_reference(scores, k, by_score))


@pytest.mark.parametrize(
    ("n", "batch"), thinned(itertools.product(TOKENS, (1, 3)), lambda n, batch: {n, (batch, n <= 64, n % 2)})
)
def test_every_count(n: int, batch: int) -> None:
    distinct = seeded(batch, n)
    few = (2 * seeded(batch, n)).round()
    for scores in (distinct, few):
        check(scores, 1 + n * 3 // 5 if n > 1 else 1)


@pytest.mark.parametrize("n", [1, 2, 16, 65])
def test_one_and_all(n: int) -> None:
    for scores in (seeded(2, n), torch.zeros(2, n)):
        check(scores, 1)
        check(scores, n)
        if n > 2:
            check(scores, n - 1)


def test_many_tokens() -> None:
    for n in (500, 1024):
        scores = seeded(1, n).softmax(1)
        assert torch.equal(launch_select(scores, n // 2), select_reference(scores, n // 2))
        constant = torch.full((1, n), 0.25)
        assert torch.equal(launch_select(constant, 300), torch.arange(300)[None])
    assert torch.equal(launch_select(scores, 700, True), select_reference(scores, 700, True))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0, 1e-45, INF, -INF, NAN, -NAN])
def test_constant_scores_keep_the_first(value: float) -> None:
    scores = torch.full((2, 20), value)
    for k in (1, 7, 20):
        for by_score in (False, True):
            assert torch.equal(launch_select(scores, k, by_score), torch.arange(k).expand(2, k))


def test_awkward_values() -> None:
    tiny, small, large = 1e-45, 1.1754944e-38, 3.4028235e38
    row = [-0.0, 0.0, NAN, INF, -INF, tiny, -tiny, small, -small, large, -large, -NAN, 0.0, -0.0, INF, -INF, 1.0, -1.0]
    scores = torch.tensor([row, row[::-1], row[5:] + row[:5]])
    assert scores[0, 5] != 0
    scores[0, 2] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)  # NaNs of different bits tie
    scores[1, 6] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    for k in (1, 3, 5, 6, 10, 13, 16, 18):
        check(scores, k)


def test_neighbouring_bits() -> None:
    """Scores that differ in their last bit only, so the search must run to the end."""
    bits = torch.tensor([[1065353216 + (7 * i) % 5 for i in range(30)], [-1082130432 + (3 * i) % 7 for i in range(30)]])
    scores = bits.to(torch.int32).view(torch.float32)
    for k in (1, 6, 13, 24, 29):
        check(scores, k)


# Few values, for many ties; and any float.
some = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, NAN, INF, -INF])
lists = st.one_of(st.lists(some, min_size=1, max_size=40), st.lists(st.floats(width=32), min_size=1, max_size=40))


@settings(max_examples=40, deadline=None)
@given(lists, st.data())
def test_any_scores(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    scores = torch.tensor([values])
    found, ranked = launch_select(scores, k)[0], launch_select(scores, k, True)[0]
    assert bool((found[1:] > found[:-1]).all())
    assert int(found[0]) >= 0
    assert int(found[-1]) < len(values)
    assert sorted(ranked.tolist()) == found.tolist()
    assert torch.equal(ranked, torch.sort(scores[0], descending=True, stable=True).indices[:k])


def test_a_strided_view() -> None:
    wide = seeded(3, 31)
    view = wide[:, 4:21]
    assert not view.is_contiguous()
    check(view, 9)
    x = seeded(3, 17, 8)
    index, fused = launch_select_fuse(view, x, 9)
    assert torch.equal(index, select_reference(view, 9))
    torch.testing.assert_close(fused, select_fuse_reference(view, x, 9)[1])
    check(seeded(1, 12).expand(3, 12), 5)


def check_fuse(scores: Tensor, x: Tensor, k: int) -> None:
    index, fused = launch_select_fuse(scores, x, k)
    expected, truth = select_fuse_reference(scores, x.double(), k)
    assert torch.equal(index, expected)
    assert_within("fused", fused, truth, bounds.select_fuse(scores, x, k), x.dtype)


@pytest.mark.parametrize(("n", "dtype"), counts_and_types(), ids=str)
def test_fuse_of_every_count(n: int, dtype: torch.dtype) -> None:
    batch, prefix = (3, 1) if n % 2 else (1, n % 3)
    scores = seeded(batch, n).softmax(1)
    check_fuse(scores, seeded(batch, prefix + n, 33, dtype=dtype), 1 + n // 2)


@pytest.mark.parametrize(("width", "dtype"), widths_and_types([1, 7, 64, 65, 192, 384, 576, 769]), ids=str)
def test_fuse_of_every_width(width: int, dtype: torch.dtype) -> None:
    check_fuse(seeded(2, 9).softmax(1), seeded(2, 11, width, dtype=dtype), 4)


def test_fuse_with_ties_and_negative_scores() -> None:
    scores = torch.tensor([[0.25] * 70, [-1.0, 2.0] * 35])
    for k in (1, 35, 69):
        check_fuse(scores, seeded(2, 71, 16), k)


def test_fuse_of_everything_is_zero() -> None:
    for n in (1, 5, 70):
        index, fused = launch_select_fuse(seeded(2, n), torch.full((2, n, 16), NAN, dtype=torch.bfloat16), n)
        assert torch.equal(index, torch.arange(n).expand(2, n))
        assert torch.equal(fused, torch.zeros(2, 1, 16, dtype=torch.bfloat16))


def test_fuse_reads_only_rows_that_were_not_selected() -> None:
    """NaN in the prefix, in selected rows and in other images has no effect; in a fused row it propagates."""
    scores, x = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.4, 0.1, 0.3, 0.2]]), seeded(2, 6, 8)
    clean = select_fuse_reference(scores, x, 2)[1]
    x[:, :2] = NAN
    x[0, 3] = x[0, 4] = x[1, 2] = x[1, 4] = NAN
    torch.testing.assert_close(launch_select_fuse(scores, x, 2)[1], clean)
    x[1, 3, 5] = NAN
    assert launch_select_fuse(scores, x, 2)[1].isnan().nonzero().tolist() == [[1, 0, 5]]


def test_fuse_with_scores_that_are_not_finite() -> None:
    scores = torch.tensor([[NAN, INF, -INF, NAN, 0.5, NAN, INF, -INF]])
    for k in range(1, 9):
        index, fused = launch_select_fuse(scores, torch.ones(1, 8, 4), k)
        expected, truth = select_fuse_reference(scores, torch.ones(1, 8, 4), k)
        assert torch.equal(index, expected)
        torch.testing.assert_close(fused, truth, equal_nan=True)


def test_two_runs_give_the_same_bits() -> None:
    scores, x = seeded(3, 50).softmax(1), seeded(3, 51, 70)
    for first, second in zip(launch_select_fuse(scores, x, 20), launch_select_fuse(scores, x, 20), strict=True):
        assert torch.equal(first, second)
    alone = launch_select_fuse(scores[1:2], x[1:2], 20)[1]  # nor does the batch affect them
    assert torch.equal(alone, launch_select_fuse(scores, x, 20)[1][1:2])


def test_variants_are_what_the_launchers_would_run() -> None:
    names = set()
    for variant in variants():
        names.add(variant.name)
        assert [*variant.signature, *variant.config.constants] == variant.config.kernel.arg_names
        assert set(variant.aligned) <= set(variant.signature)
        assert variant.shapes["n"][1] == variant.config.constants["BLOCK"]
    assert len(names) == 5 * (2 + 5)
