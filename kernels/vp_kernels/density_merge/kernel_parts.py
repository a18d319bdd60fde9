"""Device functions of `kernel.py`: the stages of BAT's step on one image.

Stages pass values through the program's own float32 scratch in global memory (it stays in L2): lists of one value per
token (integers are exact below 2^24), and the products of all pairs of inattentive tokens. A barrier separates each
stage that writes from the one that reads. No loop reads what it writes.

Comparisons use `order_key`, an integer, with ties to the lowest position. This is a total order for any values, NaN
included, so every list is a permutation and all reads and writes are in bounds.
"""

# Triton compiles these functions; their arguments are pointers and tiles, which have no Python type.
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x80000000)  # below every key
HIGHEST = tl.constexpr(0x7FFFFFFF)  # above every key
NAN_KEY = tl.constexpr(0x7FFFFFFE)


@triton.jit
def order_key(value):
    """Map float32 to int32 of the same order: -0 equals +0, NaN is highest."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value != value, NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def load_index(values, place, inside):
    """Load int32 from a list of whole numbers; 0 where not `inside`."""
    return tl.load(values + place, mask=inside, other=0.0).to(tl.int32)


@triton.jit
def partition(values, n, k, chosen, others, shift, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions of the k highest of values [n] and of the others, each ascending, plus `shift`.

    Ranks by counting; an element's place in its list is the number of earlier elements on the same side.
    """
    before = 0
    for start in tl.range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        key = order_key(tl.load(values + i, mask=i < n, other=0.0))
        rank = tl.zeros([ROWS], tl.int32)
        for other in tl.range(0, n, COLUMNS):
            j = other + tl.arange(0, COLUMNS)
            rival = order_key(tl.load(values + j, mask=j < n, other=0.0))
            rival = tl.where(j < n, rival, LOWEST)[None, :]
            ahead = (rival > key[:, None]) | ((rival == key[:, None]) & (j[None, :] < i[:, None]))
            rank += tl.sum(ahead.to(tl.int32), axis=1)
        high = ((rank < k) & (i < n)).to(tl.int32)
        place = before + tl.cumsum(high, axis=0) - high
        row = (i + shift).to(tl.float32)
        tl.store(chosen + place, row, mask=high != 0)
        tl.store(others + (i - place), row, mask=(high == 0) & (i < n))
        before += tl.sum(high, axis=0)


@triton.jit
def best_partners(
    x, attentive, score, partner, n_even, n_odd, width, TILE: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr
):
    """For each even attentive token, the odd one of highest cosine (ties to the lowest index), and that cosine."""
    lane = tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    for start in tl.range(0, n_even, TILE):
        a = start + lane
        rows_a = load_index(attentive, 2 * a, a < n_even) * width
        best_key = tl.full([TILE], LOWEST, tl.int32)
        best = tl.zeros([TILE], tl.float32)
        best_b = tl.zeros([TILE], tl.int32)
        for other in tl.range(0, n_odd, TILE):
            b = other + lane
            rows_b = load_index(attentive, 2 * b + 1, b < n_odd) * width
            product = tl.zeros([TILE, TILE], tl.float32)
            square_a = tl.zeros([TILE, BLOCK_D], tl.float32)
            square_b = tl.zeros([TILE, BLOCK_D], tl.float32)
            for d in tl.range(0, width, BLOCK_D, num_stages=STAGES):
                inside = d + column < width
                in_a = (a < n_even)[:, None] & inside[None, :]
                in_b = (b < n_odd)[:, None] & inside[None, :]
                x_a = tl.load(x + rows_a[:, None] + (d + column)[None, :], mask=in_a, other=0.0)
                x_b = tl.load(x + rows_b[:, None] + (d + column)[None, :], mask=in_b, other=0.0)
                product = tl.dot(x_a, tl.trans(x_b), product, input_precision="tf32x3")
                square_a += x_a.to(tl.float32) * x_a.to(tl.float32)
                square_b += x_b.to(tl.float32) * x_b.to(tl.float32)
            scale_a = 1.0 / tl.maximum(tl.sqrt(tl.sum(square_a, axis=1)), 1e-12)
            scale_b = 1.0 / tl.maximum(tl.sqrt(tl.sum(square_b, axis=1)), 1e-12)
            cosine = product * scale_a[:, None] * scale_b[None, :]
            key = tl.where((b < n_odd)[None, :], order_key(cosine), LOWEST)
            top_key = tl.max(key, axis=1)
            top_b = tl.min(tl.where(key == top_key[:, None], b[None, :], HIGHEST), axis=1)
            # Recover the cosine of the winning column.
            top = tl.sum(tl.where(b[None, :] == top_b[:, None], cosine, 0.0), axis=1)
            better = top_key > best_key
            best_key = tl.where(better, top_key, best_key)
            best = tl.where(better, top, best)
            best_b = tl.where(better, top_b, best_b)
        tl.store(score + a, best, mask=a < n_even)
        tl.store(partner + a, best_b.to(tl.float32), mask=a < n_even)


