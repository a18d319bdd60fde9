"""torch operator vp::merge_rows: argument checks, CPU implementation, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vp_kernels.checks import Check
from vp_kernels.launch import MAX_TOKENS, runs_kernel
from vp_kernels.merge_rows.reference import merge_rows_gradients

OPERATOR = "vp::merge_rows"


def merge_rows(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean of each kept row and the rows merged into it.

    Args:
        x: [B, N, D], contiguous, fp32, fp16 or bf16; N up to 1024.
        keep: int64 [B, K], rows of x to keep, in output order; K >= 1.
        source: int64 [B, R], rows of x to merge; R may be 0.
        into: int64 [B, R], output row that each source joins.
        source_weight: float32 [B, R]; None for 1 each. Sources of weight 0 are ignored, even if they hold NaN.
        keep_weight: float32 [B, K]; None for 1 each.

    Returns:
        merged: [B, K, D], dtype of x: (keep_weight x_keep + sum of source_weight x_source) / mass, accumulated in fp32
            as a running mean in ascending r. A row without sources is copied bit for bit.
        mass: float32 [B, K], keep_weight + sum of source_weight.

    Raises:
        KernelError: if an argument has an unsupported device, dtype, shape or stride, or an index is out of range.
            Indices are not checked while tracing or compiling: a row of x out of range then reads as NaN, and a source
            that joins a row out of range is dropped.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import merge_rows
        >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
        >>> merged, mass = merge_rows(x, torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[1]]))
        >>> merged.flatten(), mass
        (tensor([1., 3.]), tensor([[1., 2.]]))
    """
    return _merge_rows(x, keep, source, into, source_weight, keep_weight)


def check(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None,
    keep_weight: Tensor | None,
) -> None:
    """Raise a KernelError if the kernel cannot run on the arguments."""
    checks = Check(OPERATOR, x)
    checks.tensor("x", x, ("B", "N", "D"))
    batch, tokens, width = x.shape
    checks.within("the number of tokens N of x", tokens, 1, MAX_TOKENS)
    checks.true(width >= 1, "the width D of x", str(width), "1 or more")
    checks.tensor("keep", keep, (batch, "K"), (torch.int64,))
    checks.within("the number of rows K of keep", keep.shape[1], 1, MAX_TOKENS)
    checks.tensor("source", source, (batch, "R"), (torch.int64,))
    checks.within("the number of rows R of source", source.shape[1], 0, MAX_TOKENS)
    checks.tensor("into", into, tuple(source.shape), (torch.int64,))
    if source_weight is not None:
        checks.tensor("source_weight", source_weight, tuple(source.shape), (torch.float32,))
    if keep_weight is not None:
        checks.tensor("keep_weight", keep_weight, tuple(keep.shape), (torch.float32,))
    checks.index_range("keep", keep, tokens)
    checks.index_range("source", source, tokens)
    checks.index_range("into", into, keep.shape[1])


@torch.library.triton_op(OPERATOR, mutates_args=())
def _merge_rows(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(x, keep, source, into, source_weight, keep_weight)
    if runs_kernel(x):
        from vp_kernels.merge_rows.kernel import launch_merge_rows

        return launch_merge_rows(x, keep, source, into, source_weight, keep_weight)
    return merge_rows_torch(x, keep, source, into, source_weight, keep_weight)


def merge_rows_torch(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CPU implementation in torch: one gather, and a correction of the rows that others merge into.

    Args, Returns: as for `merge_rows`; fp64 stays fp64.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = torch.ones(source.shape, dtype=kind, device=x.device) if source_weight is None else source_weight.to(kind)
    own = torch.ones(keep.shape, dtype=kind, device=x.device) if keep_weight is None else keep_weight.to(kind)
    # where() rather than a product, since a source of weight 0 may hold NaN.
    part = weight != 0
    mass = own.scatter_add(1, into, torch.where(part, weight, 0.0))  # [B, K]
    share = weight / mass.gather(1, into)  # [B, R]
    kept = _rows(x, keep).to(kind)  # [B, K, D]
    change = _rows(x, source).to(kind) - _rows(kept, into)  # [B, R, D]
    change = torch.where(part[:, :, None], share[:, :, None] * change, 0.0)
    merged = kept.scatter_add(1, into[:, :, None].expand_as(change), change)
    return merged.to(x.dtype), mass


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x [B, N, D] at index [B, K]: [B, K, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_merged: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
    x, keep, source, into, source_weight, keep_weight = ctx.saved_tensors
    grad_x, grad_weight, grad_own = merge_rows_gradients(
        x, keep, source, into, source_weight, keep_weight, grad_merged, grad_mass
    )
    wanted = (*ctx.needs_input_grad, False, False)  # torch omits trailing arguments left at their defaults
    return (
        grad_x if wanted[0] else None,
        None,
        None,
        None,
        grad_weight if wanted[4] else None,
        grad_own if wanted[5] else None,
    )


_merge_rows.register_autograd(_backward, setup_context=_setup_context)
