"""Triton kernels of vp::match_merge: the matching, one program per image, then the kernel of `vp::merge_rows`.

The matching at batch 256, N 197 (98 tokens in A, 99 in B), d 64, on 132 multiprocessors: two images on each, at once.
With 6 heads in bf16 it reads 39 MB, 10 us at 4 TB/s (6 MB, 2 us, if the heads are already summed). Three products of
128 x 128 x 64 are 3.1 M multiplications per image, 1 us at fp16's 2048 per clock; finding the best of 128 x 128,
ranking 128 by counting, and waiting for each of the three tiles take about 1 us each. The merge moves 75 MB, 19 us
(`merge_rows/kernel.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.launch import MAX_TOKENS, Config, Variant, absent, each_dtype, launch, next_power_of_two
from vp_kernels.match_merge.kernel_parts import LOWEST, _ahead, _better, _halves, _key, _merge, _stay, _unit_rows
from vp_kernels.merge_rows.kernel import launch_merge_rows


@triton.jit
def _varies(scores, patches, tau, BLOCK_N: tl.constexpr):
    """Whether the variance of an image's scores, scaled to sum to 1, is at least tau or NaN."""
    patch = tl.arange(0, BLOCK_N)
    score = tl.load(scores + patch, mask=patch < patches, other=0.0)
    share = tl.div_rn(score, tl.broadcast_to(tl.sum(score, axis=0), [BLOCK_N]))
    apart = tl.where(patch < patches, share - tl.sum(share, axis=0) / patches, 0.0)
    variance = tl.sum(apart * apart, axis=0) / tl.maximum(patches - 1, 1)
    return (variance < tl.cast(tau, tl.float32)) == 0


