"""First-order model of a block's attention under scaling of its keys, and its normal equations.

A key bias log s_j multiplies key j's term in the softmax by s_j. With p the attention probabilities of a head, v its
values and o = p v its output, d o_i / d s_j = p_ij (v_j - o_i) at s = 1. After the output projection W_O the heads sum
to one column of a linear model per token. This is the mask rescaling of Kwon et al. (2022, "A Fast Post-Training
Pruning Framework for Transformers"), with tokens as units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.rewrite.attention import attention
from vp_exporter.rewrite.block import ReducedBlock, qkv_of

CHUNK = 2**24  # elements of the linear model's matrix in memory at a time: 64 MiB


def why_not_linear(vit: nn.Module) -> str | None:
    """Why least squares is not applicable to a model's attention, or None."""
    for number, block in enumerate(vit.blocks):
        layer = block.attn
        if not isinstance(layer.norm, nn.Identity):
            return f"block {number} normalises what its attention gives"
        if layer.gate is not None:
            return f"block {number} gates what its attention gives"
        if layer.qkv is None and getattr(layer, "q_proj", None) is None:
            return f"block {number} has no projection to queries, keys and values that we know"
        if not isinstance(layer.proj, nn.Linear):
            return f"block {number} projects its attention's output by a {type(layer.proj).__name__}"
    return None


