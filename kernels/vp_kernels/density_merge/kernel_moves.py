"""Device functions of `kernel.py` that write the output rows."""

# Triton compiles these functions; their arguments are pointers and tiles, which have no Python type.
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from vp_kernels.density_merge.kernel_parts import load_index

SMALLEST_WEIGHT = tl.constexpr(1e-12)


@triton.jit
def size_of(size, row, inside, HAS_SIZE: tl.constexpr):
    """float32 sizes of the rows; 0 where not `inside`."""
    if HAS_SIZE:
        own = tl.load(size + row, mask=inside, other=0.0)
    else:
        own = tl.where(inside, 1.0, 0.0)
    return own


@triton.jit
def weight_of(scores, size, row, inside, HAS_SIZE: tl.constexpr, BY_SIZE: tl.constexpr):
    """float32 weights of the rows in means; 0 where not `inside`."""
    if BY_SIZE:
        own = size_of(size, row, inside, HAS_SIZE)
    else:
        own = tl.load(scores + row, mask=inside, other=0.0)
    return tl.where(inside, tl.where(own < SMALLEST_WEIGHT, SMALLEST_WEIGHT, own), 0.0)


@triton.jit
def mix(share, rows, total):
    """total + share @ rows at float32 accuracy: for 16-bit rows, the shares are split into two 16-bit parts."""
    if rows.dtype == tl.float32:
        total = tl.dot(share, rows, total, input_precision="ieee")
    else:
        high = share.to(rows.dtype)
        low = (share - high.to(tl.float32)).to(rows.dtype)
        total = tl.dot(high, rows, total)
        total = tl.dot(low, rows, total)
    return total


@triton.jit
def copy_rows(
    x,
    size,
    merged,
    merged_size,
    attentive,
    single,
    prefix,
    n_single,
    step,
    kept,
    width,
    HAS_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    MOVE_D: tl.constexpr,
):
    """Copy the prefix, the unmerged tokens at even positions, and all tokens at odd positions."""
    column = tl.arange(0, MOVE_D)
    for start in tl.range(0, kept, ROWS):
        out = start + tl.arange(0, ROWS)
        s = out - prefix
        b = s - n_single
        is_single = (s >= 0) & (b < 0)
        place = step * load_index(single, s, is_single)
        place = tl.where(is_single, place, 2 * b + 1)
        row = load_index(attentive, place, (s >= 0) & (out < kept))
        row = tl.where(s < 0, out, row)
        tl.store(merged_size + out, size_of(size, row, out < kept, HAS_SIZE), mask=out < kept)
        source = x + row[:, None] * width
        target = merged + out[:, None] * width
        for d in tl.range(0, width, MOVE_D):
            inside = (out < kept)[:, None] & (d + column < width)[None, :]
            values = tl.load(source + (d + column)[None, :], mask=inside, other=0.0)
            tl.store(target + (d + column)[None, :], values, mask=inside)


