"""Device functions of the matching: sortable keys, unit rows, similarities, ranks, and writing the index lists.

Loops here and in `kernel.py` are `while` loops: with numpy 2.4, Triton's interpreter (used by the tests) does not
support `range` with bounds known only at run time.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))  # below every key
HIGHEST = tl.constexpr((1 << 31) - 1)
# Length of the normalised rows: a power of two, so scaling is exact, and large enough that the fp16 remainders of small
# values do not underflow.
SCALE = tl.constexpr(256.0)


@triton.jit
def _key(value):
    """Map float32 to integers of the same order: -0 equals 0, all NaNs are equal and highest."""
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
    """Rows of an image's metric, summed over heads, of length SCALE: float32 [rows, BLOCK_K]; 0 where not present."""
    column = tl.arange(0, BLOCK_K)
    mask = present[:, None] & (column < HEAD_DIM)[None, :]
    place = metric + row[:, None] * stride_n + column[None, :]
    total = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    head = 0
    while head < H:
        for i in tl.static_range(GROUP):  # unrolled, so that GROUP loads are in flight
            total += tl.load(place + (head + i) * stride_h, mask=mask & (head + i < H), other=0.0).to(tl.float32)
        head += GROUP
    norm = tl.sqrt_rn(tl.sum(total * total, axis=1))
    return total * tl.div_rn(SCALE, tl.maximum(norm, 1e-12))[:, None]


@triton.jit
def _halves(value):
    """Split a float32 into a sum of two fp16 numbers, accurate to 22 bits."""
    high = value.to(tl.float16)
    return high, (value - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _better(key, mate, high_a, low_a, unit_b, index_b, B_TOKENS):
    """Update each row's best partner (key of the similarity, and index) with another tile of B.

    Three of the four products of the halves, added in fp32, give the similarity to about 2^-22: as accurate as fp32, at
    a tenth of the time of fp32 outside the tensor cores, in half of the shared memory of TF32. Equal rows have bitwise
    equal similarities; ties go to the lowest index.
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
    """How many of the `count` keys in memory rank before each of [rows]: higher, or equal at a lower index."""
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
    """Write rows that stay to the index lists."""
    tl.store(keep + place, token.to(tl.int64), mask=mask)
    if HAS_SIZE:
        tl.store(keep_weight + place, tl.load(size + token, mask=mask, other=1.0), mask=mask)


@triton.jit
def _merge(source, into, weight, size, place, token, row, mask, HAS_SIZE: tl.constexpr, HAS_SCORES: tl.constexpr):
    """Write rows that merge to the index lists."""
    tl.store(source + place, token.to(tl.int64), mask=mask)
    tl.store(into + place, row.to(tl.int64), mask=mask)
    if HAS_SIZE:
        tl.store(weight + place, tl.load(size + token, mask=mask, other=1.0), mask=mask)
    elif HAS_SCORES:
        tl.store(weight + place, tl.full(place.shape, 1.0, tl.float32), mask=mask)
