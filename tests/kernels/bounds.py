"""Bounds on the rounding error of each operator, element by element: the accuracy criterion of the tests.

Forward error analysis in the standard model (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 to 4):
every operation is off by at most one unit roundoff of its type, and a sum of n terms, in any order, by gamma(n) times
the sum of their magnitudes. The bounds depend on the lengths of the sums, the magnitudes of the inputs and the dtype of
each step, not on measured errors: the order of sums and the instructions of a BLAS differ between machines, these do
not. They assume worst-case rounding, and are about ten times the observed errors; a fault (scores in bf16, a missed
key, a wrong weight) is far beyond them.

Assumed arithmetic: sums and products in fp32 (tensor cores truncate instead of rounding: two units per addition), exp
to `EXP`, division and square root to `APPROXIMATE`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vp_kernels.density_merge.reference import groups as density_groups

UNIT = 2.0**-24  # of fp32
# The coarsest in use, relative: torch's fused attention on a CPU has an exponential of 20 bits, a GPU's ex2 of 22.
EXP = 2.0**-20
APPROXIMATE = 4 * UNIT  # a GPU's division, reciprocal and inverse square root
KEYS = 32  # smallest tile of keys, which determines how often an online softmax may rescale


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(n: float) -> float:
    """Relative error of n successive roundings in fp32; each counts twice (tensor cores)."""
    return 2 * n * UNIT / (1 - 2 * n * UNIT)


def stored(truth: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """`error` plus that of rounding to `dtype`, subnormal numbers included."""
    finfo = torch.finfo(dtype)
    return error + unit(dtype) * (truth.abs() + error) + finfo.tiny * (1.0 if dtype == torch.float32 else finfo.eps)


def attention(
    qkv: Tensor, key_bias: Tensor | None, importance: str, *, spelled_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Bound for vp::attention, [B, N, H * d] and [B, N] ([0] for "none"); arguments as for the operator.

    A logit is a sum of d products, scaled, biased, minus the row's maximum: off by e. A probability is then off by the
    factor exp(e + the e of its denominator), by the error of the exponentials, once more for each rescaling of an
    online softmax, and by the sum of N. Half precision rounds it once more before the product with v, a sum of N
    products. With `spelled_out`, rounding to the type also applies to the scaled queries and keys, their products and
    the sums with the bias, as the definition of ONNX's Attention allows.
    """
    dtype, (tokens, heads, width) = qkv.dtype, (qkv.shape[1], *qkv.shape[3:])
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
    bias = qkv.new_zeros(1, tokens, dtype=torch.float64) if key_bias is None else key_bias.double()
    bias = bias[:, None, None, :]
    product = (q @ k.transpose(2, 3)) * width**-0.5
    p = torch.softmax(product + bias, dim=3)  # [B, H, N, N]
    magnitudes = (q.abs() @ k.abs().transpose(2, 3)) * width**-0.5
    top = (product + bias).amax(dim=3, keepdim=True).abs()
    logit = gamma(width + 1) * magnitudes + 6 * UNIT * (magnitudes + bias.abs() + top)
    if spelled_out:
        logit = logit + unit(dtype) * (2 * magnitudes + product.abs() + (product + bias).abs())
    logit = torch.where(bias == -torch.inf, 0.0, logit)  # a masked key is exactly 0
    rescaled = tokens // KEYS + 1
    share = logit + logit.amax(dim=3, keepdim=True) + rescaled * (EXP + 2 * UNIT * top)
    off = p * torch.expm1(share + 2 * EXP + gamma(tokens + rescaled) + APPROXIMATE)  # of the probabilities
    rounded = 0.0 if dtype == torch.float32 else unit(dtype)
    lost = 0.0 if dtype == torch.float32 else torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2
    out = off @ v.abs() + (rounded + gamma(tokens + rescaled)) * (p @ v.abs()) + lost * v.abs().sum(2, keepdim=True)
    out = stored(p @ v, out, dtype).transpose(1, 2).flatten(2)
    if importance == "none":
        return out, out.new_empty(0)
    rows = slice(0, 1) if importance == "class" else slice(None)
    summed = heads * p[:, :, rows].shape[2]
    received = p[:, :, rows].mean(dim=(1, 2))
    error = off[:, :, rows].mean(dim=(1, 2)) + gamma(summed + 2) * received
    return out, stored(received, error, torch.float32)


def gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
    *,
    one_pass: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bound for vp::gather_norm, both [B, K + E, D]; index within x.

    A row is exact, or a sum of two rounded in fp32; the statistics are sums of D, of the values before rounding to x's
    dtype. With `one_pass` the variance is the mean square minus the squared mean, as in ONNX Runtime's
    LayerNormalization: both have the magnitude of the rows rather than of their spread.
    """
    batch, _, width = x.shape
    where = index.expand(batch, -1)[:, :, None].expand(-1, -1, width)
    rows = (x.double() if residual is None else x.double() + residual.double()).gather(1, where)
    off = torch.zeros_like(rows) if residual is None else UNIT * rows.abs()
    if extra is not None:
        rows, off = torch.cat([rows, extra.double()], 1), torch.cat([off, torch.zeros_like(extra).double()], 1)
    kept = off + unit(x.dtype) * rows.abs() * (off > 0)
    mean = rows.mean(2, keepdim=True)
    centred = rows - mean
    off = off + off.mean(2, keepdim=True) + gamma(width + 1) * rows.abs().mean(2, keepdim=True) + UNIT * centred.abs()
    variance = centred.square().mean(2, keepdim=True) + eps
    change = (2 * centred.abs() * off + off.square()).mean(2, keepdim=True) + gamma(width + 3) * variance
    if one_pass:
        change = change + 2 * gamma(width + 3) * rows.square().mean(2, keepdim=True)
    scale = variance.rsqrt()
    relative = (1 - change / variance).clamp_min(1e-3).rsqrt() - 1 + APPROXIMATE  # of the scale
    wide, shift = weight.double(), bias.double()
    scaled = centred * scale * wide
    normed = off * scale * wide.abs() * (1 + relative) + scaled.abs() * (relative + 3 * UNIT)
    normed = normed + UNIT * (scaled + shift).abs()
    return kept, stored(scaled + shift, normed, x.dtype)


def select_fuse(scores: Tensor, x: Tensor, k: int) -> Tensor:
    """Bound for vp::select_fuse's fused row, [B, 1, D]: a sum of n - k products."""
    count = scores.shape[1]
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    rest = torch.ones_like(scores, dtype=torch.bool).scatter(1, chosen, False)
    weights = torch.where(rest, scores, 0.0).double()[:, None, :]
    rows = torch.where(rest[:, :, None], x[:, x.shape[1] - count :].double(), 0.0)  # kept rows may hold NaN
    return stored(weights @ rows, gamma(count - k + 1) * (weights.abs() @ rows.abs()), x.dtype)


def merge_rows(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Bound for vp::merge_rows, [B, K, D] and [B, K]; non-negative weights.

    A row with J sources is a running mean of values up to M. Each of its J steps (a difference, a quotient, a product,
    a sum) is off by a few units of M. The j-th divides by a mass t_j with j roundings, and the difference of up to 2 M,
    of which it takes a part w_j / t_j, is off by as much: the parts sum to at most 1 + log(mass / least weight). A row
    without sources is a copy.
    """
    wide = x.double()
    own = wide.new_ones(keep.shape) if keep_weight is None else keep_weight.double()
    weight = wide.new_ones(source.shape) if source_weight is None else source_weight.double()
    part = (weight != 0).double()
    joined = torch.zeros_like(own).scatter_add(1, into, part)[:, :, None]  # J, [B, K, 1]
    mass = own.scatter_add(1, into, weight)
    columns = (-1, -1, x.shape[2])
    kept = wide.gather(1, keep[:, :, None].expand(columns))
    entering = torch.where(part[:, :, None] > 0, wide.gather(1, source[:, :, None].expand(columns)), 0.0)
    to = into[:, :, None].expand(columns)
    largest = kept.abs().scatter_reduce(1, to, entering.abs(), "amax")  # M
    least = torch.where(own > 0, own, torch.inf).scatter_reduce(
        1, into, torch.where(part > 0, weight, torch.inf), "amin"
    )
    parts = 1 + torch.where(joined > 0, (mass / least)[:, :, None], 1.0).log()
    step = min(UNIT, unit(x.dtype))  # fp64 stays fp64
    error = step * joined * (10 + 2 * parts) * largest
    total = (own[:, :, None] * kept).scatter_add(1, to, weight[:, :, None] * entering)
    mean = torch.where(joined > 0, total / mass[:, :, None], kept)
    merged = torch.where(joined > 0, stored(mean, error, x.dtype), 0.0)
    return merged, 2 * step * (joined[:, :, 0] + 1) * mass


def density_members(x: Tensor, scores: Tensor, counts: tuple[int, int, int, int]) -> int:
    """Largest number of rows in a mean of vp::density_merge."""
    images = zip(x.double(), scores.double(), strict=True)
    return max(len(group) for rows, c in images for group in density_groups(rows, c, *counts))


def density_merge(x: Tensor, truth: Tensor, members: int) -> Tensor:
    """Bound for vp::density_merge's rows, [B, tokens_out, D]: weighted means of at most `members` rows of x.

    Weights are positive: each share is off by the roundings of its quotient and of the mass, and the mean by as much
    relative to the largest value in its column, and by the sum. Half precision represents a share as two numbers of its
    type.
    """
    largest = x.double().abs().amax(dim=1, keepdim=True)
    finfo = torch.finfo(x.dtype)
    halves = 0.0 if x.dtype == torch.float32 else unit(x.dtype) ** 2 + members * finfo.tiny * finfo.eps
    return stored(truth, (2 * gamma(members + 2) + halves) * largest.expand_as(truth), x.dtype)
