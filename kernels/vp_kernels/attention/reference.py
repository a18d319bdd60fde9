"""Reference implementation of vp::attention in plain torch, with an explicit softmax in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(qkv: Tensor, key_bias: Tensor | None = None, importance: str = "none") -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + key_bias) v, and the attention that each key receives.

    Args:
        qkv: [B, N, 3, H, d]. Computed in fp64 if fp64 (ground truth for fp32), else in fp32.
        key_bias: [1 or B, N], added to the logits of each key; -inf masks the key. None is zero.
        importance: "none", "class" (row 0 of the softmax, mean over heads) or "mean" (mean over heads and queries).

    Returns:
        out: [B, N, H * d], dtype of qkv.
        importance: [B, N], fp32 (fp64 for fp64 qkv); "none": an empty [0].
    """
    _, _, v, p = _probabilities(qkv, key_bias)
    out = (p @ v).transpose(1, 2).flatten(2)  # [B, H, N, d] -> [B, N, H * d]
    return out.to(qkv.dtype), _received(p, importance)


def attention_gradients(
    qkv: Tensor, key_bias: Tensor | None, importance: str, grad_out: Tensor | None, grad_importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `attention_reference`; recomputes the softmax.

    Written out rather than left to autograd, so that it can be traced (torch.compile) and differentiated again.

    Args:
        qkv, key_bias, importance: as for `attention_reference`.
        grad_out: [B, N, H * d]; None is zero.
        grad_importance: [B, N]; None is zero. Ignored for importance="none".

    Returns:
        Gradients of qkv, [B, N, 3, H, d] in its dtype, and of key_bias in its shape and dtype (None for None).
    """
    q, k, v, p = _probabilities(qkv, key_bias)
    heads, tokens, width = v.shape[1:]
    dv = torch.zeros_like(v)
    dp = torch.zeros_like(p)
    if grad_out is not None:
        do = grad_out.to(v.dtype).unflatten(2, (heads, width)).transpose(1, 2)  # [B, H, N, d]
        dv = p.transpose(2, 3) @ do
        dp = do @ v.transpose(2, 3)  # [B, H, N, N]
    if grad_importance is not None and importance != "none":
        each = grad_importance.to(v.dtype)[:, None, None, :] / heads  # [B, 1, 1, N]
        if importance == "mean":
            dp = dp + each / tokens
        else:
            dp = torch.cat([dp[:, :, :1] + each, dp[:, :, 1:]], dim=2)
    ds = p * (dp - (p * dp).sum(dim=3, keepdim=True))
    dq = (ds @ k) * width**-0.5
    dk = (ds.transpose(2, 3) @ q) * width**-0.5
    grad_qkv = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4)  # [3, B, H, N, d] -> [B, N, 3, H, d]
    grad_bias = None
    if key_bias is not None:
        grad_bias = ds.sum(dim=(1, 2)).sum_to_size(key_bias.shape).to(key_bias.dtype)
    return grad_qkv.to(qkv.dtype), grad_bias


def _probabilities(qkv: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, each [B, H, N, d], and the softmax, [B, H, N, N], in fp32 or fp64."""
    wide = qkv if qkv.dtype == torch.float64 else qkv.float()
    q, k, v = wide.permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q @ k.transpose(2, 3)) * qkv.shape[4] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias[:, None, None, :].to(wide.dtype)
    return q, k, v, torch.softmax(logits, dim=3)


def _received(p: Tensor, importance: str) -> Tensor:
    """Attention that each key receives, from the softmax [B, H, N, N]: [B, N], or [0]."""
    if importance == "class":
        return p[:, :, 0].mean(dim=1)
    if importance == "mean":
        return p.mean(dim=(1, 2))
    return p.new_empty(0)
