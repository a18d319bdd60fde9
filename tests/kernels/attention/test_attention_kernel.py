"""The Triton kernels of vp::attention, interpreted, against the reference in higher precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.counts import edge
from tests.kernels.support import DTYPES, TOKENS, assert_within, seeded
from tests.pairwise import pairwise, thinned
from vp_kernels.attention.kernel import (
    attention_looped,
    attention_whole,
    config,
    launch_attention,
    sum_partials,
    variants,
)
from vp_kernels.attention.reference import attention_reference
from vp_kernels.launch import MAX_TOKENS

# NumPy's warnings about NaN and infinity in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = float("inf")
HEAD_DIMS = (32, 64, 80, 96, 128)
IMPORTANCE = ("none", "class", "mean")
BIASES = ("none", "shared", "own", "removing")


def bias_of(kind: str, batch: int, tokens: int) -> Tensor | None:
    """A key bias: none, [1, N], [B, N], or [B, N] with masked keys (never all of an image)."""
    if kind == "none":
        return None
    bias = seeded(1 if kind == "shared" else batch, tokens, seed=7)
    if kind == "removing":
        bias[:, 1::3] = -INF
    return bias


def covering() -> list[tuple[int, int, int, int, torch.dtype, str, str]]:
    """(B, N, H, d, dtype, bias, importance): every token count and every pair of the other choices at least once."""
    cases = []
    pairs = itertools.cycle(itertools.product(BIASES, IMPORTANCE))
    widths = itertools.cycle(HEAD_DIMS)
    for number, (tokens, dtype) in enumerate(itertools.product(TOKENS, DTYPES)):
        if dtype == torch.float32 and tokens in (198, 256):
            continue  # slow here, without being an edge case: its tiles are of 32
        bias, importance = next(pairs)
        batch, heads = 3 if tokens <= 64 and number % 2 else 1, 2 if tokens <= 130 else 1
        cases.append((batch, tokens, heads, next(widths), dtype, bias, importance))
    for dtype, (bias, importance) in itertools.product(DTYPES, itertools.product(BIASES, IMPORTANCE)):
        cases.append((1, 70, 1, next(widths), dtype, bias, importance))
    # Edges of every part of the keys; more keys than one program holds, and the largest count.
    for tokens in (176, 225, 241):
        cases.append((1, tokens, 1, 64, torch.float16, "removing", "mean"))
    cases += [
        (1, 145, 1, 128, torch.bfloat16, "none", "class"),
        (2, 320, 1, 64, torch.bfloat16, "shared", "class"),
        (1, 300, 2, 64, torch.bfloat16, "none", "mean"),
        (1, 577, 1, 80, torch.float16, "removing", "mean"),
        (1, 1024, 1, 32, torch.float16, "none", "class"),
        (1, 1023, 1, 32, torch.bfloat16, "own", "none"),
    ]
    return cases


def goals(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype, bias: str, importance: str) -> set[Any]:
    """By default every count, every dtype around each edge of a tile, and every pair of the other choices."""
    pairs = itertools.combinations(enumerate((width, dtype, bias, importance)), 2)
    return {tokens, (edge(tokens), dtype), *pairs}


def check(qkv: Tensor, bias: Tensor | None, importance: str) -> None:
    """Compare the kernel with the reference in fp64."""
    out, received = launch_attention(qkv, bias, importance)
    truth, truth_received = attention_reference(qkv.double(), bias, importance)
    bound, bound_received = bounds.attention(qkv, bias, importance)
    assert_within("out", out, truth, bound, qkv.dtype)
    assert_within("importance", received, truth_received, bound_received, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width", "dtype", "bias", "importance"),
    thinned(covering(), goals),
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_against_the_reference(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype, bias: str, importance: str
) -> None:
    qkv = seeded(batch, tokens, 3, heads, width, dtype=dtype)
    check(qkv, bias_of(bias, batch, tokens), importance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "importance"),
    thinned(
        itertools.product([(70, torch.float16), (260, torch.float16), (49, torch.float32)], IMPORTANCE),
        lambda call, importance: {call, importance},
    ),
    ids=str,
)
def test_twice_the_same_bits(call: tuple[int, torch.dtype], importance: str) -> None:
    tokens, dtype = call
    qkv, bias = seeded(1, tokens, 3, 2, 32, dtype=dtype), seeded(1, tokens)
    first, second = launch_attention(qkv, bias, importance), launch_attention(qkv, bias, importance)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["class", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_image_does_not_depend_on_its_batch(importance: str, dtype: torch.dtype) -> None:
    """More images change how query tiles are distributed over programs, but must not change the results."""
    qkv = seeded(3, 70, 3, 2, 32, dtype=dtype)
    out, received = launch_attention(qkv, None, importance)
    alone, received_alone = launch_attention(qkv[1:2].clone(), None, importance)
    assert torch.equal(out[1:2], alone)
    assert torch.equal(received[1:2], received_alone)


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize(("tokens", "dtype"), [(50, torch.float16), (270, torch.float16), (50, torch.float32)])
def test_all_keys_removed(tokens: int, dtype: torch.dtype, importance: str) -> None:
    """That image is NaN, and no other value is."""
    qkv = seeded(3, tokens, 3, 1, 32, dtype=dtype)
    bias = torch.zeros(3, tokens)
    bias[1] = -INF
    bias[2, : tokens - 1] = -INF  # one key left, in the last tile
    out, received = launch_attention(qkv, bias, importance)
    assert bool(out[1].isnan().all())
    assert bool(out[[0, 2]].isfinite().all())
    torch.testing.assert_close(out[2], qkv[2, -1, 2].flatten().expand_as(out[2]))
    if importance != "none":
        assert bool(received[1].isnan().all())
        expected = torch.zeros(tokens)
        expected[-1] = 1.0
        assert torch.equal(received[2], expected)
        torch.testing.assert_close(received.sum(dim=1)[0], torch.tensor(1.0))


CALLS = {
    "70-float16-class": (70, torch.float16, "class"),
    "70-float16-mean": (70, torch.float16, "mean"),
    "270-float16-mean": (270, torch.float16, "mean"),
    "70-float32-class": (70, torch.float32, "class"),
}


@pytest.mark.parametrize(("where", "value", "call"), pairwise("qkv", [float("nan"), INF, -INF], CALLS))
def test_nan_and_infinity_stay_where_torch_has_them(where: str, value: float, call: str) -> None:
    tokens, dtype, importance = CALLS[call]
    qkv = seeded(1, tokens, 3, 1, 32, dtype=dtype)
    qkv[0, tokens - 2, "qkv".index(where), 0, 3] = value
    out, received = launch_attention(qkv, None, importance)
    truth, truth_received = attention_reference(qkv, None, importance)
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())
    torch.testing.assert_close(out, truth, atol=2e-3, rtol=1e-2, equal_nan=True)
    torch.testing.assert_close(received, truth_received, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_large_logits() -> None:
    """Far beyond the range of exp: the maximum is subtracted first."""
    for tokens in (60, 270):
        qkv = seeded(1, tokens, 3, 1, 32, dtype=torch.float16, scale=30.0)
        check(qkv, None, "mean")


def test_neighbours_of_the_tensors_are_left_alone() -> None:
    """Rows beyond N in the last tile belong to the next image, or are out of bounds."""
    buffer = seeded(4, 21, 3, 2, 32, dtype=torch.float16)
    buffer[0], buffer[3] = float("nan"), float("nan")
    qkv = buffer[1:3]
    out, received = launch_attention(qkv, None, "mean")
    assert bool(out.isfinite().all())
    assert bool(received.isfinite().all())
    assert_within("out", out, attention_reference(qkv.double())[0], bounds.attention(qkv, None, "mean")[0], qkv.dtype)


def test_which_kernel_runs() -> None:
    """All keys at once up to 256 in half precision, with parts that just cover them."""
    for tokens, parts in {197: (128, 64, 16), 98: (64, 32, 16), 69: (64, 16, 0), 256: (256, 0, 0)}.items():
        chosen = config(tokens, 64, torch.bfloat16)
        assert chosen.kernel is attention_whole
        assert tuple(chosen.constants[name] for name in ("P0", "P1", "P2")) == parts
    assert config(257, 64, torch.bfloat16).kernel is attention_looped
    assert config(197, 128, torch.bfloat16).kernel is attention_looped
    assert config(197, 64, torch.float32).kernel is attention_looped


def test_variants_cover_what_is_launched() -> None:
    """Exactly one build for every dtype, head dim, bias, importance and N, with the launcher's config."""
    found = list(variants())
    assert len({each.name for each in found}) == len(found)
    dtypes = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    builds = [each for each in found if each.config.kernel is not sum_partials]
    for dtype, d, bias, importance in itertools.product(DTYPES, HEAD_DIMS, (False, True), IMPORTANCE):
        mine = [
            each
            for each in builds
            if each.dtype == dtypes[dtype]
            and each.shapes["d"] == d
            and each.config.constants["HAS_BIAS"] == bias
            and each.config.constants["CLASS"] == (importance == "class")
            and each.config.constants["MEAN"] == (importance == "mean")
        ]
        for tokens in range(1, MAX_TOKENS + 1):
            fits = [each for each in mine if each.shapes["N"][0] <= tokens <= each.shapes["N"][1]]
            assert [each.config for each in fits] == [config(tokens, d, dtype, bias=bias, importance=importance)]
