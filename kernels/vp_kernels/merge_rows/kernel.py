"""Triton kernel of vp::merge_rows: one program per tile of output rows, which searches the index lists for its sources.

Memory-bound: each kept row is read once, and each source once, by the program whose tile it joins; the index lists are
short enough for every program to read them all. At batch 256, N 197, r 13, D 384 in bf16 that is 39 MB in and 36 MB
out: 19 us at 4 TB/s, over 9216 programs of 16 rows by 128 columns (70 per multiprocessor, 9 or 10 at a time, 4 KB
each).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.launch import MAX_TOKENS, Config, Variant, absent, cdiv, each_dtype, launch, next_power_of_two

# Sources compared at a time; longer lists are processed in chunks.
MAX_SOURCES = 128


@triton.jit
def _row(x, row, columns, present, N, D):
    """Load row [TILE] of an image x [N, D] where present: fp32 [TILE, BLOCK_D]; NaN if the index is outside x."""
    inside = present & (row >= 0) & (row < N)
    mask = inside[:, None] & (columns < D)[None, :]
    offset = tl.where(inside, row, 0).to(tl.int32) * D
    found = tl.load(x + offset[:, None] + columns[None, :], mask=mask, other=float("nan"))
    return found.to(tl.float32)


@triton.jit
def _next(into, index, row, last, NONE: tl.constexpr):
    """Index of the first source after `last` [TILE] that joins each row [TILE]; NONE if there is none."""
    joins = (into[None, :] == row[:, None]) & (index[None, :] > last[:, None])
    return tl.min(tl.where(joins, index[None, :], NONE), axis=1)


@triton.jit
def merge_rows_kernel(
    x,  # [B, N, D]
    keep,  # int64 [B, K]
    source,  # int64 [B, R]
    into,  # int64 [B, R]
    source_weight,  # float32 [B, R]
    keep_weight,  # float32 [B, K]
    merged,  # out [B, K, D]
    mass,  # out float32 [B, K]
    N,
    K,
    R,
    D,
    HAS_SOURCE_WEIGHT: tl.constexpr,
    HAS_KEEP_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    NONE: tl.constexpr = 1 << 30
    # Columns fastest, images slowest: neighbouring programs share memory lines and an image's index lists.
    column_tiles = tl.cdiv(D, BLOCK_D)
    row_tiles = tl.cdiv(K, TILE)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = (program // column_tiles) % row_tiles
    image = (program // (column_tiles * row_tiles)).to(tl.int64)
    x += image * N * D
    keep += image * K
    source += image * R
    into += image * R
    source_weight += image * R
    keep_weight += image * K
    merged += image * K * D
    mass += image * K

    row = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    written = row < K
    total = tl.full([TILE], 1.0, tl.float32)
    if HAS_KEEP_WEIGHT:
        total = tl.load(keep_weight + row, mask=written, other=1.0)
    mean = _row(x, tl.load(keep + row, mask=written, other=0), columns, written, N, D)

    start = 0
    while start < R:  # not range(), see match_merge/kernel_parts.py
        index = start + tl.arange(0, BLOCK_R)
        joined = tl.load(into + index, mask=index < R, other=-1)
        joined = tl.where((joined >= 0) & (joined < K), joined, -1).to(tl.int32)
        if HAS_SOURCE_WEIGHT:  # ignore sources of weight 0
            joined = tl.where(tl.load(source_weight + index, mask=index < R, other=0.0) == 0.0, -1, joined)
        # Each round takes the next source of every row, in ascending order. Taking two at a time would double the
        # registers and halve the number of programs in flight.
        found = _next(joined, index, row, tl.full([TILE], -1, tl.int32), NONE)
        while tl.min(found) < NONE:
            present = found < NONE
            incoming = _row(x, tl.load(source + found, mask=present, other=0), columns, present, N, D)
            weight = tl.full([TILE], 1.0, tl.float32)
            if HAS_SOURCE_WEIGHT:
                weight = tl.load(source_weight + found, mask=present, other=0.0)
            # A running mean needs no second accumulator, stays within range, and is exact for equal rows.
            total = tl.where(present, total + weight, total)
            moved = mean + (incoming - mean) * tl.div_rn(weight, total)[:, None]
            mean = tl.where(present[:, None], moved, mean)
            found = _next(joined, index, row, found, NONE)
        start += BLOCK_R

    place = merged + row[:, None] * D + columns[None, :]
    tl.store(place, mean.to(merged.dtype.element_ty), mask=written[:, None] & (columns < D)[None, :])
    tl.store(mass + row, total, mask=written & (column_tile == 0))


def config(sources: int, width: int, *, has_source_weight: bool, has_keep_weight: bool) -> Config:
    """Tile sizes of a launch.

    Args:
        sources: R.
        width: D.
    """
    # 2048 elements per program, 16 per thread: whole 128-byte lines, few rows (a tile waits for the row with the most
    # sources), and few enough registers for at least 8 programs at a time.
    block_d = next(block for block in (256, 128, 64, 0) if block == 0 or width % block == 0)
    block_d = block_d or next_power_of_two(min(width, 128), 16)
    constants = {
        "HAS_SOURCE_WEIGHT": has_source_weight,
        "HAS_KEEP_WEIGHT": has_keep_weight,
        "TILE": min(2048 // block_d, 32),
        "BLOCK_R": 16 if sources <= 16 else 32 if sources <= 32 else MAX_SOURCES,
        "BLOCK_D": block_d,
    }
    return Config(merge_rows_kernel, constants, num_warps=4, num_stages=1)


def launch_merge_rows(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args, Returns: as for `vp_kernels.merge_rows.op.merge_rows`, already checked.
    """
    batch, tokens, width = x.shape
    rows, sources = keep.shape[1], source.shape[1]
    merged = torch.empty((batch, rows, width), dtype=x.dtype, device=x.device)
    mass = torch.empty((batch, rows), dtype=torch.float32, device=x.device)
    chosen = config(
        sources,
        width,
        has_source_weight=source_weight is not None,
        has_keep_weight=keep_weight is not None,
    )
    programs = cdiv(rows, chosen.constants["TILE"]) * cdiv(width, chosen.constants["BLOCK_D"])
    launch(
        chosen,
        (batch * programs,),
        x,
        keep,
        source,
        into,
        absent(x, torch.float32) if source_weight is None else source_weight,
        absent(x, torch.float32) if keep_weight is None else keep_weight,
        merged,
        mass,
        tokens,
        rows,
        sources,
        width,
    )
    return merged, mass


