"""torch alternatives that each kernel is timed against, and the bytes that an operator must move."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.setup import part_of

SDPA = ("flash", "efficient", "cudnn")  # torch's fused backends; the explicit "math" is not competitive

Form = Callable[..., Any]


def operator(room: str, name: str) -> Form:
    """The public function of an operator."""
    found: Form = part_of(room, "op", name)
    return found


def sdpa(backend: str) -> Form:
    """torch's fused attention on strided views of the packed projection; output in the next projection's layout.

    Takes qkv [B, N, 3, H, d] and a mask [1 or B, 1, 1, N] of its dtype, or None.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    which = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "any": None,
    }[backend]

    def run(qkv: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if which is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            with warnings.catch_warnings(), sdpa_kernel([which]):
                warnings.simplefilter("ignore")  # a backend that does not support the input warns, then raises
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], -1)

    return run


def gather_norm_torch(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, extra: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add, gather, concatenate, normalise: four passes."""
    if residual is not None:
        x = x + residual
    rows = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])) if index.ndim == 2 else x.index_select(1, index)
    if extra is not None:
        rows = torch.cat([rows, extra], dim=1)
    return rows, F.layer_norm(rows, (x.shape[2],), weight, bias, eps)


def select_torch(scores: Tensor, k: int) -> Tensor:
    """topk, then sort ascending; ties in any order."""
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def select_stable(scores: Tensor, k: int) -> Tensor:
    """A stable sort, then sort ascending: ties to the lowest index, like the operator."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def select_gather(scores: Tensor, x: Tensor, k: int) -> Tensor:
    """`select_torch`, and gathering the rows."""
    index = select_torch(scores, k) + (x.shape[1] - scores.shape[1])
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def select_fuse_torch(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """EViT's fused token by a product with the scores, with those of kept rows set to zero."""
    index = select_torch(scores, k)
    weights = scores.scatter(1, index, 0.0)[:, None, :].to(x.dtype)
    return index, weights @ x[:, x.shape[1] - scores.shape[1] :]


def match_merge_textbook(
    x: Tensor, metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """Bolya et al., ICLR 2023, section 3, taken literally: similarities, best partner, sort, scatter of weighted sums.

    With scores, both policies of PPT are computed and one is selected per image.
    """
    keys = metric.sum(dim=2) if metric.ndim == 4 else metric
    first_a, first_b = prefix + prefix % 2, prefix + (prefix + 1) % 2
    unit = F.normalize(keys.float(), dim=2)
    best, partner = (unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)).max(dim=2)
    order = best.argsort(dim=1, descending=True)
    source, rest = order[:, :r], order[:, r:].sort(dim=1).values
    into = partner.gather(1, source)
    weight = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
    heavy = torch.cat([x * weight[:, :, None], weight[:, :, None]], dim=2)  # fp32: the sums, and the sizes as a column
    wide = heavy.shape[2]
    a, b = heavy[:, first_a::2], heavy[:, first_b::2]
    moved = a.gather(1, source[:, :, None].expand(-1, -1, wide))
    b = b.scatter_add(1, into[:, :, None].expand(-1, -1, wide), moved)
    merged = torch.cat([heavy[:, :prefix], a.gather(1, rest[:, :, None].expand(-1, -1, wide)), b], dim=1)
    if scores is not None:
        share = scores / scores.sum(dim=1, keepdim=True)
        pool = share.var(dim=1) < tau
        stay = share.topk(share.shape[1] - r, dim=1).indices.sort(dim=1).values + prefix
        front = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        pruned = heavy.gather(1, torch.cat([front, stay], dim=1)[:, :, None].expand(-1, -1, wide))
        merged = torch.where(pool[:, None, None], merged, pruned)
    total = merged[:, :, -1]
    return (merged[:, :, :-1] / total[:, :, None]).to(x.dtype), total


def match_merge_portable(
    x: Tensor, metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """As in a model with kernels="portable": the exporter's reducer (tome, or ppt with scores)."""
    from vp_exporter.reducers.ppt import PptStep
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens
    from vp_exporter.reducers.tome import TomeStep

    stream = Stream(x, prefix, size=size)
    keys = metric.float().sum(dim=2) if metric.ndim == 4 else metric.float()
    step = TomeStep(0, r) if scores is None else PptStep(0, r, tau)
    padded = None if scores is None else F.pad(scores, (prefix, 0))
    ones = None if padded is None else torch.ones_like(padded)
    chosen = step.choose(stream, AttentionStatistics(class_attention=padded, keys=keys, value_norm=ones))
    found = reduce_tokens(stream, chosen, carry_size=True)
    assert found.size is not None
    return found.x, found.size


def density_merge_portable(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str,
) -> tuple[Tensor, Tensor]:
    """As in a model with kernels="portable": the exporter's bat."""
    from vp_exporter.reducers.bat import BatStep
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens

    stream = Stream(x, prefix, size=size)
    step = BatStep(0, tokens_out, clusters, pairs, weights)
    found = reduce_tokens(stream, step.choose(stream, AttentionStatistics(class_attention=scores)), carry_size=True)
    assert found.size is not None
    return found.x, found.size


def merge_rows_matmul(
    x: Tensor, keep: Tensor, source: Tensor, into: Tensor, weight: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As in a model with kernels="portable": one gather and one matrix product."""
    from vp_exporter.reducers.stream import Merge, Stream, TokenMap, reduce_tokens

    size = None
    if own is not None:  # sizes of the input rows, from which the kept ones get theirs
        size = torch.ones(x.shape[:2], device=x.device).scatter(1, keep, own)
    found = reduce_tokens(Stream(x, 0, size=size), TokenMap(keep, Merge(source, into, weight)), carry_size=True)
    assert found.size is not None
    return found.x, found.size


def nbytes(*tensors: Any) -> int:
    """Total size of the tensors in bytes; other arguments are ignored."""
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))
