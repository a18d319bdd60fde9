"""The one attention of the reduced model: softmax(q k^T / sqrt(d) + key_bias) v, in the forms that engines like."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# "sdpa": torch's fused attention; the ONNX exporter turns it into one Attention node on [B, H, N, d], which TensorRT
#   fuses with the qkv projection's bias (the packed form costs it 24 kernels more).
# "packed": ONNX Runtime's MultiHeadAttention on [B, N, H * d], without the transposes and slices of the other: 3 to 6%
#   faster there. Not the standard Attention, which is as fast: it is in opset 23 alone, and ONNX Runtime's quantizers
#   and symbolic shape inference take it for their own operator of that name. The mask is repeated for every query,
#   because the kernel does not broadcast it.
# "explicit": MatMul, Softmax, MatMul, for engines without the operator.
AttentionForm = Literal["sdpa", "packed", "explicit"]


def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, form: AttentionForm = "sdpa") -> Tensor:
    """Multi-head attention with an additive logit per key.

    Args:
        q, k, v: [B, H, N, d].
        key_bias: float32 [1 or B, N], added to every query's logit of that key; -inf removes the key; None is zero.
        form: "sdpa" or "explicit".

    Returns:
        [B, N, H * d], contiguous, as the output projection reads it.
    """
    heads, tokens, width = q.shape[1], q.shape[2], q.shape[3]
    mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    if form == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        logits = (q * width**-0.5) @ k.transpose(-2, -1)
        out = torch.softmax(logits if mask is None else logits + mask, dim=-1) @ v
    # -1 for the batch keeps a dynamic batch out of the exported graph: no Shape node.
    return out.transpose(1, 2).reshape(-1, tokens, heads * width)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, key_bias: Tensor | None) -> Tensor:
    """The same on tensors whose heads lie side by side, as the projection wrote them.

    Args:
        q, k, v: [B, N, H * d].
        key_bias: as for `attention`.

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