def variants() -> Iterator[Variant]:
    """Ahead-of-time builds."""
    for dtype in each_dtype():
        for width in (192, 384, 768, 1024):
            for low, high in ((0, 16), (17, 32), (33, MAX_TOKENS)):
                for flags in range(4):
                    yield _variant(dtype, width, low, high, bool(flags & 1), bool(flags & 2))


def _variant(dtype: str, width: int, low: int, high: int, has_source_weight: bool, has_keep_weight: bool) -> Variant:
    chosen = config(high, width, has_source_weight=has_source_weight, has_keep_weight=has_keep_weight)
    pointers = {"x": f"*{dtype}", "keep": "*i64", "source": "*i64", "into": "*i64"}
    pointers |= {"source_weight": "*fp32", "keep_weight": "*fp32", "merged": f"*{dtype}", "mass": "*fp32"}
    tile, block_d = chosen.constants["TILE"], chosen.constants["BLOCK_D"]
    return Variant(
        operator="merge_rows",
        name=f"{dtype}_{width}_r{high}" + "_source" * has_source_weight + "_keep" * has_keep_weight,
        config=chosen,
        signature=pointers | {"N": "i32", "K": "i32", "R": "i32", "D": "i32"},
        grid=(f"B * cdiv(K, {tile}) * cdiv(D, {block_d})", "1", "1"),
        shapes={"B": (1, 1 << 20), "N": (1, MAX_TOKENS), "K": (1, MAX_TOKENS), "R": (low, high), "D": width},
        dtype=dtype,
        aligned=(*pointers, "D"),
    )
