"""vp::match_merge's kernels, interpreted, against the reference and the exporter's own reducers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.counts import counts_and_types
from tests.kernels.match_merge.cases import MARGIN, few_directions, keys, margins, peaked, sizes
from tests.kernels.support import DTYPES, TOKENS, assert_within, seeded
from vp_exporter.reducers.ppt import PptStep
from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens
from vp_exporter.reducers.tome import TomeStep
from vp_kernels.match_merge.kernel import config, launch_match, launch_match_merge, variants
from vp_kernels.match_merge.reference import match_reference
from vp_kernels.merge_rows.kernel import launch_merge_rows
from vp_kernels.merge_rows.reference import merge_rows_reference

TOTALS = {"images": 0, "in doubt": 0}


def check(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> None:
    """Compare the kernels with the reference, for images without near-ties."""
    clear = margins(metric, r, prefix, scores, tau) >= MARGIN
    TOTALS["images"] += len(clear)
    TOTALS["in doubt"] += int((~clear).sum())
    found = launch_match_merge(x, metric, size, r, prefix, scores, tau)
    # Decisions are made in fp32 on the given values; results are compared with fp64.
    chosen = match_reference(metric, size, r, prefix, scores, tau)
    truth = merge_rows_reference(x.double(), *chosen)
    assert found[0].shape == (x.shape[0], x.shape[1] - r, x.shape[2])
    limits, dtypes = bounds.merge_rows(x, *chosen), (x.dtype, torch.float32)
    for name, ours, true, bound, dtype in zip(("x", "size"), found, truth, limits, dtypes, strict=True):
        assert_within(name, ours[clear], true[clear], bound[clear], dtype)
    portable = exporters(x.float(), metric, size, r, prefix, scores, tau)
    assert portable.size is not None
    assert torch.equal(found[1][clear], portable.size[clear])
    if x.dtype == torch.float32:
        torch.testing.assert_close(found[0][clear], portable.x[clear], rtol=1e-5, atol=1e-5)


def exporters(
    x: Tensor, metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None, tau: float
) -> Stream:
    """The portable reducers, as run by an engine without our operators."""
    summed = metric.float().sum(2) if metric.ndim == 4 else metric.float()
    stream = Stream(x, prefix, size)
    step: TomeStep | PptStep = TomeStep(0, r)
    statistics = AttentionStatistics(keys=summed)
    if scores is not None:
        step = PptStep(0, r, tau)
        padded = torch.nn.functional.pad(scores, (prefix, 0))
        statistics = AttentionStatistics(keys=summed, class_attention=padded, value_norm=torch.ones_like(padded))
    return reduce_tokens(stream, step.choose(stream, statistics), carry_size=True)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "dtype"), counts_and_types(n for n in TOKENS if n > 1), ids=str)
def test_like_the_reference(tokens: int, dtype: torch.dtype) -> None:
    number = tokens + DTYPES.index(dtype)
    for i, prefix in enumerate((0, 1, 2) if tokens < 60 else (number % 3,)):
        patches = tokens - prefix
        if patches < 2:
            continue
        most = patches // 2
        r = (1, most, max(1, most // 3))[(number + i) % 3]
        batch, heads = ((1, 0), (3, 2), (1, 2), (3, 0))[(number + i) % 4] if tokens < 200 else (1, 2)
        metric = keys(batch, tokens, heads, (8, 17, 64)[(number + i) % 3], dtype, seed=i)
        size = sizes(batch, tokens) if (number + i) % 2 else None
        scores, tau = peaked(batch, patches) if (number // 2 + i) % 2 else (None, 0.0)
        check(seeded(batch, tokens, 24, dtype=dtype), metric, size, r, prefix, scores, tau)


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, 2, 13, 14])
@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
def test_every_amount_and_prefix(prefix: int, r: int) -> None:
    tokens = 28 + prefix
    metric = keys(3, tokens, 3, 16, seed=r)
    scores, tau = peaked(3, 28)
    check(seeded(3, tokens, 8), metric, None, r, prefix)
    check(seeded(3, tokens, 8), metric, sizes(3, tokens), r, prefix, scores, tau)


@pytest.mark.parametrize("width", [2, 31, 80, 128, 200])
def test_widths_of_the_metric(width: int) -> None:
    check(seeded(1, 40, 8), keys(1, 40, 0, width, seed=1), None, 12, 1)


@pytest.mark.parametrize(
    ("tokens", "heads", "flags"), [(300, 4, (True, True)), (259, 1, (False, False)), (140, 7, (False, True))]
)
def test_more_tokens_than_one_tile_holds(tokens: int, heads: int, flags: tuple[bool, bool]) -> None:
    width = 16 if tokens > 200 else 80  # 140 rows of 80 exceed one tile, too
    assert not config(tokens - 1, heads, width, has_size=False, has_scores=False).constants["ONE_TILE"]
    scores, tau = peaked(2, tokens - 1) if flags[1] else (None, 0.0)
    metric = keys(2, tokens, heads, width, torch.float16)
    check(seeded(2, tokens, 8), metric, sizes(2, tokens) if flags[0] else None, tokens // 3, 1, scores, tau)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(3, torch.float16), (18, torch.bfloat16), (33, torch.float32), (197, torch.bfloat16), (270, torch.float32)],
)
def test_exact_ties_are_decided_by_index(tokens: int, dtype: torch.dtype) -> None:
    """Few directions and few score values: bitwise the same index lists as the reference and the exporter."""
    batch, prefix = (3, 1) if tokens < 100 else (2, 0)
    metric = few_directions(batch, tokens, 4 if tokens == 3 else 24).to(dtype)
    patches = tokens - prefix
    scores = torch.randint(1, 4, (batch, patches), generator=torch.Generator().manual_seed(0)).float()
    tau = float((scores / scores.sum(1, keepdim=True)).var(1).median()) * 1.01 if patches > 3 else 1.0
    for r in sorted({1, patches // 4, patches // 2} - {0}) if tokens < 100 else (patches // 5,):
        for some in (None, scores):
            found = launch_match(metric, None, r, prefix, some, tau)
            expected = match_reference(metric, None, r, prefix, some, tau)
            assert torch.equal(found[0], expected[0])
            weight = torch.ones(batch, r) if found[3] is None else found[3]
            assert torch.equal(weight, expected[3])
            merges = weight[:, 0] != 0  # the sources of a pruned image are irrelevant
            assert torch.equal(found[1][merges], expected[1][merges])
            assert torch.equal(found[2][merges], expected[2][merges])
            x = torch.arange(tokens).float()[None, :, None].expand(batch, -1, 8).contiguous()
            portable = exporters(x, metric, None, r, prefix, some, tau)
            ours = launch_merge_rows(x, *found)
            torch.testing.assert_close(ours[0], portable.x)
            assert portable.size is not None
            assert torch.equal(ours[1], portable.size)


def test_constant_tokens() -> None:
    """Every similarity is 1: the first r of A join the first of B."""
    for dtype, tokens in ((torch.float32, 50), (torch.bfloat16, 197), (torch.float16, 300)):
        metric = torch.ones(2, tokens, 4, 16, dtype=dtype)
        keep, source, into, _, _ = launch_match(metric, None, 7, 1)
        assert source.tolist() == [list(range(2, 16, 2))] * 2
        rest = len(range(2, tokens, 2)) - 7
        assert into.tolist() == [[1 + rest] * 7] * 2
        assert keep.tolist() == [[0, *range(16, tokens, 2), *range(1, tokens, 2)]] * 2


def test_zeros_of_both_signs_tie() -> None:
    """-0 and 0 are equal scores: the lower index wins, in either order."""
    scores = torch.tensor([[-0.0, 0.0, 1.0, -0.0, 0.0, 0.0]])
    metric = seeded(1, 7, 4)
    assert launch_match(metric, None, 3, 1, scores, 0.0)[0].tolist() == [[0, 3, 1, 2]]
    assert match_reference(metric, None, 3, 1, scores, 0.0)[0].tolist() == [[0, 3, 1, 2]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for Inf - Inf
@pytest.mark.parametrize(("tokens", "value"), [(30, torch.nan), (30, torch.inf), (30, -torch.inf), (270, torch.nan)])
def test_wild_values_are_decided_too(tokens: int, value: float) -> None:
    """NaN ranks highest and ties by index; for any values, each row of x is used at most once."""
    metric, (scores, tau) = keys(3, tokens, 2, 8), peaked(3, tokens - 1)
    metric[0, 9, 1, 3] = value  # a row of B: best partner of every A
    metric[1, 8, 0, 2] = metric[1, 12, 0, 2] = value  # rows of A: highest of all
    metric[2] = value
    scores[2, 4] = value
    r = tokens // 4
    found = launch_match(metric, None, r, 1)
    for b, each in enumerate(found[0]):
        assert sorted(each.tolist() + found[1][b].tolist()) == list(range(tokens))
    rest = len(range(2, tokens, 2)) - r
    assert bool(((found[2] >= 1 + rest) & (found[2] < tokens - r)).all())
    first = (range(2, 2 * r + 2, 2), [8, 12], range(2, 2 * r + 2, 2))
    into = (4, None, 0)  # 9 is the fifth of B; B's first, if all are NaN
    for b, (wanted, place) in enumerate(zip(first, into, strict=True)):
        assert found[1][b, : len(wanted)].tolist() == list(wanted)
        if place is not None:
            assert found[2][b].tolist() == [1 + rest + place] * r
    x = seeded(3, tokens, 16)
    once, twice = (launch_match_merge(x, metric, None, r, 1, scores, tau) for _ in range(2))
    assert torch.equal(once[0], twice[0])
    assert bool(once[0].isfinite().all())
    # NaN's variance is not below tau; the NaN itself is the highest score.
    kept = launch_match(metric, None, r, 1, scores, tau)
    assert kept[3] is not None
    assert kept[3][2].tolist() == [0.0] * r
    if value != -torch.inf:
        assert kept[0][2, 1] == 5
    assert len(set(kept[0][2].tolist())) == tokens - r


def test_wild_tokens_stay_where_they_merge() -> None:
    x, metric = seeded(2, 40, 16), keys(2, 40, 0, 8)
    clean = launch_match_merge(x, metric, None, 9, 1)[0]
    chosen = launch_match(metric, None, 9, 1)
    wild = x.clone()
    wild[0, chosen[1][0, 4]] = torch.nan
    found = launch_match_merge(wild, metric, None, 9, 1)[0]
    row = int(chosen[2][0, 4])
    assert bool(found[0, row].isnan().all())
    found[0, row] = clean[0, row]
    assert torch.equal(found, clean)


def test_pruned_images_copy_rows_and_sizes() -> None:
    x, metric, size = seeded(2, 50, 16, dtype=torch.bfloat16), keys(2, 50, 2, 8), sizes(2, 50)
    scores = torch.softmax(seeded(2, 49), dim=1)
    out, new = launch_match_merge(x, metric, size, 10, 1, scores, 0.0)  # no variance is below 0
    kept = scores.sort(dim=1, descending=True).indices[:, :39] + 1
    kept = torch.cat([torch.zeros(2, 1, dtype=torch.int64), kept], dim=1)
    assert torch.equal(out, x.gather(1, kept[:, :, None].expand(-1, -1, 16)))
    assert torch.equal(new, size.gather(1, kept))


@pytest.mark.slow
def test_same_bits_every_time_and_in_every_batch() -> None:
    for tokens in (60, 262):
        x, metric, size = seeded(3, tokens, 8, dtype=torch.float16), keys(3, tokens, 2, 8), sizes(3, tokens)
        scores, tau = peaked(3, tokens - 1)
        given: tuple[Any, ...] = (x, metric, size, 20, 1, scores, tau)
        first, second = launch_match_merge(*given), launch_match_merge(*given)
        order = torch.tensor([2, 0, 1])
        mixed = launch_match_merge(x[order], metric[order], size[order], 20, 1, scores[order], tau)
        for a, b, c in zip(first, second, mixed, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[order], c)


def test_strides_are_followed() -> None:
    """Heads, tokens and images at any strides; data between them does not matter."""
    x, plain = seeded(2, 30, 8), seeded(2, 30, 2, 8)
    wide = torch.full((2, 35, 3, 19), torch.nan)
    wide[:, 3:33, ::2, 5:13] = plain
    scores, tau = peaked(2, 29)
    padded = torch.full((2, 40), torch.nan)
    padded[:, 7:36] = scores
    a = launch_match_merge(x, plain, None, 9, 1, scores, tau)
    b = launch_match_merge(x, wide[:, 3:33, ::2, 5:13], None, 9, 1, padded[:, 7:36], tau)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(2, 50), prefix=st.integers(0, 3), part=st.floats(0, 1), heads=st.integers(0, 4),
    sized=st.booleans(), scored=st.booleans(), ties=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_properties(
    tokens: int, prefix: int, part: float, heads: int, sized: bool, scored: bool, ties: bool, seed: int
) -> None:
    prefix = min(prefix, tokens - 2)
    patches = tokens - prefix
    r = 1 + round(part * (patches // 2 - 1))
    metric = few_directions(2, tokens, 8, seed) if ties else keys(2, tokens, heads, 6, seed=seed)
    x, size = seeded(2, tokens, 5, seed=seed), sizes(2, tokens, seed) if sized else None
    scores, tau = peaked(2, patches, seed) if scored else (None, 0.0)
    out, new = launch_match_merge(x, metric, size, r, prefix, scores, tau)
    weight = launch_match(metric, size, r, prefix, scores, tau)[3]
    size = torch.ones(2, tokens) if size is None else size
    merges = torch.ones(2, dtype=torch.bool) if weight is None else weight[:, 0] != 0
    # If an image merges, sizes are preserved and so is the weighted mean of all tokens; otherwise tokens are lost.
    assert torch.equal(new.sum(1)[merges], size.sum(1)[merges])
    assert bool((new.sum(1) <= size.sum(1)).all())
    total, kept = (size[:, :, None] * x).sum(1), (new[:, :, None] * out).sum(1)
    torch.testing.assert_close(kept[merges], total[merges], rtol=1e-4, atol=1e-4)
    assert bool((out <= x.amax(1, keepdim=True) + 1e-6).all())
    assert bool((out >= x.amin(1, keepdim=True) - 1e-6).all())
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    assert torch.equal(new[:, :prefix], size[:, :prefix])
    if ties:
        expected = match_reference(metric, None, r, prefix, scores, tau)[0]
        doubt = margins(metric, r, prefix, scores, tau) if scored else None
        if doubt is None:
            assert torch.equal(launch_match(metric, None, r, prefix, scores, tau)[0], expected)
    else:
        check(x, metric, size, r, prefix, scores, tau)


def test_variants_are_the_launchers_choice() -> None:
    seen = set()
    for each in variants():
        constants, (low, high) = each.config.constants, each.shapes["n"]
        heads = each.shapes["H"] if isinstance(each.shapes["H"], int) else 12
        flags = {name.lower(): constants[name] for name in ("HAS_SIZE", "HAS_SCORES")}
        for patches in (low, (low + high) // 2 + 1, high):
            fits = config(patches, heads, each.shapes["d"], **flags)
            assert fits == each.config or patches <= 16
            assert fits.constants["ONE_TILE"] == constants["ONE_TILE"]
        assert [*each.signature, *constants] == list(each.config.kernel.arg_names)
        assert set(each.aligned) < set(each.signature)
        seen.add(each.name)
    assert len(seen) == sum(1 for _ in variants()) == 120


def test_few_images_were_in_doubt() -> None:
    """Must run last: only few images were skipped as near-ties by the other tests."""
    if TOTALS["images"] < 100:
        pytest.skip("runs with the others")
    assert TOTALS["in doubt"] <= 0.05 * TOTALS["images"], TOTALS
