"""ONNX form of vp::Select and vp::SelectFuse: the nodes and their function bodies in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vp_kernels.function_body import Body, Value, node

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ["Select", "SelectByScore", "SelectFuse"]


def select_node(scores: Tensor, k: int, by_score: bool = False) -> Tensor:
    """Emit the node of `select` while torch.onnx.export traces. Arguments as for `select`.

    Returns:
        int64 [B, k].
    """
    import torch

    op_type = "SelectByScore" if by_score else "Select"
    return node(op_type, [scores], [(torch.int64, (scores.shape[0], k))], k=k)[0]


def select_fuse_node(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Emit the node of `select_fuse` while torch.onnx.export traces. Arguments as for `select_fuse`.

    Returns:
        index: int64 [B, k].
        fused: [B, 1, D], dtype of x.
    """
    import torch

    batch = scores.shape[0]
    outputs = [(torch.int64, (batch, k)), (x.dtype, (batch, 1, x.shape[2]))]
    index, fused = node("SelectFuse", [scores, x], outputs, k=k, scored=scores.shape[1], tokens=x.shape[1])
    return index, fused


def body(op_type: str) -> Body:
    """Function body of one operator type."""
    if op_type == "SelectFuse":
        return _select_fuse()
    f = Body(op_type, ["scores"], {"k": int})
    k = f.attribute("k")
    best = f.top(f.inputs()[0], k)[1]
    return f.outputs(index=best if op_type == "SelectByScore" else f.ascending(best, k))


def _select_fuse() -> Body:
    f = Body("SelectFuse", ["scores", "x"], dict.fromkeys(("k", "scored", "tokens"), int))
    scores, x = f.inputs()
    k, n = f.attribute("k"), f.attribute("scored")
    ranked, order = f.top(scores, n)
    index = f.ascending(f.slice(order, 1, 0, k), k)
    # The other rows in ranked order (irrelevant for a sum), with the scores that TopK returned.
    weights = f.Unsqueeze(f.slice(ranked, 1, k, n), 1)
    others = f.rows(x, f.slice(order, 1, k, n) + (f.attribute("tokens") - n))
    return f.outputs(index=index, fused=f.CastLike(f.MatMul(weights, f.float(others)), x))


def split(f: Body, order: Value, n: Value, k: Value) -> tuple[Value, Value]:
    """The first k of a ranking and the rest, each sorted ascending by a single sort, even if one is empty.

    TensorRT rejects a TopK of an empty tensor, so the rest is sorted as index + n.

    Args:
        order: int64 [B, n], a permutation.

    Returns:
        int64 [B, k], [B, n - k].
    """
    behind = f.Cast(f.Not(f.Less(f.range(0, n), k)), to=7) * n  # [n]: 0 for the first k, n for the rest
    both = f.ascending(order + behind, n)
    return f.slice(both, 1, 0, k), f.slice(both, 1, k, n) - n