@triton.jit
def rank_pairs(score, partner, value, n_even, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sort key for merging: the score, less 4 if a better token has the same partner (cosines are in -1 .. 1)."""
    for start in tl.range(0, n_even, ROWS):
        i = start + tl.arange(0, ROWS)
        own = tl.load(score + i, mask=i < n_even, other=0.0)
        key = order_key(own)
        mate = load_index(partner, i, i < n_even)
        beaten = tl.zeros([ROWS], tl.int32)
        for other in tl.range(0, n_even, COLUMNS):
            j = other + tl.arange(0, COLUMNS)
            rival = order_key(tl.load(score + j, mask=j < n_even, other=0.0))[None, :]
            same = (load_index(partner, j, j < n_even)[None, :] == mate[:, None]) & (j < n_even)[None, :]
            ahead = (rival > key[:, None]) | ((rival == key[:, None]) & (j[None, :] < i[:, None]))
            beaten = tl.maximum(beaten, tl.max((same & ahead).to(tl.int32), axis=1))
        tl.store(value + i, own - 4.0 * beaten.to(tl.float32), mask=i < n_even)


@triton.jit
def middle_row(x, rows, pivot, n, width, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32 [D] to subtract from the rows of x at `rows` [n], so that a large common mean does not swamp distances.

    For 16-bit tokens it is the rounded mean where every token lies between half and twice of it, else 0: the difference
    is then exact in 16 bits (Sterbenz), so tensor cores can use it directly. Where it is 0, the mean is not much larger
    than the differences between tokens. The mean is computed from differences to the first row: exact if all are equal.
    """
    column = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, TILE)
    first = tl.load(rows).to(tl.int32) * width
    for d in tl.range(0, width, BLOCK_D):
        inside = d + column < width
        origin = tl.load(x + first + d + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        low = origin
        high = origin
        for start in tl.range(0, n, TILE):
            i = start + lane
            row = load_index(rows, i, i < n) * width
            both = (i < n)[:, None] & inside[None, :]
            t = tl.load(x + row[:, None] + (d + column)[None, :], mask=both, other=0.0).to(tl.float32)
            t = tl.where(both, t, origin[None, :])
            total += tl.sum(t - origin[None, :], axis=0)
            low = tl.minimum(low, tl.min(t, axis=0))
            high = tl.maximum(high, tl.max(t, axis=0))
        middle = origin + total / n
        if x.dtype.element_ty != tl.float32:
            middle = middle.to(x.dtype.element_ty).to(tl.float32)
            least = tl.where(middle < 0.0, -high, low)
            most = tl.where(middle < 0.0, -low, high)
            exact = (2.0 * least >= tl.abs(middle)) & (most <= 2.0 * tl.abs(middle))
            middle = tl.where(exact, middle, 0.0)
        tl.store(pivot + d + column, middle, mask=inside)


@triton.jit
def products(
    x,
    rows,
    pivot,
    square,
    norm,
    n,
    stride,
    width,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """square[i, j] = t_i t_j for all pairs of t = x at `rows` [n] less `pivot`, norm[i] = t_i t_i.

    Both come from the same products, so |t_i|^2 + |t_j|^2 - 2 t_i t_j is exactly 0 for equal tokens, and truncation
    errors of the accumulation cancel. Mirrored tiles are computed once.
    """
    lane = tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    for start in tl.range(0, n, TILE):
        i = start + lane
        rows_i = load_index(rows, i, i < n) * width
        for other in tl.range(start, n, TILE):
            j = other + lane
            rows_j = load_index(rows, j, j < n) * width
            product = tl.zeros([TILE, TILE], tl.float32)
            for d in tl.range(0, width, BLOCK_D, num_stages=STAGES):
                inside = d + column < width
                in_i = (i < n)[:, None] & inside[None, :]
                in_j = (j < n)[:, None] & inside[None, :]
                t_i = tl.load(x + rows_i[:, None] + (d + column)[None, :], mask=in_i, other=0.0)
                t_j = tl.load(x + rows_j[:, None] + (d + column)[None, :], mask=in_j, other=0.0)
                middle = tl.load(pivot + d + column, mask=inside, other=0.0)[None, :]
                t_i = (t_i.to(tl.float32) - middle).to(x.dtype.element_ty)
                t_j = (t_j.to(tl.float32) - middle).to(x.dtype.element_ty)
                product = tl.dot(t_i, tl.trans(t_j), product, input_precision="tf32x3")
            both = (i < n)[:, None] & (j < n)[None, :]
            tl.store(square + i[:, None] * stride + j[None, :], product, mask=both)
            if other == start:
                diagonal = tl.sum(tl.where(i[:, None] == j[None, :], product, 0.0), axis=1)
                tl.store(norm + i, diagonal, mask=i < n)
            else:
                tl.store(square + j[None, :] * stride + i[:, None], product, mask=both)


@triton.jit
def squared_distance(square, norm_i, norm_j, i, j, inside, stride):
    """|t_i - t_j|^2 at two broadcast positions; never negative, exactly 0 for i = j."""
    product = tl.load(square + i * stride + j, mask=inside, other=0.0)
    apart = norm_i + norm_j - 2.0 * product
    return tl.where((apart < 0.0) | (i == j), 0.0, apart)


@triton.jit
def densities(square, norm, density, farthest, n, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """density[i] = -sum_j d2_ij / (n D), a logarithm; farthest[i] = max_j d2_ij."""
    for start in tl.range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        norm_i = tl.load(norm + i, mask=i < n, other=0.0)[:, None]
        total = tl.zeros([ROWS], tl.float32)
        far = tl.zeros([ROWS], tl.float32)
        for other in tl.range(0, n, COLUMNS):
            j = other + tl.arange(0, COLUMNS)
            norm_j = tl.load(norm + j, mask=j < n, other=0.0)[None, :]
            inside = (i < n)[:, None] & (j < n)[None, :]
            apart = squared_distance(square, norm_i, norm_j, i[:, None], j[None, :], inside, stride)
            apart = tl.where(inside, apart, 0.0)
            total += tl.sum(apart, axis=1)
            far = tl.maximum(far, tl.max(apart, axis=1))
        tl.store(density + i, total / (n * width * -1.0), mask=i < n)
        tl.store(farthest + i, far, mask=i < n)


@triton.jit
def peaks(square, norm, density, farthest, peak, n, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """peak[i] = log(density * delta); delta is the distance to the nearest denser token (the densest: the farthest)."""
    for start in tl.range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        norm_i = tl.load(norm + i, mask=i < n, other=0.0)[:, None]
        own = tl.load(density + i, mask=i < n, other=0.0)
        key = order_key(own)[:, None]
        near = tl.full([ROWS], float("inf"), tl.float32)
        for other in tl.range(0, n, COLUMNS):
            j = other + tl.arange(0, COLUMNS)
            norm_j = tl.load(norm + j, mask=j < n, other=0.0)[None, :]
            rival = order_key(tl.load(density + j, mask=j < n, other=0.0))[None, :]
            inside = (i < n)[:, None] & (j < n)[None, :]
            apart = squared_distance(square, norm_i, norm_j, i[:, None], j[None, :], inside, stride)
            denser = inside & ((rival > key) | ((rival == key) & (j[None, :] < i[:, None])))
            near = tl.minimum(near, tl.min(tl.where(denser, apart, float("inf")), axis=1))
        far = tl.load(farthest + i, mask=i < n, other=0.0)
        delta = tl.where(near < float("inf"), near, far)
        tl.store(peak + i, own + 0.5 * tl.log(delta), mask=i < n)


@triton.jit
def assign(square, norm, centres, label, n, clusters, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """label[i] = the nearest centre (ties to the lowest); a centre is labelled with itself."""
    for start in tl.range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        norm_i = tl.load(norm + i, mask=i < n, other=0.0)[:, None]
        best_key = tl.full([ROWS], LOWEST, tl.int32)
        best = tl.zeros([ROWS], tl.int32)
        for other in tl.range(0, clusters, COLUMNS):
            c = other + tl.arange(0, COLUMNS)
            centre = load_index(centres, c, c < clusters)
            norm_c = tl.load(norm + centre)[None, :]
            inside = (i < n)[:, None] & (c < clusters)[None, :]
            # Read the centre's row: neighbouring tokens are adjacent in memory.
            apart = squared_distance(square, norm_c, norm_i, centre[None, :], i[:, None], inside, stride)
            key = tl.where(centre[None, :] == i[:, None], HIGHEST, order_key(-apart))
            key = tl.where((c < clusters)[None, :], key, LOWEST)
            top_key = tl.max(key, axis=1)
            top = tl.min(tl.where(key == top_key[:, None], c[None, :], HIGHEST), axis=1)
            better = top_key > best_key
            best_key = tl.where(better, top_key, best_key)
            best = tl.where(better, top, best)
        tl.store(label + i, best.to(tl.float32), mask=i < n)
