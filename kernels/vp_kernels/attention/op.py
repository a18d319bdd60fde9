"""torch operator vp::attention: argument checks, CPU implementation, autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vp_kernels.attention.reference import attention_gradients
from vp_kernels.checks import Check
from vp_kernels.launch import MAX_TOKENS, runs_kernel

OPERATOR = "vp::attention"
HEAD_DIMS = (32, 64, 80, 96, 128)
IMPORTANCE = ("none", "class", "mean")


def attention(qkv: Tensor, key_bias: Tensor | None = None, importance: str = "none") -> tuple[Tensor, Tensor | None]:
    """Attention on a packed qkv projection, which can also return the attention that each key receives.

    Args:
        qkv: [B, N, 3, H, d], contiguous, fp32, fp16 or bf16; N up to 1024; d in 32, 64, 80, 96, 128.
        key_bias: float32 [1 or B, N], added to the logits of each key for every query (e.g. the log of the token's
            size); -inf masks the key. None is zero.
        importance: "none"; "class": attention of token 0, mean over heads; "mean": attention that each key receives,
            mean over heads and queries.

    Returns:
        out: [B, N, H * d], dtype of qkv: softmax(q k^T / sqrt(d) + key_bias) v. NaN if all keys are masked.
        importance: float32 [B, N], from the unrounded softmax; None for "none".

    Raises:
        KernelError: if an argument has an unsupported device, dtype, shape, stride or value.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import attention
        >>> out, received = attention(torch.randn(2, 17, 3, 2, 32), importance="class")
        >>> out.shape, received.shape
        (torch.Size([2, 17, 64]), torch.Size([2, 17]))
    """
    out, received = _attention(qkv, key_bias, importance)
    return out, (None if importance == "none" else received)


def check(qkv: Tensor, key_bias: Tensor | None, importance: str) -> None:
    """Raise a KernelError if the kernel cannot run on the arguments."""
    checks = Check(OPERATOR, qkv)
    checks.tensor("qkv", qkv, ("B", "N", 3, "H", HEAD_DIMS))
    checks.within("the number of tokens N of qkv", qkv.shape[1], 1, MAX_TOKENS)
    checks.true(qkv.shape[3] >= 1, "the number of heads H of qkv", str(qkv.shape[3]), "1 or more")
    if key_bias is not None:
        checks.tensor("key_bias", key_bias, ((1, qkv.shape[0]), qkv.shape[1]), (torch.float32,))
    checks.true(importance in IMPORTANCE, "importance", repr(importance), " or ".join(map(repr, IMPORTANCE)))


@torch.library.triton_op(OPERATOR, mutates_args=())
def _attention(qkv: Tensor, key_bias: Tensor | None = None, importance: str = "none") -> tuple[Tensor, Tensor]:
    check(qkv, key_bias, importance)
    if runs_kernel(qkv):
        from vp_kernels.attention.kernel import launch_attention

        return launch_attention(qkv, key_bias, importance)
    return attention_torch(qkv, key_bias, importance)


def attention_torch(qkv: Tensor, key_bias: Tensor | None = None, importance: str = "none") -> tuple[Tensor, Tensor]:
    """CPU implementation on torch's fused attention; never builds a [B, H, N, N].

    Args, Returns: as for `attention`; importance is an empty [0] for "none".
    """
    tokens, heads = qkv.shape[1], qkv.shape[3]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
    mask = None
    if key_bias is not None:
        # torch's fused attention returns zeros if all keys are masked; a NaN mask makes the result NaN.
        removed = (key_bias == -torch.inf).all(dim=1, keepdim=True)
        mask = key_bias.masked_fill(removed, torch.nan)[:, None, None, :]  # [1 or B, 1, 1, N]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    if importance == "none":
        return out, torch.empty(0, dtype=torch.float32, device=qkv.device)
    if importance == "class":
        return out, _softmax(q[:, :, :1], k, key_bias).mean(dim=(1, 2))
    received = _softmax(q[:, :1], k[:, :1], key_bias).sum(dim=(1, 2))
    for head in range(1, heads):
        received = received + _softmax(q[:, head : head + 1], k[:, head : head + 1], key_bias).sum(dim=(1, 2))
    return out, received / (heads * tokens)


def _softmax(q: Tensor, k: Tensor, key_bias: Tensor | None) -> Tensor:
    """Softmax in fp32 of q [B, H, n, d] and k [B, H, N, d]: [B, H, n, N]."""
    logits = (q.float() * q.shape[3] ** -0.5) @ k.float().transpose(2, 3)
    return torch.softmax(logits if key_bias is None else logits + key_bias[:, None, None, :], dim=3)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: tuple[Tensor, Tensor]) -> None:
    qkv, key_bias, ctx.importance = inputs
    ctx.save_for_backward(qkv, key_bias)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_importance: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    qkv, key_bias = ctx.saved_tensors
    grad_qkv, grad_bias = attention_gradients(qkv, key_bias, ctx.importance, grad_out, grad_importance)
    # needs_input_grad has no entries for arguments left at their defaults; torch ignores the Nones here.
    return (grad_qkv if ctx.needs_input_grad[0] else None), grad_bias, None


_attention.register_autograd(_backward, setup_context=_setup_context)
