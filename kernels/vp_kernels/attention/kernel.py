"""Triton kernels of vp::attention: two attention kernels, and one that sums the attention received by each key.

`attention_whole`, up to 256 keys: one program holds all keys and values of one (image, head) in shared memory, and the
whole softmax of 64 queries in registers, so there is no online rescaling and the probabilities are available for the
importance. Attention this short is memory-bound (about N / 2 FLOP per byte), so one program per (image, head) loads K
and V once and loops over the query tiles; it is split over more programs only if the batch is too small to fill the
GPU. Keys are padded to a sum of powers of two (197 = 128 + 64 + 16 instead of 256), one tile each. One warpgroup and 64
queries are the minimum for Hopper's wgmma; with two or more programs per multiprocessor, loads and exponentials of one
overlap with matrix products of another.

`attention_looped`, for more keys and for fp32: tiles of keys with the online softmax, one program per query tile. The
importance takes a second pass over the keys, once the maxima and sums of the rows are known.

Importance: each query tile stores its column sums, [B, H, T, N], and `sum_partials` adds them in a fixed order. There
are no atomics, and the result for an image does not depend on the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.launch import MAX_TOKENS, Config, Variant, absent, binary_parts, cdiv, each_dtype, launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, start, limit, stride, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr):
    """Load rows start .. start + ROWS - 1 of q, k or v, zero from `limit` on: [ROWS, D0] and [ROWS, D1]."""
    rows = (start + tl.arange(0, ROWS))[:, None]
    pointers = base + rows * stride
    if MASK:
        first = tl.load(pointers + tl.arange(0, D0)[None, :], mask=rows < limit, other=0.0)
    else:
        first = tl.load(pointers + tl.arange(0, D0)[None, :])
    second = first  # unused if the head dim is a power of two
    if D1 > 0:
        if MASK:
            second = tl.load(pointers + (D0 + tl.arange(0, D1))[None, :], mask=rows < limit, other=0.0)
        else:
            second = tl.load(pointers + (D0 + tl.arange(0, D1))[None, :])
    return first, second


@triton.jit
def _logits(
    q, q_, k, k_, bias, start, N, KEYS: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Logits of keys start .. start + KEYS - 1, [queries, KEYS], -inf beyond N. With a bias: scaled, in base 2."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q_, tl.trans(k_), s, input_precision="ieee")
    keys = start + tl.arange(0, KEYS)
    if BIAS:
        s = s * SCALE + (tl.load(bias + keys, mask=keys < N, other=0.0) * LOG2_E)[None, :]
    if MASK:
        s = tl.where(keys[None, :] < N, s, float("-inf"))
    return s


@triton.jit
def _store_columns(partial, p, kept, start, N, KEYS: tl.constexpr):
    """Add up the kept rows of p, [queries, KEYS], into partial[start ..]."""
    keys = start + tl.arange(0, KEYS)
    # where() rather than a product with 0: an excluded row may hold NaN.
    tl.store(partial + keys, tl.sum(tl.where(kept[:, None], p, 0.0), axis=0), mask=keys < N)


@triton.jit
def _store_rows(out, o, o_, rows, N, stride, D0: tl.constexpr, D1: tl.constexpr):
    """Store the rows of the output below N, [queries, D0] and [queries, D1]."""
    pointers = out + rows[:, None] * stride
    inside = rows[:, None] < N
    tl.store(pointers + tl.arange(0, D0)[None, :], o.to(out.dtype.element_ty), mask=inside)
    if D1 > 0:
        tl.store(pointers + (D0 + tl.arange(0, D1))[None, :], o_.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention_whole(
    qkv, key_bias, out, partial, N, H, bias_stride,
    D0: tl.constexpr, D1: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK_M: tl.constexpr,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, CLASS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Attend to all keys at once. Grid: (B * H, s), query tile t by program t mod s.

    Args:
        qkv: [B, N, 3, H, D0 + D1].
        key_bias: float32, with row stride bias_stride.
        out: [B, N, H * (D0 + D1)].
        partial: float32 [B, H, T, N]; T = 1 with CLASS, the number of query tiles with MEAN.
        P0, P1, P2: Sizes of the key tiles, 0 if unused; only the last may extend beyond N.
        SCALE: log2(e) / sqrt(d).
    """
    pair = tl.program_id(0)
    batch = (pair // H).to(tl.int64)
    head = pair % H
    width = H * (D0 + D1)
    q_base = qkv + batch * N * (3 * width) + head * (D0 + D1)
    k_base = q_base + width
    v_base = k_base + width
    o_base = out + batch * N * width + head * (D0 + D1)
    bias = key_bias + batch * bias_stride
    factor: tl.constexpr = 1.0 if HAS_BIAS else SCALE

    k0, k0_ = _rows(k_base, 0, N, 3 * width, P0, D0, D1, P1 == 0)
    if P1 > 0:
        k1, k1_ = _rows(k_base, P0, N, 3 * width, P1, D0, D1, P2 == 0)
    if P2 > 0:
        k2, k2_ = _rows(k_base, P0 + P1, N, 3 * width, P2, D0, D1, True)
    v0, v0_ = _rows(v_base, 0, N, 3 * width, P0, D0, D1, P1 == 0)
    if P1 > 0:
        v1, v1_ = _rows(v_base, P0, N, 3 * width, P1, D0, D1, P2 == 0)
    if P2 > 0:
        v2, v2_ = _rows(v_base, P0 + P1, N, 3 * width, P2, D0, D1, True)

    tiles = tl.cdiv(N, BLOCK_M)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1)):
        q, q_ = _rows(q_base, tile * BLOCK_M, N, 3 * width, BLOCK_M, D0, D1, True)
        s0 = _logits(q, q_, k0, k0_, bias, 0, N, P0, D1, SCALE, HAS_BIAS, P1 == 0)
        top = tl.max(s0, axis=1)
        if P1 > 0:
            s1 = _logits(q, q_, k1, k1_, bias, P0, N, P1, D1, SCALE, HAS_BIAS, P2 == 0)
            top = tl.maximum(top, tl.max(s1, axis=1))
        if P2 > 0:
            s2 = _logits(q, q_, k2, k2_, bias, P0 + P1, N, P2, D1, SCALE, HAS_BIAS, True)
            top = tl.maximum(top, tl.max(s2, axis=1))
        top *= factor

        # A row of only -inf gives -inf - -inf = NaN, as intended.
        p0 = tl.exp2(s0 * factor - top[:, None])
        total = tl.sum(p0, axis=1)
        if P1 > 0:
            p1 = tl.exp2(s1 * factor - top[:, None])
            total += tl.sum(p1, axis=1)
        if P2 > 0:
            p2 = tl.exp2(s2 * factor - top[:, None])
            total += tl.sum(p2, axis=1)
        inverse = 1.0 / total
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)

        if CLASS or MEAN:  # noqa: SIM102 (the compiler decides the one, the run the other)
            if MEAN or tile == 0:
                kept = rows == 0 if CLASS else rows < N
                columns = partial + (pair.to(tl.int64) * (1 if CLASS else tiles) + tile) * N
                _store_columns(columns, p0 * inverse[:, None], kept, 0, N, P0)
                if P1 > 0:
                    _store_columns(columns, p1 * inverse[:, None], kept, P0, N, P1)
                if P2 > 0:
                    _store_columns(columns, p2 * inverse[:, None], kept, P0 + P1, N, P2)

        o = tl.dot(p0.to(v0.dtype), v0, input_precision="ieee")
        o_ = o
        if P1 > 0:
            o = tl.dot(p1.to(v0.dtype), v1, o, input_precision="ieee")
        if P2 > 0:
            o = tl.dot(p2.to(v0.dtype), v2, o, input_precision="ieee")
        if D1 > 0:
            o_ = tl.dot(p0.to(v0.dtype), v0_, input_precision="ieee")
            if P1 > 0:
                o_ = tl.dot(p1.to(v0.dtype), v1_, o_, input_precision="ieee")
            if P2 > 0:
                o_ = tl.dot(p2.to(v0.dtype), v2_, o_, input_precision="ieee")
        _store_rows(o_base, o * inverse[:, None], o_ * inverse[:, None], rows, N, width, D0, D1)


