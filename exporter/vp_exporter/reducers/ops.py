"""Tensor operations for reducers: static shapes, no host synchronisation, ties to the lowest index.

In an ONNX export each is one standard node, chosen for native (and fast) support in ONNX Runtime, OpenVINO and
TensorRT: TopK breaks ties by the lowest index by specification, GatherND with one batch axis copies whole rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OPSET = 18  # opset that defines the nodes below; unchanged up to 23


def ranking(scores: Tensor, k: int | None = None) -> Tensor:
    """Indices by descending score, stable.

    Args:
        scores: float32 [..., n].
        k: Number of indices; None for all n.

    Returns:
        int64 [..., k].
    """
    k = scores.shape[-1] if k is None else k
    if torch.onnx.is_in_onnx_export():
        return _top(scores, k, largest=True)[1]
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def nth_highest(scores: Tensor, n: int) -> Tensor:
    """The n-th highest score along the last axis, [..., 1]."""
    if torch.onnx.is_in_onnx_export():
        return _top(scores, n, largest=True)[0][..., -1:]
    return scores.topk(n, dim=-1).values[..., -1:]


def best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score along the last axis and its lowest index: [...], int64 [...]."""
    return scores.amax(dim=-1), scores.argmax(dim=-1)


def ones(index: Tensor) -> Tensor:
    """float32 ones in the shape of an int64 tensor. A comparison: ONNX's ones_like reads the shape at run time."""
    return (index >= 0).float()


def highest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores (ties to the lowest index), ascending: int64 [B, k]."""
    return ascending(ranking(scores, k))


def ascending(index: Tensor) -> Tensor:
    """Sort indices: int64 [B, k]."""
    if index.shape[-1] < 2:
        return index
    if torch.onnx.is_in_onnx_export():
        return _top(index, index.shape[-1], largest=False)[0]
    return index.sort(dim=-1).values


def split(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k highest scores (ties to the lowest) and of the rest, ascending: int64 [B, k], [B, n - k]."""
    order = ranking(scores)
    return ascending(order[:, :k]), ascending(order[:, k:])


def frame(index: Tensor, prefix: int, after: range = range(0), *, scale: int = 1, shift: int = 0) -> Tensor:
    """Row indices of the sequence: prefix 0 .. P-1, then `index * scale + shift`, then `after`.

    Pads with zeros and adds a constant row, so that the constants need not be expanded to the batch.

    Args:
        index: int64 [B, k].

    Returns:
        int64 [B, P + k + len(after)].
    """
    device, middle = index.device, index.shape[1]
    parts = [
        torch.arange(prefix, device=device),
        torch.full((middle,), shift, device=device),
        torch.arange(after.start, after.stop, after.step, device=device),
    ]
    scaled = index if scale == 1 else index * scale
    return F.pad(scaled, (prefix, len(after))) + torch.cat(parts)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Gather values [B, N] at index int64 [B, K]: [B, K]."""
    return torch.gather(values, 1, index)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x [B, N, D] at index int64 [B, K]: [B, K, D]."""
    if torch.onnx.is_in_onnx_export():
        rows: Tensor = torch.onnx.ops.symbolic(
            "GatherND",
            (x, index[:, :, None]),
            {"batch_dims": 1},
            dtype=x.dtype,
            shape=(x.shape[0], index.shape[1], x.shape[2]),
            version=OPSET,
        )
        return rows
    return torch.gather(x, 1, index[:, :, None].expand(-1, -1, x.shape[2]))


def take_positions(table: Tensor, index: Tensor) -> Tensor:
    """Gather from table int64 [B, n], or [1, n] shared by all images, at index int64 [B, K]: [B, K]."""
    if table.shape[0] == 1:
        return F.embedding(index, table.reshape(-1, 1)).squeeze(-1)
    return take(table, index)


def one_hot(index: Tensor, n: int) -> Tensor:
    """member[b, j, r] = 1 where index[b, r] = j: int64 [B, R] -> float32 [B, n, R]."""
    if torch.onnx.is_in_onnx_export():
        member: Tensor = torch.onnx.ops.symbolic(
            "OneHot",
            (index, torch.tensor([n]), torch.tensor([0.0, 1.0])),
            {"axis": 1},
            dtype=torch.float32,
            shape=(index.shape[0], n, index.shape[1]),
            version=OPSET,
        )
        return member
    return (torch.arange(n, device=index.device)[None, :, None] == index[:, None, :]).float()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of rows: [B, I, d], [B, J, d] -> float32 [B, I, J]."""
    return unit(a) @ unit(b).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """Normalise rows to length 1, in float32; zero rows stay zero."""
    x = x.float()
    if torch.onnx.is_in_onnx_export():
        # Not LpNormalization, for which ONNX Runtime has no kernel before 1.25 (in opset 22 and later). OpenVINO fuses
        # this pattern. The bound is that of F.normalize, squared.
        return x / (x * x).sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()
    return F.normalize(x, dim=-1)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of rows, [..., D] -> float32 [...]. Spelled out: ONNX Runtime's ReduceL2 takes twice as long."""
    x = x.float()
    return (x * x).sum(dim=-1).sqrt()


def _top(values: Tensor, k: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    shape = (*values.shape[:-1], k)
    found = torch.onnx.ops.symbolic_multi_out(
        "TopK",
        (values, torch.tensor([k])),
        {"axis": -1, "largest": int(largest), "sorted": 1},
        dtypes=(values.dtype, torch.int64),
        shapes=(shape, shape),
        version=OPSET,
    )
    return found[0], found[1]


def lower_triangle(n: int, device: torch.device) -> Tensor:
    """bool [1, n, n]: true at [i, j] where j < i."""
    place = torch.arange(n, device=device)
    return (place[None, :] < place[:, None])[None]


def squared_distances(t: Tensor) -> Tensor:
    """|t_i - t_j|^2 between rows: float32 [B, n, D] -> [B, n, n], symmetric, exactly 0 on the diagonal.

    Centred first: |t_i|^2 + |t_j|^2 - 2 t_i t_j cancels badly if tokens share a large mean, as in ViTs.
    """
    t = t - t.mean(dim=1, keepdim=True)
    norm = t.square().sum(dim=2)
    product = t @ t.transpose(1, 2)
    apart = (norm[:, :, None] + norm[:, None, :] - 2.0 * product).clamp_min(0.0)
    place = torch.arange(t.shape[1], device=t.device)
    return apart * (place[:, None] != place[None, :]).float()


def grid_codes(places: list[int], columns: int) -> Tensor:
    """Encode row-major positions as row * 2 columns + column; the padding makes `adjacent` a comparison of codes.

    Returns:
        int64 [1, n].
    """
    place = torch.tensor([places])
    return place // columns * (2 * columns) + place % columns


def adjacent(codes: Tensor, others: Tensor, columns: int) -> Tensor:
    """1 where two positions differ by at most 1 in row and in column.

    Args:
        codes, others: int64 [B, I], [B, J], from `grid_codes`.
        columns: Columns of the grid.

    Returns:
        float32 [B, I, J].
    """
    apart = (codes[:, :, None] - others[:, None, :]).float().abs()  # 0, 1: same row; 2 columns +- 0, 1: next row
    return ((apart <= 1.0) | ((apart - 2.0 * columns).abs() <= 1.0)).float()
