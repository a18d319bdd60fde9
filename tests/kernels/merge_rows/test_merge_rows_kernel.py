"""vp::merge_rows' kernel, interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.counts import counts_and_types
from tests.kernels.support import DTYPES, TOKENS, assert_within, seeded
from vp_kernels.merge_rows.kernel import MAX_SOURCES, config, launch_merge_rows, variants
from vp_kernels.merge_rows.op import merge_rows_torch
from vp_kernels.merge_rows.reference import merge_rows_reference

WEIGHTS = ["none", "source", "keep", "both"]


def case(
    batch: int,
    tokens: int,
    kept: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    weights: str = "none",
    seed: int = 0,
) -> tuple[Any, ...]:
    """A random map of all rows: `kept` stay, the others join one of them."""
    generator = torch.Generator().manual_seed(seed + tokens * 1000 + kept)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    keep, source = order[:, :kept].contiguous(), order[:, kept:].contiguous()
    into = torch.randint(kept, source.shape, generator=generator)
    source_weight = torch.rand(source.shape, generator=generator) if weights in ("source", "both") else None
    if source_weight is not None:
        source_weight[torch.rand(source.shape, generator=generator) < 0.2] = 0.0
    keep_weight = torch.rand(keep.shape, generator=generator) + 0.5 if weights in ("keep", "both") else None
    x = seeded(batch, tokens, width, dtype=dtype, seed=seed) + 1  # a non-zero mean, as in tokens
    return x, keep, source, into, source_weight, keep_weight


def check(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    merged, mass = launch_merge_rows(*arguments)
    truth, weight = merge_rows_reference(arguments[0].double(), *arguments[1:])
    bound, bound_mass = bounds.merge_rows(*arguments)
    assert_within("merged", merged, truth, bound, arguments[0].dtype)
    assert_within("mass", mass, weight, bound_mass, torch.float32)
    return merged, mass


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "dtype"), counts_and_types(n for n in TOKENS if n > 1), ids=str)
def test_like_the_reference(tokens: int, dtype: torch.dtype) -> None:
    # The interpreter is slow. One test for a row that takes many sources (one round each) is enough.
    amounts = {1, (tokens + 1) // 2, tokens - 1} if tokens < 20 else {tokens * 2 // 3}
    for i, kept in enumerate(sorted(amounts)):
        number = i + tokens + DTYPES.index(dtype)
        check(
            case(
                3 if tokens < 130 and number % 2 else 1,
                tokens,
                kept,
                (24, 33, 64)[number % 3],
                dtype,
                WEIGHTS[number % 4],
            )
        )


@pytest.mark.parametrize("width", [1, 16, 33, 128, 192, 200, 256])
def test_widths(width: int) -> None:
    for weights in WEIGHTS[width % 2 :: 2]:
        check(case(3, 19, 13, width, torch.bfloat16, weights))


def test_more_sources_than_one_chunk_holds() -> None:
    arguments = case(1, 400, 120, 16, weights="both")
    assert arguments[2].shape[1] > 2 * MAX_SOURCES
    check(arguments)


def test_nothing_merges_and_rows_repeat() -> None:
    x = seeded(2, 5, 16, dtype=torch.float16)
    keep, none = torch.tensor([[4, 4, 0], [1, 3, 1]]), torch.empty(2, 0, dtype=torch.int64)
    merged, mass = launch_merge_rows(x, keep, none, none)
    assert torch.equal(merged, x[torch.arange(2)[:, None], keep])
    assert mass.tolist() == [[1.0] * 3] * 2


def test_one_row_takes_all_in_ascending_order() -> None:
    """fp32 sums of 1 and 2^-24 depend on their order."""
    weight = torch.tensor([[1.0, *[2.0**-24] * 30, 1.0]])
    x, source = torch.ones(1, 40, 8), torch.arange(1, 33)[None]
    into, keep = torch.zeros_like(source), torch.zeros(1, 1, dtype=torch.int64)
    merged, mass = launch_merge_rows(x, keep, source, into, weight, torch.zeros(1, 1))
    assert mass.item() == 2.0
    assert torch.equal(merged, torch.ones(1, 1, 8))
    small_first = torch.tensor([[*[2.0**-24] * 31, 2.0]])
    assert launch_merge_rows(x, keep, source, into, small_first, torch.zeros(1, 1))[1].item() == 2.0 + 2.0**-19


def test_equal_rows_stay_what_they_are_and_lonely_rows_are_copied() -> None:
    for dtype in DTYPES:
        row = seeded(1, 1, 40, dtype=dtype)
        merged, _ = launch_merge_rows(row.expand(1, 30, 40).contiguous(), *case(1, 30, 3, 1, weights="both")[1:])
        assert torch.equal(merged, row.expand(1, 3, 40))
    x, keep, source, into, weight, own = case(2, 20, 15, 40, torch.bfloat16, "both")
    assert weight is not None
    merged, _ = launch_merge_rows(x, keep, source, into, weight, own)
    joined = torch.zeros(2, 15).scatter_add(1, into, (weight != 0).float()) > 0
    assert 0 < joined.sum() < joined.numel()
    assert torch.equal(merged[~joined], x[torch.arange(2)[:, None], keep][~joined])
    assert not torch.equal(merged[joined], x[torch.arange(2)[:, None], keep][joined])


def test_a_source_of_weight_zero_takes_no_part_whatever_it_holds() -> None:
    x, keep, source, into, weight, own = case(2, 30, 12, 16, weights="both")
    assert weight is not None
    wild = x.clone()
    wild[torch.arange(2)[:, None], source] = torch.where((weight == 0)[:, :, None], torch.nan, wild.gather(
        1, source[:, :, None].expand(-1, -1, 16)))  # fmt: skip
    assert wild.isnan().any()
    clean, dirty = (launch_merge_rows(each, keep, source, into, weight, own) for each in (x, wild))
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(merge_rows_torch(wild, keep, source, into, weight, own)[0], merge_rows_torch(*(
        x, keep, source, into, weight, own))[0])  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for Inf - Inf
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_wild_values_stay_in_their_rows(value: float) -> None:
    x, keep, source, into, _, _ = case(2, 40, 20, 33)
    clean = launch_merge_rows(x, keep, source, into)[0]
    wild = x.clone()
    wild[0, source[0, 3], 7] = value
    wild[1, keep[1, 5], 9] = value
    found = launch_merge_rows(wild, keep, source, into)[0]
    again = launch_merge_rows(wild, keep, source, into)[0]
    assert torch.equal(found.view(torch.int32), again.view(torch.int32))
    changed = torch.zeros_like(clean, dtype=torch.bool)
    changed[0, into[0, 3], 7] = changed[1, 5, 9] = True
    assert not found[changed].isfinite().any()
    assert torch.equal(found[~changed], clean[~changed])


def test_indices_out_of_range_touch_nothing_else() -> None:
    """As in a compiled engine, without checks: NaN for a row outside x; a source for a row outside is dropped."""
    x, keep, source, into, weight, own = case(2, 40, 20, 16, weights="both")
    assert weight is not None
    weight[weight == 0] = 0.5
    fine = launch_merge_rows(x, keep, source, into, weight, own)
    bad_keep, bad_source, bad_into = keep.clone(), source.clone(), into.clone()
    bad_keep[0, 3], bad_keep[1, 2] = 40, -1
    bad_source[0, 0], bad_source[1, 1] = 1 << 40, -(1 << 40)
    bad_into[0, 5], bad_into[1, 6], bad_into[0, 7] = 20, -1, (1 << 32) + int(into[0, 7])
    merged, mass = launch_merge_rows(x, bad_keep, bad_source, bad_into, weight, own)
    lost = torch.zeros(2, 20, dtype=torch.bool)
    for b, i in ((0, 5), (1, 6), (0, 7)):
        lost[b, into[b, i]] = True
    nan = torch.zeros(2, 20, dtype=torch.bool)
    nan[0, 3] = nan[1, 2] = nan[0, into[0, 0]] = nan[1, into[1, 1]] = True
    assert torch.equal(merged.isnan().all(2), nan)
    assert torch.equal(merged.isnan().any(2), nan)
    assert torch.equal(merged[~nan & ~lost], fine[0][~nan & ~lost])
    assert torch.equal(mass[~lost], fine[1][~lost])
    assert bool((mass[lost] < fine[1][lost]).all())


def test_same_bits_every_time_and_in_every_batch() -> None:
    arguments = case(3, 65, 30, 48, torch.float16, "both")
    first, second = launch_merge_rows(*arguments), launch_merge_rows(*arguments)
    alone = launch_merge_rows(*(each[1:2] for each in arguments))
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(2, 40), part=st.floats(0, 1), width=st.integers(1, 20), weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_convex_and_conserving(tokens: int, part: float, width: int, weights: str, seed: int) -> None:
    arguments = case(2, tokens, 1 + round(part * (tokens - 1)), width, torch.float32, weights, seed)
    x, keep, source, _, weight, own = arguments
    merged, mass = check(arguments)
    weight = torch.ones(source.shape) if weight is None else weight
    own = torch.ones(keep.shape) if own is None else own
    torch.testing.assert_close(mass.sum(1), own.sum(1) + weight.sum(1))
    rows = x[torch.arange(2)[:, None], torch.cat([keep, source], 1)]
    assert bool((merged <= rows.amax(1, keepdim=True) + 1e-6).all())
    assert bool((merged >= rows.amin(1, keepdim=True) - 1e-6).all())
    total = (own[:, :, None] * x.gather(1, keep[:, :, None].expand(-1, -1, width))).sum(1)
    total = total + (weight[:, :, None] * x.gather(1, source[:, :, None].expand(-1, -1, width))).sum(1)
    torch.testing.assert_close((merged * mass[:, :, None]).sum(1), total, rtol=1e-4, atol=1e-4)


def test_variants_are_the_launchers_choice() -> None:
    seen = set()
    for each in variants():
        width, (low, high) = each.shapes["D"], each.shapes["R"]
        flags = {name.lower(): each.config.constants[name] for name in ("HAS_SOURCE_WEIGHT", "HAS_KEEP_WEIGHT")}
        assert config(low, width, **flags) == config(high, width, **flags) == each.config
        assert [*each.signature, *each.config.constants] == list(each.config.kernel.arg_names)
        assert width % 16 == 0  # D is declared to be
        seen.add(each.name)
    assert len(seen) == sum(1 for _ in variants()) == 144