def heads_of(block: ReducedBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, d] from the input of a block's attention, [B, N, D]."""
    layer = block.block[0].attn
    tokens, heads, width = x.shape[1], layer.num_heads, layer.head_dim
    x = block.block[0].norm1(x)
    if layer.qkv is None:  # separate projections of EVA-02
        q, k, v = (
            project(x).reshape(-1, tokens, heads, width).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
    else:
        q, k, v = qkv_of(layer, x).reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    return layer.q_norm(q), layer.k_norm(k), v


def attended(block: ReducedBlock, x: Tensor, bias: Tensor | None) -> Tensor:
    """Output of attention including the residual: [B, N, D] -> [B, N, D]; `bias` is float32 [N]."""
    out, _ = block._attend(block.block[0].norm1(x), None if bias is None else bias[None])
    return x + block._scale(out, 1)


def through_mlp(block: ReducedBlock, x: Tensor) -> Tensor:
    """The rest of a block without an inner step."""
    own = block.block[0]
    return x + block._scale(own.mlp(own.norm2(x)), 2)


def responses(block: ReducedBlock, x: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Linear model of `attended` at some queries.

    Args:
        x: [B, N, D], input of the attention.
        bias: float32 [N], biases to linearise at.
        rows: int64 [R], queries.

    Returns:
        [B, N, R, D], derivative of the output at each query with respect to the log of each key's scale; and that
        output itself (residual included), [B, R, D].

    Raises:
        SearchError: if the attention's output is normalised or gated.
    """
    layer = block.block[0].attn
    if not isinstance(layer.norm, nn.Identity) or layer.gate is not None:
        raise SearchError(
            "the attention's output is normalised or gated", expected="a linear output projection",
            fix="tune by Adam alone",
        )  # fmt: skip
    q, k, v = heads_of(block, x)
    logits = (q.index_select(2, rows) * layer.head_dim**-0.5) @ k.transpose(-2, -1)
    p = torch.softmax(logits + bias.to(logits.dtype), dim=-1)  # [B, H, R, N]
    weight = layer.proj.weight.reshape(-1, layer.num_heads, layer.head_dim)  # [D, H, d]
    # Value and output of each head, projected to the width of the stream.
    values = block._scale(torch.einsum("bhnc,dhc->bhnd", v, weight), 1)
    outputs = block._scale(torch.einsum("bhrc,dhc->bhrd", p @ v, weight), 1)
    matrix = p.permute(0, 3, 2, 1) @ values.transpose(1, 2)  # over heads: [B, N, R, H] [B, N, H, D]
    matrix -= (p.permute(0, 2, 3, 1) @ outputs.transpose(1, 2)).transpose(1, 2)
    out = x.index_select(1, rows) + outputs.sum(dim=1)
    if layer.proj.bias is not None:
        out = out + block._scale(layer.proj.bias, 1)
    return matrix, out


def answers(block: ReducedBlock, x: Tensor, trials: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Output of `attended` at some queries under each of several biases: [B, R, D] each."""
    layer = block.block[0].attn
    q, k, v = heads_of(block, x)
    q = q.index_select(2, rows)
    parts = (layer.proj(attention(q, k, v, bias[None])) for bias in trials)
    return [x.index_select(1, rows) + block._scale(part, 1) for part in parts]


def normal_equations(
    block: ReducedBlock, x: Tensor, bias: Tensor, target: Tensor, rows: Tensor, weights: Tensor
) -> Tensor:
    """A^T A and A^T b of the weighted least squares of `attended` against a target.

    Args:
        x, bias, rows: As for `responses`.
        target: [B, N, D], desired output after attention.
        weights: float32 [R], weight of each query's squared error.

    Returns:
        float64 [N, N + 1]: A^T A, and A^T b as the last column.
    """
    tokens, width = x.shape[1], x.shape[2]
    root = weights.sqrt()[:, None]
    total = x.new_zeros(tokens, tokens + 1, dtype=torch.float64)
    step = max(1, CHUNK // (tokens * len(rows) * width))
    for first in range(0, len(x), step):
        matrix, out = responses(block, x[first : first + step], bias, rows)
        error = ((target[first : first + step].index_select(1, rows) - out) * root).flatten(1)  # [B, R D]
        columns = (matrix * root).flatten(2)  # [B, N, R D]
        total[:, :-1] += (columns @ columns.transpose(1, 2)).sum(dim=0, dtype=torch.float64)
        total[:, -1] += (columns @ error[:, :, None]).sum(dim=0, dtype=torch.float64)[:, 0]
    return total


def solve(equations: Tensor, ridge: float) -> Tensor | None:
    """Changes e of the scales that minimise |A e - b|^2 + ridge * mean(diag(A^T A)) * |e|^2.

    Args:
        equations: float64 [N, N + 1], from `normal_equations`.
        ridge: Regularisation towards e = 0, relative to the mean squared column; also resolves directions that the data
            leave open (one common scale for all tokens has no effect).

    Returns:
        float64 [N]; None if the scales have no effect (a single token), or the equations have no finite solution.
    """
    square, right = equations[:, :-1], equations[:, -1]
    mean = float(square.diagonal().mean())
    if not np.isfinite(mean) or mean <= 0:
        return None
    eye = torch.eye(len(square), dtype=torch.float64, device=square.device)
    change, failed = torch.linalg.solve_ex(square / mean + ridge * eye, right / mean)
    return change if int(failed) == 0 and bool(torch.isfinite(change).all()) else None


def row_weights(description: ModelSpec, tokens: int, *, last: bool, class_weight: float) -> np.ndarray:
    """Weight of the squared error of each remaining token's output.

    If the head reads prefix tokens (class or distillation token), their total weight is `class_weight` times that of
    all other tokens: they determine the output, and one of 197 rows would hardly matter otherwise. In the last block,
    the others then have weight 0, since they are not used. If the head pools patches, all weights are equal.

    Args:
        tokens: Tokens in the block's attention, prefix tokens included.
        last: Whether it is the model's last block.

    Returns:
        float64 [tokens].
    """
    weights = np.ones(tokens)
    if description.pool == "token" and description.class_token:
        read = 2 if description.distilled else 1
        others = tokens - read
        if last:
            weights[read:] = 0
        elif others:
            weights[:read] = class_weight * others / read
    return weights


def sample_rows(weights: np.ndarray, queries: int | None, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sample queries: those with a weight of their own always, and `queries` random ones of the others.

    Args:
        weights: From `row_weights`.
        queries: Number of samples; None for all.

    Returns:
        int64 [R] queries, ascending, and float32 [R] weights, with those of sampled queries raised to make sums
        unbiased.
    """
    common = weights == weights[-1]  # patches, and prefix tokens that the head does not read
    drawn = np.flatnonzero(common & (weights > 0))
    always = np.flatnonzero(~common & (weights > 0))
    scaled = weights.copy()
    if queries is not None and queries < len(drawn):
        scaled[drawn] *= len(drawn) / queries
        drawn = np.random.default_rng(seed).choice(drawn, queries, replace=False)
    rows = np.sort(np.concatenate([always, drawn]))
    return torch.from_numpy(rows), torch.from_numpy(scaled[rows].astype(np.float32))
