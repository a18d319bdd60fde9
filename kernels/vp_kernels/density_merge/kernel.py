"""Triton kernel of vp::density_merge: BAT's step in one launch, one program per image.

The stages have little work and long latency, so programs should overlap: 4 warps of up to 255 registers and 42 kB of
shared memory always fit two programs on an SM, and a batch of 256 images runs at once on 132 SMs (8 warps take 176
registers each: one program per SM, and a second wave). A second launch, to move rows in parallel, would save about 5 us
at batch 1 and cost as much.

Estimates for an H200 (not measured), bf16, N 197, D 384, 127 attentive and 69 inattentive tokens, 21 clusters, 10
pairs: split 3 us, cosines 3, middle row 3, products 5, density, peaks and assignment 4, ranks 3, copied rows 3,
merges 3, clusters 4: 30 us at batch 1. Batch 256 reads 39 MB and writes 27 MB, 15 us at 4.5 TB/s; the products are 3
tiles of 64 x 64 x 384, the cosines one, 3 GFLOP in all; two programs share an SM's issue slots: 35 to 50 us, against
350 us for a dense DeiT-S block. Products of raw 16-bit rows less an exact `middle_row` have a relative error in the
distances of at most 2e-6 if channels are 50 to 200 times larger than the rest (1e-5 to 1e-4 without it; simulated,
truncating accumulation).
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.density_merge.kernel_moves import copy_rows, merge_pairs, pool_clusters
from vp_kernels.density_merge.kernel_parts import (
    assign,
    best_partners,
    densities,
    middle_row,
    partition,
    peaks,
    products,
    rank_pairs,
)
from vp_kernels.launch import MAX_TOKENS, Config, Variant, absent, each_dtype, launch, triton_type

# Lists of one value per token at the start of a program's scratch, see `density_merge_kernel`.
LISTS = tl.constexpr(14)


@triton.jit
def density_merge_kernel(
    x_ptr,
    scores_ptr,
    size_ptr,
    merged_ptr,
    merged_size_ptr,
    scratch_ptr,
    tokens,
    width,
    tokens_out,
    clusters,
    pairs,
    prefix,
    scratch_stride,
    HAS_SIZE: tl.constexpr,
    BY_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOVE_ROWS: tl.constexpr,
    MOVE_D: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Process one image. Grid: (B,).

    Args:
        x_ptr: [B, tokens, width].
        scores_ptr: float32 [B, tokens].
        size_ptr: float32 [B, tokens]; not read without HAS_SIZE.
        merged_ptr: x' [B, tokens_out, width].
        merged_size_ptr: float32 [B, tokens_out].
        scratch_ptr: float32 [B, scratch_stride], uninitialised; see `scratch_values`.
        HAS_SIZE: Tokens have sizes.
        BY_SIZE: Weight means by size, not by score.
        TILE, BLOCK_D, STAGES: Tokens, channels and pipeline stages of matrix products.
        ROWS, COLUMNS: Tile of all-pairs comparisons.
        MOVE_ROWS, MOVE_D: Rows and channels copied or mixed at a time.
        GROUP, MEMBERS: Means computed at a time, and tokens of each at a time.
    """
    image = tl.program_id(0).to(tl.int64)
    x = x_ptr + image * tokens * width
    scores = scores_ptr + image * tokens
    size = size_ptr + image * tokens
    merged = merged_ptr + image * tokens_out * width
    merged_size = merged_size_ptr + image * tokens_out
    scratch = scratch_ptr + image * scratch_stride

    length = (tokens + 15) // 16 * 16
    attentive, rest = scratch, scratch + length  # indices into x
    score, partner, value = scratch + 2 * length, scratch + 3 * length, scratch + 4 * length  # by even position
    source, single = scratch + 5 * length, scratch + 6 * length  # even positions
    norm, density, farthest = scratch + 7 * length, scratch + 8 * length, scratch + 9 * length  # by inattentive pos.
    peak, label = scratch + 10 * length, scratch + 11 * length
    centres, others = scratch + 12 * length, scratch + 13 * length  # inattentive positions
    pivot = scratch + LISTS * length
    square = pivot + (width + 15) // 16 * 16

    n = tokens - prefix
    n_attentive = tokens_out - prefix - clusters + pairs
    n_rest = n - n_attentive
    stride = (n_rest + 15) // 16 * 16  # row stride of `square`
    paired = tl.minimum(pairs, 1)  # without pairs every attentive token is unmerged and none counts as odd
    n_odd = n_attentive // 2 * paired
    n_even = n_attentive - n_odd

    partition(scores + prefix, n, n_attentive, attentive, rest, prefix, ROWS, COLUMNS)
    tl.debug_barrier()
    best_partners(x, attentive, score, partner, n_even * paired, n_odd, width, TILE, BLOCK_D, STAGES)
    if n_rest > 0:
        middle_row(x, rest, pivot, n_rest, width, TILE, MOVE_D)
    tl.debug_barrier()
    products(x, rest, pivot, square, norm, n_rest, stride, width, TILE, BLOCK_D, STAGES)
    tl.debug_barrier()
    rank_pairs(score, partner, value, n_even * paired, ROWS, COLUMNS)
    densities(square, norm, density, farthest, n_rest, stride, width, ROWS, COLUMNS)
    tl.debug_barrier()
    peaks(square, norm, density, farthest, peak, n_rest, stride, ROWS, COLUMNS)
    partition(value, n_even, pairs, source, single, 0, ROWS, COLUMNS)
    tl.debug_barrier()
    partition(peak, n_rest, clusters, centres, others, 0, ROWS, COLUMNS)
    tl.debug_barrier()
    assign(square, norm, centres, label, n_rest, clusters, stride, ROWS, COLUMNS)

    kept = tokens_out - clusters
    n_single = n_even - pairs
    step = 1 + paired
    copy_rows(
        x, size, merged, merged_size, attentive, single, prefix, n_single, step, kept, width,
        HAS_SIZE, MOVE_ROWS, MOVE_D,
    )  # fmt: skip
    tl.debug_barrier()
    merge_pairs(
        x, scores, size, merged, merged_size, attentive, source, partner, pairs, prefix + n_single, width,
        HAS_SIZE, BY_SIZE, GROUP, MOVE_D,
    )  # fmt: skip
    pool_clusters(
        x, scores, size, merged + kept * width, merged_size + kept, rest, label, n_rest, clusters, width,
        HAS_SIZE, BY_SIZE, GROUP, MEMBERS, MOVE_D,
    )  # fmt: skip


