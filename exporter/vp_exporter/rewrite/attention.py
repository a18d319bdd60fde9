"""Attention with a key bias, softmax(q k^T / sqrt(d) + key_bias) v, in the form that suits each engine."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# "sdpa": torch's fused attention, exported to ONNX as one Attention node on [B, H, N, d], which TensorRT fuses with the
#   qkv bias (the packed form costs 24 more kernels there).
# "packed": ONNX Runtime's MultiHeadAttention on [B, N, H * d], without transposes and slices: 3 to 6% faster there. The
#   standard Attention would be as fast, but exists only from opset 23, and ONNX Runtime's quantizers and symbolic shape
#   inference confuse it with their own operator of that name. The mask is repeated for every query, because the
#   kernel does not broadcast it.
# "explicit": MatMul, Softmax, MatMul, for engines without the operator.
AttentionForm = Literal["sdpa", "packed", "explicit"]


def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, form: AttentionForm = "sdpa") -> Tensor:
    """Multi-head attention with an additive logit per key.

    Args:
        q, k, v: [B, H, N, d].
        key_bias: float32 [1 or B, N], added to the logits of each key; -inf masks the key. None is zero.
        form: "sdpa" or "explicit".

    Returns:
        [B, N, H * d], contiguous, as input of the output projection.
    """
    heads, tokens, width = q.shape[1], q.shape[2], q.shape[3]
    mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    if form == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        logits = (q * width**-0.5) @ k.transpose(-2, -1)
        out = torch.softmax(logits if mask is None else logits + mask, dim=-1) @ v
    # -1 keeps the dynamic batch out of the graph: no Shape node.
    return out.transpose(1, 2).reshape(-1, tokens, heads * width)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, key_bias: Tensor | None) -> Tensor:
    """`attention` on packed heads, as written by the projection.

    Args:
        q, k, v: [B, N, H * d].
        key_bias: As for `attention`.

    Returns:
        [B, N, H * d].
    """
    if not torch.onnx.is_in_onnx_export():
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, key_bias)
    mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype).expand(-1, -1, q.shape[1], -1)
    out: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, k, v) if mask is None else (q, k, v, None, None, mask),
        {"num_heads": heads},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )
    return out