@triton.jit
def _prune(
    scores, size, keep, source, into, weight, keep_weight, best, patches, prefix, r,
    HAS_SIZE: tl.constexpr, BLOCK_A: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keep the prefix and the highest-scoring patch tokens, in descending order; merge with weight 0."""
    in_a = tl.arange(0, BLOCK_A)
    zeros = tl.zeros([BLOCK_A], tl.int32)
    start = 0
    while start < prefix:
        row = start + in_a
        _stay(keep, keep_weight, size, row, row, row < prefix, HAS_SIZE)
        start += BLOCK_A
    start = 0
    while start < r:
        row = start + in_a
        _merge(source, into, weight, size, row, zeros, zeros, row < r, False, False)
        tl.store(weight + row, zeros.to(tl.float32), mask=row < r)
        start += BLOCK_A
    # Keys go through memory, as in the matching: torch.compile's analysis of what a kernel writes would otherwise treat
    # the input of a function as written, if its result determines an address.
    start = 0
    while start < patches:
        row = start + in_a
        tl.store(best + row, _key(tl.load(scores + row, mask=row < patches, other=0.0)), mask=row < patches)
        start += BLOCK_A
    tl.debug_barrier()
    start = 0
    while start < patches:
        row = start + in_a
        key = tl.load(best + row, mask=row < patches, other=LOWEST)
        ahead = _ahead(best, patches, key, row, CHUNK)
        stays = (row < patches) & (ahead < patches - r)
        _stay(keep, keep_weight, size, prefix + ahead, prefix + row, stays, HAS_SIZE)
        start += BLOCK_A


@triton.jit
def _match_in_tiles(
    metric, unit, best, partner, N, H, first_a, first_b, a_tokens, b_tokens, stride_n, stride_h,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Best partner of each token, if A takes several tiles. Unit rows are kept in memory, so heads are summed once."""
    column = tl.arange(0, BLOCK_K)
    start = 0
    while start < N:
        row = start + tl.arange(0, BLOCK_B)
        rows = _unit_rows(metric, row, row < N, H, stride_n, stride_h, HEAD_DIM, BLOCK_K, GROUP)
        tl.store(unit + row[:, None] * BLOCK_K + column[None, :], rows, mask=(row < N)[:, None])
        start += BLOCK_B
    tl.debug_barrier()
    start = 0
    while start < a_tokens:
        in_a = start + tl.arange(0, BLOCK_A)
        from_a = unit + (first_a + 2 * in_a)[:, None] * BLOCK_K + column[None, :]
        high_a, low_a = _halves(tl.load(from_a, mask=(in_a < a_tokens)[:, None], other=0.0))
        key = tl.full([BLOCK_A], LOWEST, tl.int32)
        mate = tl.zeros([BLOCK_A], tl.int32)
        other = 0
        while other < b_tokens:
            in_b = other + tl.arange(0, BLOCK_B)
            from_b = unit + (first_b + 2 * in_b)[:, None] * BLOCK_K + column[None, :]
            unit_b = tl.load(from_b, mask=(in_b < b_tokens)[:, None], other=0.0)
            key, mate = _better(key, mate, high_a, low_a, unit_b, in_b, b_tokens)
            other += BLOCK_B
        tl.store(best + in_a, key, mask=in_a < a_tokens)
        tl.store(partner + in_a, mate, mask=in_a < a_tokens)
        start += BLOCK_A


@triton.jit
def _match(
    metric, size, keep, source, into, weight, keep_weight, unit, best, partner, N, H, prefix, r, stride_n, stride_h,
    HAS_SIZE: tl.constexpr, HAS_SCORES: tl.constexpr, ONE_TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, B_TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the index lists of an image that merges."""
    first_a = prefix + prefix % 2
    first_b = prefix + (prefix + 1) % 2
    a_tokens = (N - first_a + 1) // 2
    b_tokens = (N - first_b + 1) // 2
    start = 0
    while start < prefix + b_tokens:  # tokens that always stay
        i = start + tl.arange(0, BLOCK_A)
        token = tl.where(i < prefix, i, first_b + 2 * (i - prefix))
        place = tl.where(i < prefix, i, i + a_tokens - r)
        _stay(keep, keep_weight, size, place, token, i < prefix + b_tokens, HAS_SIZE)
        start += BLOCK_A

    if ONE_TILE:
        in_a = tl.arange(0, BLOCK_A)
        unit_a = _unit_rows(
            metric, first_a + 2 * in_a, in_a < a_tokens, H, stride_n, stride_h, HEAD_DIM, BLOCK_K, GROUP
        )
        high_a, low_a = _halves(unit_a)
        key = tl.full([BLOCK_A], LOWEST, tl.int32)
        mate = tl.zeros([BLOCK_A], tl.int32)
        # unrolled: A's tile is then kept in shared memory, in a loop in registers
        for tile in tl.static_range(B_TILES):
            in_b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
            unit_b = _unit_rows(
                metric, first_b + 2 * in_b, in_b < b_tokens, H, stride_n, stride_h, HEAD_DIM, BLOCK_K, GROUP
            )
            key, mate = _better(key, mate, high_a, low_a, unit_b, in_b, b_tokens)
        tl.store(best + in_a, key, mask=in_a < a_tokens)
        tl.store(partner + in_a, mate, mask=in_a < a_tokens)
    else:
        _match_in_tiles(
            metric, unit, best, partner, N, H, first_a, first_b, a_tokens, b_tokens, stride_n, stride_h,
            HEAD_DIM, BLOCK_K, GROUP, BLOCK_A, BLOCK_B,
        )  # fmt: skip

    tl.debug_barrier()
    stayed = 0
    start = 0
    while start < a_tokens:
        row = start + tl.arange(0, BLOCK_A)
        key = tl.load(best + row, mask=row < a_tokens, other=LOWEST)
        mate = tl.load(partner + row, mask=row < a_tokens, other=0)
        ahead = _ahead(best, a_tokens, key, row, CHUNK)
        token = first_a + 2 * row
        merges = (row < a_tokens) & (ahead < r)
        stays = ((row < a_tokens) & (ahead >= r)).to(tl.int32)
        place = prefix + stayed + tl.cumsum(stays, axis=0) - stays
        _merge(source, into, weight, size, ahead, token, prefix + a_tokens - r + mate, merges, HAS_SIZE, HAS_SCORES)
        _stay(keep, keep_weight, size, place, token, stays != 0, HAS_SIZE)
        stayed += tl.sum(stays, axis=0)
        start += BLOCK_A


@triton.jit
def match_kernel(
    metric,  # [B, N, H, HEAD_DIM], by its strides
    size,  # float32 [B, N]
    scores,  # float32 [B, N - prefix], rows stride_s apart
    keep,  # out int64 [B, N - r]
    source,  # out int64 [B, r]
    into,  # out int64 [B, r]
    weight,  # out float32 [B, r]
    keep_weight,  # out float32 [B, N - r]
    unit,  # scratch float32 [B, N, BLOCK_K], unless ONE_TILE
    best,  # scratch int32 [B, N - prefix]
    partner,  # scratch int32 [B, N - prefix]
    tau,
    N,
    H,
    prefix,
    r,
    stride_b,
    stride_n,
    stride_h,
    stride_s,
    HAS_SIZE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    B_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    metric += image * stride_b
    size += image * N
    keep += image * (N - r)
    keep_weight += image * (N - r)
    source += image * r
    into += image * r
    weight += image * r
    unit += image * N * BLOCK_K
    best += image * (N - prefix)
    partner += image * (N - prefix)
    if HAS_SCORES:
        if _varies(scores + image * stride_s, N - prefix, tau, BLOCK_N):
            _prune(
                scores + image * stride_s, size, keep, source, into, weight, keep_weight, best, N - prefix, prefix, r,
                HAS_SIZE, BLOCK_A, CHUNK,
            )  # fmt: skip
        else:
            _match(
                metric, size, keep, source, into, weight, keep_weight, unit, best, partner, N, H, prefix, r,
                stride_n, stride_h, HAS_SIZE, HAS_SCORES, ONE_TILE, HEAD_DIM,
                BLOCK_K, GROUP, BLOCK_A, BLOCK_B, B_TILES, CHUNK,
            )  # fmt: skip
    else:
        _match(
            metric, size, keep, source, into, weight, keep_weight, unit, best, partner, N, H, prefix, r,
            stride_n, stride_h, HAS_SIZE, HAS_SCORES, ONE_TILE, HEAD_DIM,
            BLOCK_K, GROUP, BLOCK_A, BLOCK_B, B_TILES, CHUNK,
        )  # fmt: skip


def config(patches: int, heads: int, head_dim: int, *, has_size: bool, has_scores: bool) -> Config:
    """Tile sizes of the matching.

    Args:
        patches: N - prefix.
        heads, head_dim: Of the metric.
    """
    block_k = next_power_of_two(head_dim, 16)
    most = (patches + 1) // 2  # the larger of n_A and n_B
    # [128, 64] of A and [64, 64] of B, as two fp16 numbers each: 48 KB, two programs per multiprocessor. [128, 128]
    # similarities would take the registers of both. Fewer rows if they are longer.
    block_a = min(next_power_of_two(most, 16), 128, 8192 // block_k)
    block_b = min(block_a, 64)
    constants = {
        "HAS_SIZE": has_size,
        "HAS_SCORES": has_scores,
        "ONE_TILE": most <= block_a,
        "HEAD_DIM": head_dim,
        "BLOCK_K": block_k,
        "GROUP": 1 if heads == 1 else 3,
        "BLOCK_A": block_a,
        "BLOCK_B": block_b,
        "B_TILES": block_a // block_b,
        "BLOCK_N": 256 if patches <= 256 else MAX_TOKENS,
        "CHUNK": 32,
    }
    return Config(match_kernel, constants, num_warps=8 if block_a == 128 else 4, num_stages=1)


def launch_match(
    metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None = None, tau: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run the matching.

    Args: as for `vp_kernels.match_merge.op.match_merge`, already checked.

    Returns:
        keep int64 [B, N - r]; source, into int64 [B, r]; source weights float32 [B, r] (0 for a pruned image) and
        weights of the rows that stay [B, N - r]; None where all are 1.
    """
    batch, tokens = metric.shape[:2]
    heads, head_dim = (metric.shape[2] if metric.ndim == 4 else 1), metric.shape[-1]
    chosen = config(tokens - prefix, heads, head_dim, has_size=size is not None, has_scores=scores is not None)

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty((batch, *shape), dtype=dtype, device=metric.device)

    keep, source, into = new(tokens - r), new(r), new(r)
    weight = new(r, dtype=torch.float32) if size is not None or scores is not None else None
    keep_weight = new(tokens - r, dtype=torch.float32) if size is not None else None
    best, partner = (new(tokens - prefix, dtype=torch.int32) for _ in range(2))
    none = absent(metric, torch.float32)  # unused arguments still need a pointer
    unit = none
    if not chosen.constants["ONE_TILE"]:
        unit = new(tokens, chosen.constants["BLOCK_K"], dtype=torch.float32)
    launch(
        chosen,
        (batch,),
        metric,
        none if size is None else size,
        none if scores is None else scores,
        keep,
        source,
        into,
        none if weight is None else weight,
        none if keep_weight is None else keep_weight,
        unit,
        best,
        partner,
        float(tau),
        tokens,
        heads,
        prefix,
        r,
        metric.stride(0),
        metric.stride(1),
        metric.stride(2) if metric.ndim == 4 else 0,
        0 if scores is None else scores.stride(0),
    )
    return keep, source, into, weight, keep_weight


def launch_match_merge(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run both kernels.

    Args, Returns: as for `vp_kernels.match_merge.op.match_merge`, already checked.
    """
    return launch_merge_rows(x, *launch_match(metric, size, r, prefix, scores, tau))


def variants() -> Iterator[Variant]:
    """Ahead-of-time builds of the matching; the merge uses those of `vp_kernels.merge_rows.kernel`.

    Which one: with source weights if there are sizes or scores, with weights of the kept rows if there are sizes.
    """
    buckets = ((2, 32), (33, 64), (65, 128), (129, 256), (257, MAX_TOKENS))
    for dtype in each_dtype():
        for low, high in buckets:
            for heads in (1, 2):
                for flags in range(4):
                    yield _variant(dtype, low, high, heads, bool(flags & 1), bool(flags & 2))


def _variant(dtype: str, low: int, high: int, heads: int, has_size: bool, has_scores: bool) -> Variant:
    head_dim = 64
    pointers = {"metric": f"*{dtype}", "size": "*fp32", "scores": "*fp32"}
    pointers |= {"keep": "*i64", "source": "*i64", "into": "*i64", "weight": "*fp32", "keep_weight": "*fp32"}
    pointers |= {"unit": "*fp32", "best": "*i32", "partner": "*i32"}
    strides = {"stride_b": "i32", "stride_n": "i32", "stride_h": "i32"}
    return Variant(
        operator="match_merge",
        name=f"{dtype}_d{head_dim}_{high}" + "_heads" * (heads > 1) + "_size" * has_size + "_scores" * has_scores,
        config=config(high, heads, head_dim, has_size=has_size, has_scores=has_scores),
        signature=pointers
        | {"tau": "fp32", "N": "i32", "H": "i32", "prefix": "i32", "r": "i32"}
        | strides
        | {"stride_s": "i32"},
        grid=("B", "1", "1"),
        # n: patch tokens, N - prefix; r is at most half of them.
        shapes={"B": (1, 1 << 30), "n": (low, high), "H": (2, 1 << 10) if heads > 1 else 1, "d": head_dim},
        dtype=dtype,
        # Scores are often a view past the prefix, whose rows are not aligned to 16 bytes.
        aligned=(*(name for name in pointers if name != "scores"), *strides),
    )
