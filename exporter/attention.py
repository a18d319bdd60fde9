"""The one attention of the reduced model: softmax(q k^T / sqrt(d) + key_bias) v, in the forms that engines like."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# "sdpa": torch's fused attention, which the ONNX exporter turns into one Attention node. "sdpa-square": the same, its
# mask repeated for every query, because ONNX Runtime's Attention does not broadcast it. "explicit": MatMul, Softmax,
# MatMul, for engines without a fused kernel (TensorRT in fp32 refuses the Attention node).
AttentionForm = Literal["sdpa", "sdpa-square", "explicit"]


def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, form: AttentionForm = "sdpa") -> Tensor:
    """Multi-head attention with an additive logit per key.

    Args:
        q, k, v: [B, H, N, d].
        key_bias: float32 [1 or B, N], added to every query's logit of that key; -inf removes the key; None is zero.
        form: how to write it.

    Returns:
        [B, N, H * d], contiguous, as the output projection reads it.
    """
    heads, tokens, width = q.shape[1], q.shape[2], q.shape[3]
    mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    if form != "explicit":
        if mask is not None and form == "sdpa-square":
            mask = mask.expand(-1, -1, tokens, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        logits = (q * width**-0.5) @ k.transpose(-2, -1)
        out = torch.softmax(logits if mask is None else logits + mask, dim=-1) @ v
    # -1 for the batch keeps a dynamic batch out of the exported graph: no Shape node.
    return out.transpose(1, 2).reshape(-1, tokens, heads * width)
