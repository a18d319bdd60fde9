"""torch operator vp::gather_norm: argument checks, registration, gradients."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from vp_kernels.checks import Check
from vp_kernels.gather_norm.reference import gather, gather_norm_reference
from vp_kernels.launch import MAX_TOKENS, runs_kernel

NAME = "vp::gather_norm"
MAX_WIDTH = 4096  # a row stays in registers


def gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather rows of x and apply LayerNorm, in one pass over memory.

    Differentiable in x, weight, bias, residual and extra.

    Args:
        x: fp32, fp16 or bf16 [B, N, D], contiguous; N up to 1024, D up to 4096.
        index: int64 [K], or [B, K] per image: rows of x in any order, may repeat; K may be 0.
        weight, bias: [D], of the LayerNorm.
        eps: Of the LayerNorm.
        residual: [B, N, D], dtype of x, added to x in fp32 before gathering.
        extra: [B, E, D], dtype of x, appended after the gathered rows.

    Returns:
        kept: [B, K + E, D] = cat(x[index] + residual[index], extra), dtype of x.
        normed: [B, K + E, D], LayerNorm of the unrounded rows, dtype of x.

    Raises:
        KernelError: if an argument is not as above. Indices are not checked while compiling or capturing a CUDA graph;
            a row with an index outside 0 .. N - 1 is then NaN.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import gather_norm
        >>> x, index = torch.randn(2, 17, 64), torch.tensor([0, 3, 5])
        >>> kept, normed = gather_norm(x, index, torch.ones(64), torch.zeros(64), 1e-6)
        >>> torch.equal(kept, x[:, index]), normed.shape
        (True, torch.Size([2, 3, 64]))
    """
    found: tuple[Tensor, Tensor] = _operator(x, index, weight, bias, eps, residual, extra)
    return found


# Optional[...]: torch infers the operator's schema from the annotations.
@torch.library.triton_op(NAME, mutates_args=())
def _operator(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Optional[Tensor] = None,  # noqa: UP045
    extra: Optional[Tensor] = None,  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    _check(x, index, weight, bias, eps, residual, extra)
    if runs_kernel(x):
        from vp_kernels.gather_norm.kernel import launch_gather_norm

        return launch_gather_norm(x, index, weight, bias, eps, residual, extra)
    kept, normed = gather_norm_reference(x, index, weight, bias, eps, residual, extra)
    return kept.to(x.dtype), normed.to(x.dtype)


def _check(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, extra: Tensor | None
) -> None:
    check = Check(NAME, x)
    check.tensor("x", x, ("B", "N", "D"))
    batch, tokens, width = x.shape
    check.within("the number of tokens of x", tokens, 1, MAX_TOKENS)
    check.within("the width of x", width, 1, MAX_WIDTH)
    each = (batch,) if index.ndim == 2 else ()
    check.true(index.ndim in (1, 2), "the shape of index", str(list(index.shape)), "[K] or [B, K]")
    check.tensor("index", index, (*each, "K"), (torch.int64,))
    check.tensor("weight", weight, (width,))
    check.tensor("bias", bias, (width,), (weight.dtype,))
    check.true(eps >= 0, "eps", str(eps), "0 or more")
    if residual is not None:
        check.tensor("residual", residual, (batch, tokens, width), (x.dtype,))
    if extra is not None:
        check.tensor("extra", extra, (batch, "E", width), (x.dtype,))
    check.index_range("index", index, tokens)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, index, weight, bias, eps, residual, extra = inputs
    ctx.save_for_backward(x, index, weight, bias, residual, extra)
    ctx.eps = eps


def _backward(ctx: Any, grad_kept: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of LayerNorm in fp32; gathers the rows again rather than saving them."""
    x, index, weight, bias, residual, extra = ctx.saved_tensors
    batch, tokens, width = x.shape
    rows = gather(x, index, residual, extra)  # [B, K + E, D]
    centred = rows - rows.mean(dim=2, keepdim=True)
    scale = (centred.square().mean(dim=2, keepdim=True) + ctx.eps).rsqrt()
    unit, grad_normed = centred * scale, grad_normed.float()
    grad_unit = grad_normed * weight.float()
    inner = grad_unit.mean(dim=2, keepdim=True) + unit * (grad_unit * unit).mean(dim=2, keepdim=True)
    grad_rows = (grad_unit - inner) * scale + grad_kept.float()  # [B, K + E, D]

    kept = index.shape[-1]
    where = index.expand(batch, -1)  # [B, K]
    inside = (where >= 0) & (where < tokens)
    image = torch.arange(batch, device=x.device)[:, None]
    flat = (image * tokens + where.clamp(0, tokens - 1)).reshape(-1)
    grad_kept_rows = grad_rows[:, :kept].masked_fill(~inside[:, :, None], 0.0).reshape(-1, width)
    # Rows may repeat; their gradients add up, in fp32.
    into = torch.zeros(batch * tokens, width, dtype=torch.float32, device=x.device)
    grad_x = into.index_add(0, flat, grad_kept_rows).reshape(x.shape).to(x.dtype)
    return (
        grad_x,
        None,
        (grad_normed * unit).sum(dim=(0, 1)).to(weight.dtype),
        grad_normed.sum(dim=(0, 1)).to(bias.dtype),
        None,
        None if residual is None else grad_x,
        None if extra is None else grad_rows[:, kept:].to(extra.dtype),
    )


_operator.register_autograd(_backward, setup_context=_setup_context)