@triton.jit
def merge_pairs(
    x,
    scores,
    size,
    merged,
    merged_size,
    attentive,
    source,
    partner,
    pairs,
    first_odd,
    width,
    HAS_SIZE: tl.constexpr,
    BY_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    MOVE_D: tl.constexpr,
):
    """Overwrite the rows that `copy_rows` wrote for merge targets; each merge computes its whole target.

    Merges with the same target compute and write identical bits.
    """
    lane = tl.arange(0, PAIRS)
    column = tl.arange(0, MOVE_D)
    for start in tl.range(0, pairs, PAIRS):
        r = start + lane
        b = load_index(partner, load_index(source, r, r < pairs), r < pairs)
        row_b = load_index(attentive, 2 * b + 1, r < pairs)
        weight_b = weight_of(scores, size, row_b, r < pairs, HAS_SIZE, BY_SIZE)
        mass = weight_b
        total_size = size_of(size, row_b, r < pairs, HAS_SIZE)
        for other in tl.range(0, pairs, PAIRS):
            q = other + lane
            a = load_index(source, q, q < pairs)
            row_a = load_index(attentive, 2 * a, q < pairs)
            same = (load_index(partner, a, q < pairs)[None, :] == b[:, None]) & (q < pairs)[None, :]
            weight = weight_of(scores, size, row_a, q < pairs, HAS_SIZE, BY_SIZE)
            mass += tl.sum(tl.where(same, weight[None, :], 0.0), axis=1)
            total_size += tl.sum(tl.where(same, size_of(size, row_a, q < pairs, HAS_SIZE)[None, :], 0.0), axis=1)
        mass = tl.where(r < pairs, mass, 1.0)
        tl.store(merged_size + first_odd + b, total_size, mask=r < pairs)
        for d in tl.range(0, width, MOVE_D):
            inside = (d + column < width)[None, :]
            total = tl.zeros([PAIRS, MOVE_D], tl.float32)
            for other in tl.range(0, pairs, PAIRS):
                q = other + lane
                a = load_index(source, q, q < pairs)
                row_a = load_index(attentive, 2 * a, q < pairs)
                same = (load_index(partner, a, q < pairs)[None, :] == b[:, None]) & (q < pairs)[None, :]
                weight = weight_of(scores, size, row_a, q < pairs, HAS_SIZE, BY_SIZE)
                share = tl.where(same, weight[None, :] / mass[:, None], 0.0)
                in_a = (q < pairs)[:, None] & inside
                x_a = tl.load(x + row_a[:, None] * width + (d + column)[None, :], mask=in_a, other=0.0)
                total = mix(share, x_a, total)
            in_b = (r < pairs)[:, None] & inside
            x_b = tl.load(x + row_b[:, None] * width + (d + column)[None, :], mask=in_b, other=0.0)
            total += x_b.to(tl.float32) * (weight_b / mass)[:, None]
            target = merged + (first_odd + b)[:, None] * width + (d + column)[None, :]
            tl.store(target, total.to(merged.dtype.element_ty), mask=in_b)


@triton.jit
def pool_clusters(
    x,
    scores,
    size,
    merged,
    merged_size,
    rest,
    label,
    n,
    clusters,
    width,
    HAS_SIZE: tl.constexpr,
    BY_SIZE: tl.constexpr,
    CLUSTERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    MOVE_D: tl.constexpr,
):
    """Write the weighted mean of each cluster to rows 0 .. clusters - 1 of `merged`."""
    column = tl.arange(0, MOVE_D)
    for start in tl.range(0, clusters, CLUSTERS):
        c = start + tl.arange(0, CLUSTERS)
        mass = tl.zeros([CLUSTERS], tl.float32)
        total_size = tl.zeros([CLUSTERS], tl.float32)
        for other in tl.range(0, n, MEMBERS):
            j = other + tl.arange(0, MEMBERS)
            row = load_index(rest, j, j < n)
            member = (load_index(label, j, j < n)[None, :] == c[:, None]) & (j < n)[None, :]
            weight = weight_of(scores, size, row, j < n, HAS_SIZE, BY_SIZE)
            mass += tl.sum(tl.where(member, weight[None, :], 0.0), axis=1)
            total_size += tl.sum(tl.where(member, size_of(size, row, j < n, HAS_SIZE)[None, :], 0.0), axis=1)
        mass = tl.where(c < clusters, mass, 1.0)
        tl.store(merged_size + c, total_size, mask=c < clusters)
        for d in tl.range(0, width, MOVE_D):
            inside = (d + column < width)[None, :]
            total = tl.zeros([CLUSTERS, MOVE_D], tl.float32)
            for other in tl.range(0, n, MEMBERS):
                j = other + tl.arange(0, MEMBERS)
                row = load_index(rest, j, j < n)
                member = (load_index(label, j, j < n)[None, :] == c[:, None]) & (j < n)[None, :]
                weight = weight_of(scores, size, row, j < n, HAS_SIZE, BY_SIZE)
                share = tl.where(member, weight[None, :] / mass[:, None], 0.0)
                t = tl.load(x + row[:, None] * width + (d + column)[None, :], mask=(j < n)[:, None] & inside, other=0.0)
                total = mix(share, t, total)
            target = merged + c[:, None] * width + (d + column)[None, :]
            tl.store(target, total.to(merged.dtype.element_ty), mask=(c < clusters)[:, None] & inside)
