"""torch operators vp::select and vp::select_fuse: argument checks and registration."""

from __future__ import annotations

import torch
from torch import Tensor

from vp_kernels.checks import Check
from vp_kernels.launch import MAX_TOKENS, runs_kernel
from vp_kernels.select.reference import select_fuse_reference, select_reference

SELECT = "vp::select"
SELECT_FUSE = "vp::select_fuse"


def select(scores: Tensor, k: int, by_score: bool = False) -> Tensor:
    """Indices of the k highest scores of each image; ties go to the lowest index, NaN ranks highest.

    Args:
        scores: float32 [B, n], last axis of stride 1, n up to 1024.
        k: Number to select, 1 .. n.
        by_score: Order by descending score (a stable ranking) instead of by ascending index.

    Returns:
        int64 [B, k].

    Raises:
        KernelError: if an argument is not as above.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import select
        >>> select(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)
        tensor([[1, 3]])
    """
    index: Tensor = _select(scores, k, by_score)
    return index


def select_fuse(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`select`, and EViT's fused token of the rows that were not selected. Not differentiable.

    Args:
        scores: float32 [B, n], last axis of stride 1, n up to 1024.
        x: fp32, fp16 or bf16 [B, N, D], contiguous, N >= n; the scores belong to its last n rows.
        k: Number to select, 1 .. n.

    Returns:
        index: int64 [B, k], ascending.
        fused: [B, 1, D], dtype of x: sum of score times row over the others, accumulated in fp32; zeros if k = n.

    Raises:
        KernelError: if an argument is not as above.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import select_fuse
        >>> index, fused = select_fuse(torch.rand(2, 16), torch.randn(2, 17, 64), 11)
        >>> index.shape, fused.shape
        (torch.Size([2, 11]), torch.Size([2, 1, 64]))
    """
    found: tuple[Tensor, Tensor] = _select_fuse(scores, x, k)
    return found


@torch.library.triton_op(SELECT, mutates_args=())
def _select(scores: Tensor, k: int, by_score: bool = False) -> Tensor:
    _check_scores(Check(SELECT, scores), scores, k)
    if runs_kernel(scores):
        from vp_kernels.select.kernel import launch_select

        return launch_select(scores, k, by_score)
    return select_reference(scores, k, by_score)


@torch.library.triton_op(SELECT_FUSE, mutates_args=())
def _select_fuse(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check = Check(SELECT_FUSE, scores)
    _check_scores(check, scores, k)
    check.tensor("x", x, (scores.shape[0], "N", "D"))
    check.within("the number of tokens of x", x.shape[1], scores.shape[1], MAX_TOKENS, "the scores are of its last")
    check.true(x.shape[2] >= 1, "the width of x", str(x.shape[2]), "1 or more")
    if runs_kernel(scores):
        from vp_kernels.select.kernel import launch_select_fuse

        return launch_select_fuse(scores, x, k)
    index, fused = select_fuse_reference(scores, x, k)
    return index, fused.to(x.dtype)


def _check_scores(check: Check, scores: Tensor, k: int) -> None:
    check.tensor("scores", scores, ("B", "n"), (torch.float32,), contiguous=False)
    check.within("the number of scores", scores.shape[1], 1, MAX_TOKENS)
    check.within("k", k, 1, scores.shape[1])
