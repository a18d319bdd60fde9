"""ONNX form of vp::Attention: the node and its function body in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vp_kernels.function_body import Body, Ref, Value, node

if TYPE_CHECKING:
    from torch import Tensor

# Bias: adds a logit per key. Class, Mean: also returns the attention that each key receives, from token 0 or all
# tokens. Plain has a suffix because TensorRT's parser takes a bare "Attention" for the standard operator, whatever its
# domain.
TYPES = [f"Attention{parts}" for parts in ("Plain", "Class", "Mean", "Bias", "BiasClass", "BiasMean")]


def attention_node(
    qkv: Tensor, key_bias: Tensor | None = None, importance: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """Emit the node of `attention` while torch.onnx.export traces. Arguments as for `attention`.

    Returns:
        out: [B, N, H * d], dtype of qkv.
        importance: float32 [B, N]; None for "none".
    """
    import torch

    batch, tokens, _, heads, width = qkv.shape
    parts = "Bias" * (key_bias is not None) + importance.capitalize() * (importance != "none")
    op_type, inputs = f"Attention{parts or 'Plain'}", [qkv] if key_bias is None else [qkv, key_bias]
    sizes = {"tokens": tokens, "heads": heads, "head_dim": width}
    out = (qkv.dtype, (batch, tokens, heads * width))
    if importance == "none":
        return node(op_type, inputs, [out], **sizes)[0], None
    outputs = [out, (torch.float32, (batch, tokens))]
    found, received = node(op_type, inputs, outputs, **sizes)
    return found, received


def body(op_type: str) -> Body:
    """Function body of one operator type."""
    if "Mean" in op_type:
        return explicit_body(op_type)
    f, qkv, bias, scale = _start(op_type)
    tokens, heads, width = f.attribute("tokens"), f.attribute("heads"), f.attribute("head_dim")
    # Heads stay packed as the projection wrote them: no transposes, 3 to 6% faster on ONNX Runtime.
    packed = f.Reshape(qkv, [0, 0, -1])
    q, k, v = f.nodes_of("Split", (packed,), 3, {"axis": 2, "num_outputs": 3})
    mask = None
    if bias is not None:
        # ONNX Runtime does not broadcast a mask over queries, so the row is repeated.
        row = f.CastLike(f.Unsqueeze(bias, [1, 2]), qkv)
        mask = f.Expand(row, f.Concat([1, 1], tokens, 1, axis=0))
    out = f.Attention(q, k, v, mask, q_num_heads=Ref("heads"), kv_num_heads=Ref("heads"))
    if "Class" not in op_type:
        return f.outputs(out=out)
    # Block-diagonal query of token 0, H rows with head h in row h: one product with k gives the logits of all heads,
    # without splitting k by head and without an N x N map.
    head_of = f.range(0, heads * width) / width  # [H * d]
    own = f.float(f.Equal(f.Unsqueeze(f.range(0, heads), 1), head_of)) * scale  # [H, H * d]
    spread = f.float(f.slice(q, 1, 0, 1)) * own  # [B, H, H * d]
    logits = f.MatMul(spread, f.Transpose(f.float(k), perm=[0, 2, 1]))  # [B, H, N]
    if bias is not None:
        logits = logits + f.Unsqueeze(bias, 1)
    return f.outputs(out=out, importance=f.ReduceMean(f.Softmax(logits, axis=-1), 1, keepdims=0))


def explicit_body(op_type: str) -> Body:
    """Function body without the Attention operator.

    Used for opsets that lack it, and for the mean, which needs the full map. The map is computed once, in fp32, and
    also used for the output.
    """
    f, qkv, bias, scale = _start(op_type)
    heads_first = f.Transpose(f.float(qkv), perm=[2, 0, 3, 1, 4])  # [3, B, H, N, d]
    q, k, v = (f.Squeeze(part, 0) for part in f.nodes_of("Split", (heads_first,), 3, {"axis": 0, "num_outputs": 3}))
    logits = f.MatMul(q * scale, f.Transpose(k, perm=[0, 1, 3, 2]))
    if bias is not None:
        logits = logits + f.Unsqueeze(bias, [1, 2])
    weights = f.Softmax(logits, axis=-1)  # [B, H, N, N]
    rows = f.Transpose(f.MatMul(weights, v), perm=[0, 2, 1, 3])  # [B, N, H, d]
    out = f.CastLike(f.Reshape(rows, [0, 0, -1]), qkv)
    if "Mean" in op_type:
        return f.outputs(out=out, importance=f.ReduceMean(weights, [1, 2], keepdims=0))
    if "Class" in op_type:
        first = f.Squeeze(f.slice(weights, 2, 0, 1), 2)  # [B, H, N]
        return f.outputs(out=out, importance=f.ReduceMean(first, 1, keepdims=0))
    return f.outputs(out=out)


def _start(op_type: str) -> tuple[Body, Value, Value | None, Value]:
    """Start a body; returns it with qkv, the key bias (None without one) and 1 / sqrt(d)."""
    biased = "Bias" in op_type
    attributes = dict.fromkeys(("tokens", "heads", "head_dim"), int)
    f = Body(op_type, ["qkv", "key_bias"] if biased else ["qkv"], attributes)
    scale = f.Reciprocal(f.Sqrt(f.float(f.attribute("head_dim"))))
    return f, f.inputs()[0], f.inputs()[1] if biased else None, scale
