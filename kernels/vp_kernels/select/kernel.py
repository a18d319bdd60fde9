"""The Triton kernels of vp::select and vp::select_fuse. One warp a program: sums and scans are shuffles, no barrier.

The k highest are found without sorting: the k-th highest score is built bit by bit from the top, each bit with one
count of the scores that reach it. That is at most 32 n operations an image where counting ranks is n * n (32 times as
many at n = 1024), and it stops as soon as exactly k scores reach it: about 15 counts of some 100 cycles, 1 us, for 32
images at a time on each SM. Ranks are counted only where they are asked for (by_score). The answer is the one by ranks,
ties included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.launch import Config, Variant, cdiv, each_dtype, launch, next_power_of_two, triton_type

BLOCKS = (64, 128, 256, 512, 1024)  # of the ahead-of-time variants: the largest n of each
TILE_BYTES = 8192  # of rows that a program of select_fuse has on its way: 16 loads of 16 bytes a lane


# Scores are loaded in the kernels themselves, never in a function: torch.compile's analysis of what a kernel writes
# follows an address back through calls, though not through loads: it would take scores for an output and copy them.


@triton.jit
def _keys(scores, real):
    """uint32 in the order of the scores: NaN all ones, both zeros alike; what is not real is 0, below -inf."""
    bits = scores.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits == magnitude, magnitude | 0x80000000, bits ^ 0xFFFFFFFF)
    keys = tl.where(magnitude == 0, 0x80000000, keys)
    keys = tl.where(magnitude > 0x7F800000, 0xFFFFFFFF, keys)
    return tl.where(real, keys, 0)


@triton.jit
def _cut(keys, place, k):
    """Where the k highest end: a key, and the last place where that key is still one of them.

    The key is the k-th highest one, or, where the search could stop early because k keys reach it, between that one and
    the next.
    """
    cut = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    reached = tl.full((), 0, tl.int32)  # no key: whatever k is, the search begins
    while (bit > 0) & (reached != k):
        trial = cut | bit
        reached = tl.sum((keys >= trial).to(tl.int32), axis=0)
        cut = tl.where(reached >= k, trial, cut)
        bit = bit >> 1
    ties = keys == cut
    wanted = k - tl.sum((keys > cut).to(tl.int32), axis=0)
    last = tl.max(tl.where(ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= wanted), place, -1), axis=0)
    return cut, last


@triton.jit
def _selected(keys, place, cut, last):
    """Whether each place is one of the k highest."""
    return (keys > cut) | ((keys == cut) & (place <= last))


@triton.jit
def _write_ascending(index_ptr, selected, place, k):
    """The selected places, in order."""
    position = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    tl.store(index_ptr + position, place.to(tl.int64), mask=selected & (position < k))


@triton.jit
def select_kernel(scores_ptr, index_ptr, stride, n, k, BLOCK: tl.constexpr):
    """One image: scores [n] at `stride` from the next image's -> index [k], ascending."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + image * stride + place, mask=place < n, other=0.0)
    keys = _keys(scores, place < n)
    cut, last = _cut(keys, place, k)
    _write_ascending(index_ptr + image * k, _selected(keys, place, cut, last), place, k)


