"""The bounds of `bounds.py` separate rounding from faults: other correct arithmetic is within, every fault beyond."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.merge_rows.test_merge_rows_kernel import case as merge_case
from tests.kernels.support import DTYPES, assert_within, seeded
from vp_kernels.attention.reference import attention_reference
from vp_kernels.gather_norm.reference import gather_norm_reference
from vp_kernels.merge_rows.reference import merge_rows_reference
from vp_kernels.select.reference import select_fuse_reference

TOKENS, HEADS, WIDTH = 100, 2, 64
Tensors = tuple[Tensor, ...]


def verdicts(found: Tensors, truth: Tensors, limits: Tensors, dtypes: tuple[torch.dtype, ...]) -> list[bool]:
    """Whether each output is within its bound."""
    said = []
    for one, exact, bound, dtype in zip(found, truth, limits, dtypes, strict=True):
        try:
            assert_within("output", one.to(dtype), exact, bound, dtype)
            said.append("")
        except AssertionError as error:
            said.append(str(error))
    assert all("beyond" in each for each in said if each)
    return [not each for each in said]


def plain(
    qkv: Tensor,
    bias: Tensor,
    *,
    scores: Callable[[Tensor], Tensor] = lambda s: s,
    weights: Callable[[Tensor], Tensor] = lambda p: p,
    rest: Callable[[Tensor], Tensor] = lambda p: p,
    reverse: bool = False,
) -> Tensors:
    """Attention in fp32 with probabilities rounded to qkv's dtype, and a hook to inject a fault at each step."""
    order = torch.arange(qkv.shape[1]).flip(0) if reverse else torch.arange(qkv.shape[1])
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4).unbind(0)
    if reverse:  # the sums in another order
        q, k = q.flip(3), k.flip(3)
    s = scores((q @ k[:, :, order].transpose(2, 3)) * WIDTH**-0.5 + bias[:, None, None, order])
    e = torch.exp(s - s.amax(3, keepdim=True))
    p = weights(e / e.sum(3, keepdim=True))
    out = (rest(p).to(qkv.dtype).float() @ v[:, :, order]).transpose(1, 2).flatten(2)
    return out, p.mean(dim=(1, 2))[:, order.argsort()]