@triton.jit
def attention_looped(
    qkv, key_bias, out, partial, N, H, bias_stride,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, CLASS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Attend to keys tile by tile. Grid: (B * H * query tiles,), tiles of one (image, head) adjacent. Args as above."""
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    batch = (pair // H).to(tl.int64)
    head = pair % H
    width = H * (D0 + D1)
    q_base = qkv + batch * N * (3 * width) + head * (D0 + D1)
    k_base = q_base + width
    v_base = k_base + width
    o_base = out + batch * N * width + head * (D0 + D1)
    bias = key_bias + batch * bias_stride
    factor: tl.constexpr = 1.0 if HAS_BIAS else SCALE

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, q_ = _rows(q_base, tile * BLOCK_M, N, 3 * width, BLOCK_M, D0, D1, True)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, D0], tl.float32)
    o_ = tl.zeros([BLOCK_M, D1 if D1 > 0 else D0], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        k, k_ = _rows(k_base, start, N, 3 * width, BLOCK_N, D0, D1, True)
        v, v_ = _rows(v_base, start, N, 3 * width, BLOCK_N, D0, D1, True)
        s = _logits(q, q_, k, k_, bias, start, N, BLOCK_N, D1, SCALE, HAS_BIAS, True)
        higher = tl.maximum(top, tl.max(s, axis=1) * factor)
        # The maximum is -inf while all keys so far are masked, and -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, axis=1)
        o = tl.dot(p.to(v.dtype), v, o * fade[:, None], input_precision="ieee")
        if D1 > 0:
            o_ = tl.dot(p.to(v.dtype), v_, o_ * fade[:, None], input_precision="ieee")
        top = higher
    inverse = 1.0 / total  # inf if all keys are masked; 0 * inf is then NaN
    _store_rows(o_base, o * inverse[:, None], o_ * inverse[:, None], rows, N, width, D0, D1)

    if CLASS or MEAN:  # noqa: SIM102 (the compiler decides the one, the run the other)
        if MEAN or tile == 0:
            kept = rows == 0 if CLASS else rows < N
            columns = partial + (pair.to(tl.int64) * (1 if CLASS else tiles) + tile) * N
            for start in tl.range(0, N, BLOCK_N):
                k, k_ = _rows(k_base, start, N, 3 * width, BLOCK_N, D0, D1, True)
                s = _logits(q, q_, k, k_, bias, start, N, BLOCK_N, D1, SCALE, HAS_BIAS, True)
                p = tl.exp2(s * factor - top[:, None]) * inverse[:, None]
                _store_columns(columns + start, p, kept, 0, N - start, BLOCK_N)


@triton.jit
def sum_partials(partial, importance, rows, N, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """importance[b] = sum of partial[b] / count. Grid: (B, tiles of N).

    Args:
        partial: float32 [B, rows, N].
        importance: float32 [B, N].
    """
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (columns[None, :] < N)
        total += tl.load(partial + (batch * rows + row[:, None]) * N + columns[None, :], mask=inside, other=0.0)
    tl.store(importance + batch * N + columns, tl.sum(total, axis=0) / count, mask=columns < N)


# Rows of a query tile when all keys are held at once: the minimum for wgmma.
BLOCK_M = 64
# Shared memory available to one program on the smallest supported GPUs: 99 KB (compute capability 8.6, 8.9 and 12.0).
SHARED = 101376
# Four programs on each of an H200's 132 multiprocessors; with fewer, query tiles of one (image, head) are split up.
PROGRAMS = 528


def config(N: int, d: int, dtype: torch.dtype, *, bias: bool = False, importance: str = "none") -> Config:
    """Kernel, tile sizes and number of warps.

    Chosen by the compiler's report for sm_90, bf16, d = 64, not yet by timing. Without importance and bias, programs
    per multiprocessor are: two at 197 tokens (187 registers), three at 138, four at 98, five at 69. Nothing spills,
    except 32 bytes at 197 tokens with a bias and "class".

    Args:
        N: Number of keys and queries.
        d: Head dim.
    """
    first = 1 << (d.bit_length() - 1)  # 80 = 64 + 16, 96 = 64 + 32
    constants: dict[str, Any] = {
        "D0": first,
        "D1": d - first,
        "SCALE": math.log2(math.e) / math.sqrt(d),
        "HAS_BIAS": bias,
        "CLASS": importance == "class",
        "MEAN": importance == "mean",
    }
    if dtype == torch.float32:  # products run on the scalar units with operands in registers, hence small tiles
        return Config(attention_looped, {**constants, "BLOCK_M": 32, "BLOCK_N": 32}, 4 if d <= 64 else 8, 1)
    parts = binary_parts(N, 3)
    # Prefetch the next query tile, unless that lowers the occupancy or makes registers spill.
    stages = 1 if bias or d > 64 else 2
    if N <= 256 and (2 * sum(parts) + stages * BLOCK_M) * d * 2 + BLOCK_M * 64 * 2 <= SHARED:
        sizes = dict(zip(("P0", "P1", "P2"), [*parts, 0, 0], strict=False))
        return Config(attention_whole, {**constants, **sizes, "BLOCK_M": BLOCK_M}, 4, stages)
    # 128 queries halve the reads of K and V, if the registers still fit two programs.
    wide = d <= 64 and not bias
    tiles = {"BLOCK_M": 128 if wide else 64, "BLOCK_N": 64}
    return Config(attention_looped, {**constants, **tiles}, 8 if wide else 4, 2)


def sum_config(importance: str) -> Config:
    """Config of `sum_partials`: rows are the heads, times the query tiles with "mean"."""
    return Config(sum_partials, {"ROWS": 16 if importance == "class" else 32, "COLUMNS": 64})


def programs_a_head(tiles: int, heads: int | torch.SymInt) -> Any:
    """Number of programs that share the query tiles of one (image, head).

    Works on a symbolic batch: a comparison would specialise its size, torch's minimum and maximum do not.

    Args:
        tiles: Number of query tiles.
        heads: B * H.
    """
    return torch.sym_min(tiles, torch.sym_max(1, PROGRAMS // torch.sym_max(1, heads)))


def launch_attention(qkv: Tensor, key_bias: Tensor | None = None, importance: str = "none") -> tuple[Tensor, Tensor]:
    """Run the kernels. Arguments must have passed `check`.

    Args:
        qkv: [B, N, 3, H, d], contiguous.
        key_bias: float32 [1 or B, N] or None.
        importance: "none", "class" or "mean".

    Returns:
        out [B, N, H * d] and importance, float32 [B, N] ([0] for "none").
    """
    B, N, _, H, d = qkv.shape
    chosen = config(N, d, qkv.dtype, bias=key_bias is not None, importance=importance)
    tiles = cdiv(N, chosen.constants["BLOCK_M"])
    out = qkv.new_empty(B, N, H * d)
    partial = absent(qkv, torch.float32)
    if importance != "none":
        partial = qkv.new_empty(B, H, 1 if importance == "class" else tiles, N, dtype=torch.float32)
    bias_stride = 0 if key_bias is None or key_bias.shape[0] == 1 else N
    if chosen.kernel is attention_whole:
        grid: tuple[Any, ...] = (B * H, programs_a_head(tiles, B * H))
    else:
        grid = (B * H * tiles,)
    bias = absent(qkv, torch.float32) if key_bias is None else key_bias
    launch(chosen, grid, qkv, bias, out, partial, N, H, bias_stride)
    if importance == "none":
        return out, qkv.new_empty(0, dtype=torch.float32)
    received = qkv.new_empty(B, N, dtype=torch.float32)
    summed = sum_config(importance)
    rows, queries = H * partial.shape[2], 1 if importance == "class" else N
    launch(summed, (B, cdiv(N, summed.constants["COLUMNS"])), partial, received, rows, N, H * queries)
    return out, received


def variants() -> Iterator[Variant]:
    """Ahead-of-time builds: by dtype, head dim, bias, importance, and range of token counts that share a config.

    Names: attention_bf16_d64_n193_208, plus _bias and _class or _mean where they apply; sum_class and sum_mean.
    """
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for name, d, bias, importance in itertools.product(
        each_dtype(), (32, 64, 80, 96, 128), (False, True), ("none", "class", "mean")
    ):
        low = 1
        for high in range(16, MAX_TOKENS + 1, 16):
            chosen = config(high, d, dtypes[name], bias=bias, importance=importance)
            if high < MAX_TOKENS and chosen == config(high + 16, d, dtypes[name], bias=bias, importance=importance):
                continue
            yield _variant(chosen, name, d, (low, high), bias, importance)
            low = high + 1
    for importance in ("class", "mean"):
        chosen = sum_config(importance)
        columns = chosen.constants["COLUMNS"]
        signature = {"partial": "*fp32", "importance": "*fp32", "rows": "i32", "N": "i32", "count": "i32"}
        yield Variant(
            operator="attention",
            name=f"sum_{importance}",
            config=chosen,
            signature=signature,
            grid=("B", f"cdiv(N, {columns})", "1"),
            shapes={"B": (1, 65535), "N": (1, MAX_TOKENS), "rows": (1, 65535)},
            dtype="fp32",
        )


def _variant(chosen: Config, dtype: str, d: int, N: tuple[int, int], bias: bool, importance: str) -> Variant:
    ending = ("_bias" if bias else "") + ("" if importance == "none" else f"_{importance}")
    rows = chosen.constants["BLOCK_M"]
    if chosen.kernel is attention_whole:
        grid = ("B * H", f"max(1, min(cdiv(N, {rows}), {PROGRAMS} // (B * H)))", "1")
    else:
        grid = (f"B * H * cdiv(N, {rows})", "1", "1")
    return Variant(
        operator="attention",
        name=f"attention_{dtype}_d{d}_n{N[0]}_{N[1]}{ending}",
        config=chosen,
        signature={
            "qkv": f"*{dtype}",
            "key_bias": "*fp32",
            "out": f"*{dtype}",
            "partial": f"*{dtype}" if importance == "none" else "*fp32",
            "N": "i32",
            "H": "i32",
            "bias_stride": "i32",
        },
        grid=grid,
        shapes={"B": (1, 65535), "N": N, "H": (1, 64), "d": d},
        dtype=dtype,
        aligned=("qkv", "out"),
    )
