"""torch operator vp::match_merge: argument checks, CPU implementation, autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vp_kernels.checks import FLOATS, Check
from vp_kernels.launch import MAX_TOKENS, runs_kernel
from vp_kernels.merge_rows.op import merge_rows_torch
from vp_kernels.merge_rows.reference import merge_rows_gradients

OPERATOR = "vp::match_merge"
MAX_HEAD_DIM = 256


def match_merge(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (Bolya et al., ICLR 2023, section 3) and the size-weighted merge.

    With scores, chooses per image as PPT does (Wu et al., 2023): if the scores vary, the r lowest tokens are dropped
    instead.

    Args:
        x: [B, N, D], contiguous, fp32, fp16 or bf16; N up to 1024.
        metric: [B, N, d], or [B, N, H, d] to be summed over heads, any of these dtypes, last axis of stride 1, d up to
            256. Typically the keys, as a view of qkv.
        size: float32 [B, N], number of patches in each token; None for 1 each.
        r: Number of tokens to merge, 1 .. (N - prefix) // 2.
        prefix: Number of leading tokens that are left alone.
        scores: float32 [B, N - prefix], >= 0; None always merges.
        tau: Prune rather than merge an image if the variance of its scores, scaled to sum to 1, is at least tau.

    Returns:
        x': [B, N - r, D], dtype of x: the prefix, then the unmerged tokens at even positions, then the tokens at odd
            positions, each ascending (pruned: the prefix, then the highest-scoring tokens, descending).
        size': float32 [B, N - r].

    Raises:
        KernelError: if an argument has an unsupported device, dtype, shape, stride or range.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import match_merge
        >>> x = torch.randn(2, 17, 64)
        >>> merged, size = match_merge(x, x, None, r=4, prefix=1)
        >>> merged.shape, size.sum(1)
        (torch.Size([2, 13, 64]), tensor([17., 17.]))
    """
    return _match_merge(x, metric, size, r, prefix, scores, tau)


def check(x: Tensor, metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None) -> None:
    """Raise a KernelError if the kernels cannot run on the arguments."""
    checks = Check(OPERATOR, x)
    checks.tensor("x", x, ("B", "N", "D"))
    batch, tokens, width = x.shape
    checks.within("the number of tokens N of x", tokens, 2, MAX_TOKENS)
    checks.true(width >= 1, "the width D of x", str(width), "1 or more")
    heads: tuple[str, ...] = ("H", "d") if metric.ndim == 4 else ("d",)
    checks.tensor("metric", metric, (batch, tokens, *heads), FLOATS, contiguous=False)
    checks.within("the width d of metric", metric.shape[-1], 1, MAX_HEAD_DIM)
    if metric.ndim == 4:
        checks.true(metric.shape[2] >= 1, "the number of heads H of metric", str(metric.shape[2]), "1 or more")
    checks.within("prefix", prefix, 0, tokens - 2, "two patch tokens at least")
    checks.within("r", r, 1, (tokens - prefix) // 2, "at most half of the patch tokens can merge")
    if size is not None:
        checks.tensor("size", size, (batch, tokens), (torch.float32,))
    if scores is not None:
        checks.tensor("scores", scores, (batch, tokens - prefix), (torch.float32,), contiguous=False)


@torch.library.triton_op(OPERATOR, mutates_args=())
def _match_merge(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check(x, metric, size, r, prefix, scores)
    if runs_kernel(x):
        from vp_kernels.match_merge.kernel import launch_match_merge

        return launch_match_merge(x, metric, size, r, prefix, scores, tau)
    return match_merge_torch(x, metric, size, r, prefix, scores, tau)


def match_merge_torch(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """CPU implementation in torch.

    Args, Returns: as for `match_merge`; fp64 stays fp64.
    """
    return merge_rows_torch(x, *match_torch(metric, size, r, prefix, scores, tau))


def match_torch(
    metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None = None, tau: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Index lists that `match_merge` applies, for the whole batch.

    Returns:
        keep int64 [B, N - r]; source, into int64 [B, r]; source weights [B, r] (0 for a pruned image) and weights of
        the rows that stay [B, N - r]; None where all are 1.
    """
    rows = metric if metric.dtype == torch.float64 else metric.float()
    if rows.ndim == 4:
        rows = rows.sum(dim=2)
    batch, tokens, device = rows.shape[0], rows.shape[1], rows.device
    first_a, first_b = prefix + prefix % 2, prefix + (prefix + 1) % 2
    unit = F.normalize(rows, dim=2, eps=1e-12)
    best, partner = (unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)).max(dim=2)  # [B, n_A]
    order = best.sort(dim=1, descending=True, stable=True).indices
    rest = order[:, r:].sort(dim=1).values
    source = order[:, :r] * 2 + first_a
    into = partner.gather(1, order[:, :r]) + (prefix + rest.shape[1])
    front = torch.arange(prefix, device=device).expand(batch, -1)
    behind = torch.arange(first_b, tokens, 2, device=device).expand(batch, -1)
    keep = torch.cat([front, rest * 2 + first_a, behind], dim=1)
    weight = None if size is None else size.gather(1, source)
    if scores is not None:
        share = scores / scores.sum(dim=1, keepdim=True)
        centred = share - share.mean(dim=1, keepdim=True)
        pool = centred.square().sum(dim=1, keepdim=True) / max(1, tokens - prefix - 1) < tau  # [B, 1]
        ranked = scores.sort(dim=1, descending=True, stable=True).indices
        highest = ranked[:, : tokens - prefix - r]
        keep = torch.where(pool, keep, torch.cat([front, highest + prefix], dim=1))
        weight = pool.to(rows.dtype) * (torch.ones_like(source) if weight is None else weight)
    return keep, source, into, weight, (None if size is None else size.gather(1, keep))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, metric, size, ctx.r, ctx.prefix, scores, ctx.tau = inputs
    ctx.save_for_backward(x, metric, size, scores)


def _backward(ctx: Any, grad_x: Tensor | None, grad_size: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in x and size only: the matching is recomputed and is not differentiable."""
    x, metric, size, scores = ctx.saved_tensors
    chosen = match_torch(metric, size, ctx.r, ctx.prefix, scores, ctx.tau)
    keep, source, _, weight, _ = chosen
    to_x, to_weight, to_own = merge_rows_gradients(x, *chosen, grad_x, grad_size)
    to_size = None
    if size is not None:
        assert weight is not None
        # Each row is in keep or source once, or its second contribution is 0 (sources of a pruned image have weight 0
        # by policy, not by size). So no scatter adds two numbers, whose order would vary on a GPU.
        merges = torch.where(weight != 0, to_weight, 0.0)
        to_size = torch.zeros_like(size).scatter_add(1, keep, to_own).scatter_add(1, source, merges)
    wanted = ctx.needs_input_grad
    return (to_x if wanted[0] else None), None, (to_size if wanted[2] else None), None, None, None, None


_match_merge.register_autograd(_backward, setup_context=_setup_context)