@triton.jit
def rank_kernel(scores_ptr, index_ptr, stride, n, k, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One image: scores [n] -> index [k], by descending score; each place is written at its rank."""
    image = tl.program_id(0).to(tl.int64)
    scores_ptr += image * stride
    place = tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + place, mask=place < n, other=0.0)
    keys = _keys(scores, place < n)
    rank = tl.zeros((BLOCK,), tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < n:
        other = start + tl.arange(0, CHUNK)
        others = _keys(tl.load(scores_ptr + other, mask=other < n, other=0.0), other < n)[:, None]
        before = (others > keys[None, :]) | ((others == keys[None, :]) & (other[:, None] < place[None, :]))
        rank += tl.sum(before.to(tl.int32), axis=0)  # a lane owns its columns: counting stays in its registers
        start += CHUNK
    tl.store(index_ptr + image * k + rank, place.to(tl.int64), mask=(place < n) & (rank < k))


@triton.jit
def select_fuse_kernel(
    scores_ptr,
    x_ptr,
    index_ptr,
    fused_ptr,
    stride,
    n,
    k,
    tokens,
    width,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One image's fused token in COLUMNS of its columns; the program of the first columns also writes the index.

    Every program finds the cut anew: that takes about as long as launching a second kernel would, and no second pass.

    Args:
        tokens, width: N, D.
    """
    tiles = tl.cdiv(width, COLUMNS)
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) - image * tiles
    image = image.to(tl.int64)
    scores_ptr += image * stride
    place = tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + place, mask=place < n, other=0.0)
    keys = _keys(scores, place < n)
    cut, last = _cut(keys, place, k)
    if tile == 0:
        _write_ascending(index_ptr + image * k, _selected(keys, place, cut, last), place, k)

    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    first = image * tokens + (tokens - n)
    fused = tl.zeros((COLUMNS,), tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < n:
        row = start + tl.arange(0, ROWS)
        weights = tl.load(scores_ptr + row, mask=row < n, other=0.0)
        rest = (row < n) & ~_selected(_keys(weights, row < n), row, cut, last)
        at = ((first + row) * width)[:, None] + columns[None, :]
        values = tl.load(x_ptr + at, mask=rest[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)
        fused += tl.sum(values * tl.where(rest, weights, 0.0)[:, None], axis=0)
        start += ROWS
    tl.store(fused_ptr + image * width + columns, fused.to(fused_ptr.dtype.element_ty), mask=columns < width)


def config(n: int, *, by_score: bool = False) -> Config:
    """Of vp::select on n scores."""
    block = next_power_of_two(n, 64)
    if not by_score:
        return Config(select_kernel, {"BLOCK": block}, num_warps=1, num_stages=1)
    return Config(rank_kernel, {"BLOCK": block, "CHUNK": 32}, num_warps=8 if block > 256 else 4, num_stages=1)


def fuse_config(n: int, width: int, dtype: str) -> Config:
    """Of vp::select_fuse on n scores and rows of `width` values of `dtype`."""
    size = 4 if dtype == "fp32" else 2
    columns = 128 if size == 2 and width > 512 else 64  # enough programs at batch 1, few that find the same cut
    constants = {"BLOCK": next_power_of_two(n, 64), "COLUMNS": columns, "ROWS": TILE_BYTES // (columns * size)}
    return Config(select_fuse_kernel, constants, num_warps=1, num_stages=1)


def launch_select(scores: Tensor, k: int, by_score: bool = False) -> Tensor:
    """Run the kernel.

    Args:
        scores: float32 [B, n], last axis of stride 1.
        k: 1 .. n.
        by_score: in order of score, not of index.

    Returns:
        int64 [B, k].
    """
    batch, n = scores.shape
    index = torch.empty((batch, k), dtype=torch.int64, device=scores.device)
    launch(config(n, by_score=by_score), (batch, 1, 1), scores, index, scores.stride(0), n, k)
    return index


def launch_select_fuse(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        scores: float32 [B, n], last axis of stride 1.
        x: [B, N, D], contiguous.
        k: 1 .. n.

    Returns:
        index int64 [B, k], fused [B, 1, D].
    """
    batch, n = scores.shape
    _, tokens, width = x.shape
    index = torch.empty((batch, k), dtype=torch.int64, device=x.device)
    fused = torch.empty((batch, 1, width), dtype=x.dtype, device=x.device)
    chosen = fuse_config(n, width, triton_type(x.dtype))
    grid = (batch * cdiv(width, chosen.constants["COLUMNS"]), 1, 1)
    launch(chosen, grid, scores, x, index, fused, scores.stride(0), n, k, tokens, width)
    return index, fused


def variants() -> Iterator[Variant]:
    """The ahead-of-time builds; scores are contiguous there, and N and D symbols."""
    select = {"scores_ptr": "*fp32", "index_ptr": "*i64", "stride": "i32", "n": "i32", "k": "i32"}
    for block in BLOCKS:
        counts = (1 if block == BLOCKS[0] else block // 2 + 1, block)
        shapes = {"B": (1, 1 << 20), "n": counts, "k": (1, block)}
        for by_score in (False, True):
            yield Variant(
                operator="select",
                name=f"{block}" + "_by_score" * by_score,
                config=config(block, by_score=by_score),
                signature=select,
                grid=("B", "1", "1"),
                shapes=shapes,
                dtype="fp32",
                aligned=("index_ptr",),
            )
        for dtype in each_dtype():
            for wide in (False, True) if dtype != "fp32" else (False,):
                yield _fuse_variant(dtype, block, shapes, wide)


def _fuse_variant(dtype: str, block: int, shapes: Mapping[str, object], wide: bool) -> Variant:
    chosen = fuse_config(block, 528 if wide else 512, dtype)
    widths = (1, 1 << 20) if dtype == "fp32" else (513, 1 << 20) if wide else (1, 512)
    signature = {
        "scores_ptr": "*fp32",
        "x_ptr": f"*{dtype}",
        "index_ptr": "*i64",
        "fused_ptr": f"*{dtype}",
        **dict.fromkeys(("stride", "n", "k", "tokens", "width"), "i32"),
    }
    return Variant(
        operator="select",
        name=f"fuse_{dtype}_{block}" + "_wide" * wide,
        config=chosen,
        signature=signature,
        grid=(f"B * cdiv(D, {chosen.constants['COLUMNS']})", "1", "1"),
        shapes={**shapes, "N": (1, 1024), "D": widths},
        dtype=dtype,
        aligned=("x_ptr", "index_ptr", "fused_ptr", "width"),
    )
