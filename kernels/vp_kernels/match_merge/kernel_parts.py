"""What the matching is made of: comparable keys of numbers, unit rows, similarities, ranks, and what becomes of rows.

Loops here and in `kernel.py` are `while` loops: Triton's interpreter, in which the tests run, has no `range` of bounds
that are known at run time only, under numpy 2.4.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))  # below the key of every number
HIGHEST = tl.constexpr((1 << 31) - 1)
# Length of the rows that are compared: a power of two, so that no bit changes, and one that keeps fp16's remainders of
# small numbers above its smallest.
SCALE = tl.constexpr(256.0)


@triton.jit
def _key(value):
    """Whole numbers in the order of the float32s: -0 equals 0, every NaN is one, above everything."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, ordered, HIGHEST)


@triton.jit
def _unit_rows(
    metric,
    row,
    present,
    H,
    stride_n,
    stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows of an image's metric, heads summed, of length SCALE: float32 [rows, BLOCK_K]; zeros where not present."""
    column = tl.arange(0, BLOCK_K)
    mask = present[:, None] & (column < HEAD_DIM)[None, :]
    place = metric + row[:, None] * stride_n + column[None, :]
    total = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    head = 0
    while head < H:
        for i in tl.static_range(GROUP):  # unrolled: that many loads are under way
            total += tl.load(place + (head + i) * stride_h, mask=mask & (head + i < H), other=0.0).to(tl.float32)
        head += GROUP
    norm = tl.sqrt_rn(tl.sum(total * total, axis=1))
    return total * tl.div_rn(SCALE, tl.maximum(norm, 1e-12))[:, None]


@triton.jit
def _halves(value):
    """A float32 as a sum of two fp16 numbers, good to 22 bits."""
    high = value.to(tl.float16)
    return high, (value - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _better(key, mate, high_a, low_a, unit_b, index_b, B_TOKENS):
    """Each row's best partner so far (its similarity's key, and its number), and those of another tile of B.

    Three of the four products of the halves, added in fp32, are the similarity to 2^-22 or so: as good as fp32, at a
    tenth of the time that fp32 takes outside of the tensor cores, in half of the shared memory that TF32 would take.
    Equal rows have equal similarities, bit for bit; a tie goes, and stays, with the lowest index.
    """
    high_b, low_b = _halves(unit_b)
    similarity = tl.dot(low_a, tl.trans(high_b))
    similarity = tl.dot(high_a, tl.trans(low_b), acc=similarity)
    similarity = tl.dot(high_a, tl.trans(high_b), acc=similarity)
    keys = tl.where((index_b < B_TOKENS)[None, :], _key(similarity), LOWEST)
    found = tl.max(keys, axis=1)
    at = tl.min(tl.where(keys == found[:, None], index_b[None, :], HIGHEST), axis=1)
    return tl.maximum(found, key), tl.where(found > key, at, mate)


@triton.jit
def _ahead(keys, count, key, index, CHUNK: tl.constexpr):
    """How many of the `count` keys in memory rank before each [rows]: a higher key, or the same and a lower index."""
    found = tl.zeros([key.shape[0], CHUNK], tl.int32)
    start = 0
    while start < count:
        other = start + tl.arange(0, CHUNK)
        others = tl.load(keys + other, mask=other < count, other=LOWEST)
        higher = others[None, :] > key[:, None]
        same = (others[None, :] == key[:, None]) & (other[None, :] < index[:, None])
        found += (higher | same).to(tl.int32)
        start += CHUNK
    return tl.sum(found, axis=1)


@triton.jit
def _stay(keep, keep_weight, size, place, token, mask, HAS_SIZE: tl.constexpr):
    """Write rows that stay."""
    tl.store(keep + place, token.to(tl.int64), mask=mask)
    if HAS_SIZE:
        tl.store(keep_weight + place, tl.load(size + token, mask=mask, other=1.0), mask=mask)


@triton.jit
def _merge(source, into, weight, size, place, token, row, mask, HAS_SIZE: tl.constexpr, HAS_SCORES: tl.constexpr):
    """Write rows that merge."""
    tl.store(source + place, token.to(tl.int64), mask=mask)
    tl.store(into + place, row.to(tl.int64), mask=mask)
    if HAS_SIZE:
        tl.store(weight + place, tl.load(size + token, mask=mask, other=1.0), mask=mask)
    elif HAS_SCORES:
        tl.store(weight + place, tl.full(place.shape, 1.0, tl.float32), mask=mask)
