"""The Triton kernel of vp::gather_norm, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.counts import counts_and_types, widths_and_types
from tests.kernels.support import DTYPES, assert_within, seeded
from tests.pairwise import pairwise
from vp_kernels.gather_norm.kernel import config, launch_gather_norm, variants
from vp_kernels.gather_norm.reference import gather_norm_reference

EPS = 1e-6


def some_index(tokens: int, kept: int, *batch: int) -> Tensor:
    """Random rows of x: unsorted, with repeats."""
    generator = torch.Generator().manual_seed(tokens * 1000 + kept)
    return torch.randint(0, tokens, (*batch, kept), generator=generator)


def case(  # K is 1 to 23: enough programs for complete and partial groups of rows
    batch: int, tokens: int, width: int, dtype: torch.dtype, *, per_image: bool, residual: bool, extras: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None]:
    """Arguments with a different scale and mean in each row, as in the tokens of a ViT."""
    x = seeded(batch, tokens, width, seed=1) * (1 + seeded(batch, tokens, 1).abs()) + 3 * seeded(
        batch, tokens, 1, seed=2
    )
    return (
        x.to(dtype),
        some_index(tokens, 1 + tokens // 2 % 23, *([batch] if per_image else [])),
        (1 + 0.1 * seeded(width, seed=3)).to(dtype),
        seeded(width, seed=4, dtype=dtype),
        EPS,
        seeded(batch, tokens, width, seed=5, dtype=dtype) if residual else None,
        seeded(batch, extras, width, seed=6, dtype=dtype) if extras else None,
    )


def double(value: Tensor | float | None) -> Tensor | float | None:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(arguments: tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None]) -> None:
    found = launch_gather_norm(*arguments)
    truth = gather_norm_reference(*[double(each) for each in arguments])  # type: ignore[arg-type]
    for name, one, exact, bound in zip(("kept", "normed"), found, truth, bounds.gather_norm(*arguments), strict=True):
        assert_within(name, one, exact, bound, arguments[0].dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "dtype"), counts_and_types(), ids=str)
def test_every_token_count(tokens: int, dtype: torch.dtype) -> None:
    odd = tokens % 2 == 1
    check(case(3 if odd else 1, tokens, 33, dtype, per_image=odd, residual=tokens % 3 == 0, extras=tokens % 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dtype"),
    widths_and_types([1, 7, 33, 192, 384, 576, 768, 769, 1024, 1280, 1408, 2048, 2560]),
    ids=str,
)
def test_every_width(width: int, dtype: torch.dtype) -> None:
    check(case(1, 5, width, dtype, per_image=False, residual=False, extras=0))
    check(case(3, 4, width, dtype, per_image=True, residual=True, extras=2))


@pytest.mark.parametrize(
    ("extras", "residual", "per_image", "batch"), pairwise([0, 1, 2], [False, True], [False, True], [1, 3])
)
def test_every_option(batch: int, per_image: bool, residual: bool, extras: int) -> None:
    check(case(batch, 17, 192, torch.bfloat16, per_image=per_image, residual=residual, extras=extras))


def test_rows_are_copied_bit_by_bit() -> None:
    for dtype in DTYPES:
        x, _, weight, bias, *_ = case(2, 6, 64, dtype, per_image=False, residual=False, extras=0)
        x[0, 0, 0], x[0, 1, 0] = -0.0, torch.finfo(dtype).smallest_normal
        index = torch.tensor([5, 0, 0, 1])
        extra = seeded(2, 1, 64, dtype=dtype)
        kept, _ = launch_gather_norm(x, index, weight, bias, EPS, None, extra)
        expected = torch.cat([x[:, index], extra], dim=1)
        assert torch.equal(kept, expected)
        assert torch.equal(kept.signbit(), expected.signbit())


def test_sum_is_normed_before_it_is_rounded() -> None:
    """In fp16 2048 + 0.5 rounds to 2048: a row of such sums would have no variance."""
    x = torch.full((1, 2, 16), 2048.0, dtype=torch.float16)
    residual = torch.tensor([0.5, -0.5] * 8, dtype=torch.float16).expand(1, 2, 16).contiguous()
    weight, bias = torch.ones(16, dtype=torch.float16), torch.zeros(16, dtype=torch.float16)
    kept, normed = launch_gather_norm(x, torch.tensor([1]), weight, bias, EPS, residual)
    assert torch.equal(kept, x[:, 1:])
    assert torch.equal(normed[0, 0], torch.tensor([1.0, -1.0] * 8, dtype=torch.float16))


def test_variance_does_not_cancel() -> None:
    x = 1e4 + seeded(1, 3, 768)
    weight, bias = torch.ones(768), torch.zeros(768)
    _, normed = launch_gather_norm(x, torch.tensor([2, 0]), weight, bias, EPS)
    _, truth = gather_norm_reference(x.double(), torch.tensor([2, 0]), weight, bias, EPS)
    # Mean square minus squared mean would be off by 1; a mean summed in the worst order by 0.01.
    assert (normed.double() - truth).abs().max() < 0.1


@pytest.mark.parametrize("per_image", [False, True])
def test_index_out_of_range_is_a_row_of_nan(per_image: bool) -> None:
    x = seeded(3, 5, 40)
    one = torch.tensor([4, 5, 0, -1, 2, -(2**62), 2**62])
    index = torch.stack([one, one.flip(0), one.roll(2)]) if per_image else one
    weight, bias = torch.ones(40), torch.zeros(40)
    extra = seeded(3, 1, 40)
    kept, normed = launch_gather_norm(x, index, weight, bias, EPS, x, extra)
    bad = torch.cat([(index.expand(3, -1) < 0) | (index.expand(3, -1) > 4), torch.zeros(3, 1, dtype=torch.bool)], dim=1)
    for found, expected in zip(
        (kept, normed), gather_norm_reference(x, index, weight, bias, EPS, x, extra), strict=True
    ):
        assert torch.equal(found.isnan().all(2), bad)
        assert torch.equal(found.isnan().any(2), bad)
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_content_that_is_not_finite_stays_in_its_row() -> None:
    x = seeded(1, 4, 48)
    x[0, 1, 3], x[0, 2, 5] = float("nan"), float("inf")
    weight, bias = torch.ones(48), torch.zeros(48)
    kept, normed = launch_gather_norm(x, torch.arange(4), weight, bias, EPS)
    assert torch.equal(kept.nan_to_num(7.0), x.nan_to_num(7.0))
    assert normed.isnan().all(2).tolist() == [[False, True, True, False]]
    assert not normed[0, [0, 3]].isnan().any()


def test_empty() -> None:
    x, weight, bias = seeded(3, 4, 8), torch.ones(8), torch.zeros(8)
    none = torch.zeros(0, dtype=torch.int64)
    for index in (none, none.expand(3, 0)):
        kept, normed = launch_gather_norm(x, index, weight, bias, EPS)
        assert kept.shape == normed.shape == (3, 0, 8)
        extra = seeded(3, 2, 8)
        kept, normed = launch_gather_norm(x, index, weight, bias, EPS, x, extra)
        assert torch.equal(kept, extra)
        torch.testing.assert_close(normed, F.layer_norm(extra, (8,), eps=EPS))
    without, _ = launch_gather_norm(x, torch.tensor([2]), weight, bias, EPS, None, seeded(3, 0, 8))
    assert torch.equal(without, x[:, [2]])


def test_two_runs_give_the_same_bits() -> None:
    arguments = case(3, 9, 100, torch.float16, per_image=True, residual=True, extras=1)
    for first, second in zip(launch_gather_norm(*arguments), launch_gather_norm(*arguments), strict=True):
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def test_parts_cover_every_width() -> None:
    for width in range(1, 4097):
        for dtype in ("fp32", "bf16"):
            constants = config(width, dtype).constants
            parts = [constants["PART_0"], constants["PART_1"], constants["PART_2"]]
            assert sum(parts) >= width
            # no part lies entirely beyond D
            assert sum(parts) - parts[-1 if parts[2] else 1 if parts[1] else 0] < width
    for width in (384, 768, 1024, 1280):
        assert sum(v for k, v in config(width, "bf16").constants.items() if k.startswith("PART")) <= width * 4 / 3


def test_variants_are_what_the_launcher_would_run() -> None:
    names = set()
    for variant in variants():
        names.add(variant.name)
        arguments = variant.config.kernel.arg_names
        assert [*variant.signature, *variant.config.constants] == arguments
        assert set(variant.aligned) <= set(variant.signature)
    assert len(names) == 3 * 6 * 8