ATTENTION_FAULTS: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], list[bool]]] = {
    # fault of a step, and whether `out` and `importance` are still within rounding
    "scores in bf16": ({"scores": lambda s: s.bfloat16().float()}, [False, False]),
    "scores in fp16": ({"scores": lambda s: s.half().float()}, [False, False]),
    "a scale of 1.001": ({"scores": lambda s: s * 1.001}, [False, False]),
    "the last key is missed": ({"scores": lambda s: s.index_fill(3, torch.tensor([99]), -torch.inf)}, [False, False]),
    "a key beyond the last": ({"weights": lambda p: p * (TOKENS / (TOKENS + 1))}, [False, False]),
    "the last query is not counted": ({"weights": lambda p: p.index_fill(2, torch.tensor([99]), 0)}, [False, False]),
    "probabilities in bf16 before v": ({"rest": lambda p: p.bfloat16().float()}, [False, True]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_any_order_is_within(dtype: torch.dtype) -> None:
    qkv, bias = seeded(2, TOKENS, 3, HEADS, WIDTH, dtype=dtype), seeded(2, TOKENS)
    truth = attention_reference(qkv.double(), bias, "mean")
    limits = bounds.attention(qkv, bias, "mean")
    for reverse in (False, True):
        assert verdicts(plain(qkv, bias, reverse=reverse), truth, limits, (dtype, torch.float32)) == [True, True]
    half = dtype != torch.float32
    for bound, exact, most in zip(limits, truth, (0.1 if half else 1e-3, 1e-3), strict=True):
        assert bound.max() < most * exact.abs().max(), "a bound this wide finds nothing"


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_faults_of_attention_are_beyond(fault: str) -> None:
    qkv, bias = seeded(2, TOKENS, 3, HEADS, WIDTH), seeded(2, TOKENS)
    steps, said = ATTENTION_FAULTS[fault]
    found = plain(qkv, bias, **steps)  # type: ignore[arg-type]
    truth = attention_reference(qkv.double(), bias, "mean")
    assert verdicts(found, truth, bounds.attention(qkv, bias, "mean"), (torch.float32,) * 2) == said


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_faults_of_attention_are_beyond_in_half_precision(dtype: torch.dtype) -> None:
    """The importance is fp32 for any tokens; a sum over keys that is rounded at each step affects `out`."""
    qkv, bias = seeded(2, TOKENS, 3, HEADS, WIDTH, dtype=dtype), seeded(2, TOKENS)
    truth, limits = attention_reference(qkv.double(), bias, "mean"), bounds.attention(qkv, bias, "mean")
    for fault in ("scores in bf16", "scores in fp16", "a scale of 1.001", "the last key is missed"):
        found = plain(qkv, bias, **ATTENTION_FAULTS[fault][0])  # type: ignore[arg-type]
        assert not verdicts(found, truth, limits, (dtype, torch.float32))[1], fault
    q, k, v = qkv.float().permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax((q @ k.transpose(2, 3)) * WIDTH**-0.5 + bias[:, None, None], dim=3).to(dtype)
    total = torch.zeros_like(v, dtype=dtype)
    for key in range(TOKENS):
        total = total + p[..., key : key + 1] * v[:, :, key : key + 1].to(dtype)
    assert verdicts((total.transpose(1, 2).flatten(2),), truth[:1], limits[:1], (dtype,)) == [False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_norm(dtype: torch.dtype) -> None:
    x, residual = (seeded(2, 9, 384, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias, index = seeded(384, seed=3, dtype=dtype), seeded(384, seed=4, dtype=dtype), torch.tensor([7, 0, 2])
    extra = seeded(2, 1, 384, dtype=dtype, seed=5)
    given = (x, index, weight, bias, 1e-6, residual, extra)
    wide = tuple(each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in given)
    truth, limits = gather_norm_reference(*wide), bounds.gather_norm(*given)  # type: ignore[arg-type]

    def said(kept: Tensor, normed: Tensor) -> list[bool]:
        return verdicts((kept, normed), truth, limits, (dtype, dtype))

    good = gather_norm_reference(*given)
    assert said(*good) == [True, True]
    rows, (scale, shift) = good[0], (weight.float(), bias.float())
    centred = rows - rows.mean(2, keepdim=True)
    unbiased = centred / (centred.square().sum(2, keepdim=True) / 383 + 1e-6).sqrt() * scale + shift
    assert said(rows, unbiased)[1] is False
    missed = (rows - rows[..., :383].sum(2, keepdim=True) / 384) * centred.square().mean(2, keepdim=True).rsqrt()
    assert said(rows, missed * scale + shift)[1] is False
    assert said(rows, good[1] - shift)[1] is False
    assert said(rows.roll(1, 1), good[1].roll(1, 1)) == [False, False]
    coarse = (x + residual)[:, index] if dtype != torch.float32 else rows[:, :3].half().float()
    coarse = torch.cat([coarse, extra], 1).float()
    twice = torch.nn.functional.layer_norm(coarse, (384,), None, None, 1e-6).bfloat16().float() * scale + shift
    assert said(coarse, twice)[1] is False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_fuse(dtype: torch.dtype) -> None:
    scores, x, k = seeded(2, 60).softmax(1), seeded(2, 61, 48, dtype=dtype), 20
    _, truth = select_fuse_reference(scores, x.double(), k)
    _, good = select_fuse_reference(scores, x, k)
    limits = (bounds.select_fuse(scores, x, k),)
    assert verdicts((good,), (truth,), limits, (dtype,)) == [True]
    for other in (
        select_fuse_reference(scores, x, k - 1)[1],
        select_fuse_reference(scores, x, k + 1)[1],
        select_fuse_reference(scores.bfloat16().float(), x, k)[1] if dtype != torch.bfloat16 else -good,
        good * 1.02,
    ):
        assert verdicts((other,), (truth,), limits, (dtype,)) == [False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_rows(dtype: torch.dtype) -> None:
    x, keep, source, into, weight, own = arguments = merge_case(2, 60, 20, 48, dtype, "both")
    truth, limits = merge_rows_reference(x.double(), *arguments[1:]), bounds.merge_rows(*arguments)
    dtypes = (dtype, torch.float32)
    assert verdicts(merge_rows_reference(*arguments), truth, limits, dtypes) == [True, True]
    lighter = weight.clone()
    lighter[:, weight.amax(0).argmax()] *= 0.9
    assert verdicts(merge_rows_reference(x, keep, source, into, lighter, own), truth, limits, dtypes) == [False, False]
    missed = merge_rows_reference(x, keep, source[:, :-1], into[:, :-1], weight[:, :-1], own)
    assert verdicts(missed, truth, limits, dtypes) == [False, False]
    moved = merge_rows_reference(x, keep, source, into.roll(1, 1), weight, own)
    assert verdicts(moved, truth, limits, dtypes) == [False, False]
    if dtype != torch.float32:  # a running mean rounded at each step
        mean, mass = x.gather(1, keep[:, :, None].expand(-1, -1, 48)).clone(), own.clone()
        for b in range(2):
            for row, j, w in zip(x[b, source[b]], into[b].tolist(), weight[b], strict=True):
                mass[b, j] += w
                mean[b, j] = mean[b, j] + ((row - mean[b, j]) * (w / mass[b, j])).to(dtype)
        assert verdicts((mean, mass), truth, limits, dtypes) == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_density_merge(dtype: torch.dtype) -> None:
    x, share = seeded(1, 12, 48, dtype=dtype) + 1, seeded(1, 4, 12).softmax(2)
    truth = share.double() / share.double().sum(2, keepdim=True) @ x.double()
    limits = (bounds.density_merge(x, truth, 12),)
    good = share @ x.float()
    assert verdicts((good,), (truth,), limits, (dtype,)) == [True]
    for wrong in (share[..., 1:] @ x[:, 1:].float(), share.roll(1, 2) @ x.float(), good * 1.02):
        assert verdicts((wrong,), (truth,), limits, (dtype,)) == [False]
    coarse = share.bfloat16().float() @ x.float()
    assert verdicts((coarse,), (truth,), limits, (dtype,)) == [False]


def test_what_is_not_finite_and_a_wrong_shape_or_dtype() -> None:
    truth = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    bound = torch.full((3,), 1e-6, dtype=torch.float64)
    assert_within("it", torch.tensor([1.0, torch.nan, torch.inf]), truth, bound, torch.float32)
    for found, message in (
        (torch.tensor([1.0, 2.0, torch.inf]), "NaN in other places"),
        (torch.tensor([torch.nan, torch.nan, torch.inf]), "1 of 3 beyond"),
        (torch.tensor([1.1, torch.nan, torch.inf]), "error 1.000e-01, bound 1.000e-06, of 1.000e"),
        (torch.ones(2), r"\[2\], expected \[3\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_within("it", found, truth, bound, torch.float32)
    with pytest.raises(AssertionError):
        assert_within("it", torch.tensor([1.0, torch.nan, torch.inf]).double(), truth, bound, torch.float32)