def config(dtype: str, *, has_size: bool, by_size: bool) -> Config:
    """Tile sizes and number of warps.

    Args:
        dtype: Of the tokens, "fp32", "fp16" or "bf16".
        has_size: Tokens have sizes.
        by_size: Weight means by size, not by score.
    """
    wide = dtype == "fp32"
    constants = {
        "HAS_SIZE": has_size,
        "BY_SIZE": by_size,
        "TILE": 64,
        "BLOCK_D": 16 if wide else 64,
        "STAGES": 3,
        "ROWS": 64,
        "COLUMNS": 32,
        "MOVE_ROWS": 64,
        "MOVE_D": 64 if wide else 128,
        "GROUP": 32,
        "MEMBERS": 16 if wide else 64,
    }
    return Config(density_merge_kernel, constants, num_warps=4, num_stages=1)


def scratch_values(tokens: int, width: int, tokens_out: int, clusters: int, pairs: int, prefix: int) -> int:
    """Number of float32 scratch values per image."""
    rest = tokens - (tokens_out - clusters + pairs)
    return int(LISTS.value) * _up(tokens) + _up(width) + rest * _up(rest)


def _up(n: int) -> int:
    return -(-n // 16) * 16


def launch_density_merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str = "attention",
) -> tuple[Tensor, Tensor]:
    """Run the kernel. Arguments as for `op.density_merge`, already checked.

    Returns:
        x' [B, tokens_out, D], dtype of x; size' float32 [B, tokens_out].
    """
    batch, tokens, width = x.shape
    merged = x.new_empty((batch, tokens_out, width))
    merged_size = scores.new_empty((batch, tokens_out))
    values = scratch_values(tokens, width, tokens_out, clusters, pairs, prefix)
    scratch = scores.new_empty((batch, values))
    if isinstance(batch, int) and batch == 0:
        return merged, merged_size
    chosen = config(triton_type(x.dtype), has_size=size is not None, by_size=weights == "size")
    launch(
        chosen, (batch, 1, 1), x, scores, absent(scores) if size is None else size, merged, merged_size, scratch,
        tokens, width, tokens_out, clusters, pairs, prefix, values,
    )  # fmt: skip
    return merged, merged_size


def variants() -> Iterator[Variant]:
    """Ahead-of-time builds. One covers any N up to MAX_TOKENS, since the kernel loops; D must be a multiple of 16."""
    for dtype in each_dtype():
        for has_size in (False, True):
            for by_size in (False, True):
                tokens = {"x_ptr": f"*{dtype}", "scores_ptr": "*fp32", "size_ptr": "*fp32"}
                found = {"merged_ptr": f"*{dtype}", "merged_size_ptr": "*fp32", "scratch_ptr": "*fp32"}
                counts = ("tokens", "width", "tokens_out", "clusters", "pairs", "prefix", "scratch_stride")
                yield Variant(
                    operator="density_merge",
                    name=dtype + "_sizes" * has_size + "_by_size" * by_size,
                    config=config(dtype, has_size=has_size, by_size=by_size),
                    signature={**tokens, **found, **dict.fromkeys(counts, "i32")},
                    grid=("B", "1", "1"),
                    shapes={"B": (1, 1 << 20), "N": (1, MAX_TOKENS), "D": (16, 1 << 13)},
                    dtype=dtype,
                    aligned=(*tokens, *found, "width", "scratch_stride"),
                )
