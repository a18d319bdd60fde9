"""Triton kernels of vp::select and vp::select_fuse.

One warp per program: sums and scans are shuffles, without barriers.

The k highest are found without sorting: the k-th highest score is built bit by bit from the top, counting at each bit
the scores that reach it. That takes at most 32 n operations per image, against n * n for counting ranks (32 times as
many at n = 1024), and stops once exactly k scores reach it: about 15 counts of about 100 cycles, 1 us, for 32 images at
a time on each SM. Ranks are only counted for by_score. The result equals that by ranks, ties included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.launch import Config, Variant, cdiv, each_dtype, launch, next_power_of_two, triton_type

BLOCKS = (64, 128, 256, 512, 1024)  # largest n of each ahead-of-time build
TILE_BYTES = 8192  # rows in flight per program of select_fuse: 16 loads of 16 bytes per lane


# Scores are loaded in the kernels, never in a function: torch.compile's analysis of what a kernel writes follows
# addresses through calls but not through loads, and would take scores for an output and copy them.


@triton.jit
def _keys(scores, real):
    """uint32 keys in the order of the scores: NaN is all ones, both zeros are equal; 0 (below -inf) where not real."""
    bits = scores.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits == magnitude, magnitude | 0x80000000, bits ^ 0xFFFFFFFF)
    keys = tl.where(magnitude == 0, 0x80000000, keys)
    keys = tl.where(magnitude > 0x7F800000, 0xFFFFFFFF, keys)
    return tl.where(real, keys, 0)


@triton.jit
def _cut(keys, place, k):
    """Threshold of the k highest: a key, and the last position at which an equal key is still selected.

    The key is the k-th highest, or, if the search stopped early because exactly k keys reach it, lies between that and
    the next.
    """
    cut = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    reached = tl.full((), 0, tl.int32)  # always enter the loop, whatever k is
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
    """Whether each position is among the k highest."""
    return (keys > cut) | ((keys == cut) & (place <= last))


@triton.jit
def _write_ascending(index_ptr, selected, place, k):
    """Write the selected positions in ascending order."""
    position = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    tl.store(index_ptr + position, place.to(tl.int64), mask=selected & (position < k))


@triton.jit
def select_kernel(scores_ptr, index_ptr, stride, n, k, BLOCK: tl.constexpr):
    """Process one image: scores [n], images `stride` apart -> index [k], ascending."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + image * stride + place, mask=place < n, other=0.0)
    keys = _keys(scores, place < n)
    cut, last = _cut(keys, place, k)
    _write_ascending(index_ptr + image * k, _selected(keys, place, cut, last), place, k)


@triton.jit
def rank_kernel(scores_ptr, index_ptr, stride, n, k, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Process one image: scores [n] -> index [k], by descending score; each position is written at its rank."""
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
        rank += tl.sum(before.to(tl.int32), axis=0)  # each lane owns its columns, so counts stay in registers
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
    """Compute COLUMNS columns of one image's fused token; the program of the first columns also writes the index.

    Every program repeats the search for the threshold, which takes about as long as launching a second kernel would.

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
    """Config of vp::select for n scores."""
    block = next_power_of_two(n, 64)
    if not by_score:
        return Config(select_kernel, {"BLOCK": block}, num_warps=1, num_stages=1)
    return Config(rank_kernel, {"BLOCK": block, "CHUNK": 32}, num_warps=8 if block > 256 else 4, num_stages=1)


def fuse_config(n: int, width: int, dtype: str) -> Config:
    """Config of vp::select_fuse for n scores and rows of `width` values of `dtype`."""
    size = 4 if dtype == "fp32" else 2
    # enough programs at batch 1 without repeating the search too often
    columns = 128 if size == 2 and width > 512 else 64
    constants = {"BLOCK": next_power_of_two(n, 64), "COLUMNS": columns, "ROWS": TILE_BYTES // (columns * size)}
    return Config(select_fuse_kernel, constants, num_warps=1, num_stages=1)


def launch_select(scores: Tensor, k: int, by_score: bool = False) -> Tensor:
    """Run the kernel.

    Args:
        scores: float32 [B, n], last axis of stride 1.
        k: 1 .. n.
        by_score: Order by score rather than by index.

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
    """Ahead-of-time builds; for contiguous scores, with N and D symbolic."""
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
