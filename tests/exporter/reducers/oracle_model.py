"""A whole timm ViT under a plan, in float64, one image at a time.

Uses timm's own layers, attention written out per head, and the reducers of oracles.py; shares no code with ReducedViT.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from tests.exporter.reducers.oracles import ORACLES, Image
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import ReductionPlan

MERGING = {"tome", "ppt", "pitome", "diffrate", "gtp"}


def run(
    vit: nn.Module,
    description: ModelSpec,
    plan: ReductionPlan,
    image: Tensor,
    margins: list[float] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Classify one image.

    Args:
        vit: The timm model; copied, not modified.
        image: [C, H, W].
        margins: Receives the margin of each decision of the inner steps (see `oracles.Image`).

    Returns:
        The tokens [N_b, D] that leave each block, and the logits [classes] (features [D] without classes); float64.
    """
    vit = copy.deepcopy(vit).double().eval()
    carried = plan.proportional_attention or any(
        step.reducer in MERGING or step.fields().get("weights") == "size" for step in plan.steps
    )
    prefix = description.prefix_tokens
    with torch.no_grad():
        x = _embed(vit, image.double())
        positions = list(range(description.patches))
        size = torch.ones(len(x), dtype=torch.float64)
        leaving = []
        embedded, embedded_at = x[prefix:], positions
        inner = [step for step in plan.steps if step.reducer != "static"]
        for number, block in enumerate(vit.blocks):
            static = plan.steps_at(number, "input")
            if static is not None:
                rows = list(range(prefix))
                rows += [prefix + at for at, position in enumerate(positions) if position in static.keep]
                x, size = x[rows], size[rows]
                positions = [position for position in positions if position in static.keep]
                if number == 0:
                    embedded, embedded_at = x[prefix:], positions
            bias = torch.zeros(len(x), dtype=torch.float64)
            if number in plan.key_bias:
                bias = bias + torch.tensor(plan.key_bias[number], dtype=torch.float64)
            if plan.proportional_attention:
                bias = bias + size.log()
            step = plan.steps_at(number, "inner")
            theta = 1.0 if step is None else step.fields().get("theta", 1.0)
            out, attention, keys, values = _attend(block.attn, block.norm1(x), bias, theta)
            x = x + _scaled(block, out, 1)
            if step is not None:
                seen = Image(
                    x.numpy(), size.numpy(), np.array(positions), prefix, description.grid,
                    attention.numpy(), keys.numpy(), values.numpy(), embedded.numpy(), np.array(embedded_at),
                )  # fmt: skip
                reduced = ORACLES[step.reducer](seen, **step.fields())
                x, size = torch.from_numpy(reduced[0]), torch.from_numpy(reduced[1])
                positions = reduced[2].tolist()
                if not carried:
                    size = torch.ones(len(x), dtype=torch.float64)
                if margins is not None:
                    margins.extend(seen.margins)
            x = x + _scaled(block, block.mlp(block.norm2(x)), 2)
            leaving.append(x)
        if not carried:
            size = torch.ones(len(x), dtype=torch.float64)
        by_size = not inner or any(step.fields().get("graph_from") != "patches" for step in inner)
        return leaving, _classify(vit, description, x, size, plan.proportional_attention, by_size)


def _embed(vit: nn.Module, image: Tensor) -> Tensor:
    """[C, H, W] -> [P + patches, D]."""
    x = vit._pos_embed(vit.patch_embed(image[None]))
    if isinstance(x, tuple):  # Eva also returns its rotary embedding
        x = x[0]
    return vit.norm_pre(x)[0]


def _attend(layer: nn.Module, x: Tensor, bias: Tensor, theta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Self-attention over normed tokens [N, D] with one additive logit per key [N]; keeps a share `theta` of each map.

    Returns:
        The output [N, D], the softmax [H, N, N], the normed keys and the values [H, N, d_h].
    """
    heads, width = layer.num_heads, layer.head_dim
    if layer.qkv is None:
        q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    else:
        both = layer.qkv(x)
        q, k, v = (both[:, i * heads * width : (i + 1) * heads * width] for i in range(3))
        if getattr(layer, "q_bias", None) is not None:  # Eva adds the biases itself
            q, k, v = q + layer.q_bias, k + layer.k_bias, v + layer.v_bias
    outs, maps, keys, values = [], [], [], []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        queries = layer.q_norm(q[:, columns])
        keys.append(layer.k_norm(k[:, columns]))
        values.append(v[:, columns])
        maps.append(_sparse(_softmax(queries @ keys[-1].T / width**0.5 + bias[None, :]), theta))
        outs.append(maps[-1] @ values[-1])
    out = layer.norm(torch.cat(outs, dim=1))
    if layer.gate is not None:
        out = out * torch.sigmoid(layer.gate(x))
    return layer.proj(out), torch.stack(maps), torch.stack(keys), torch.stack(values)


def _sparse(weights: Tensor, theta: float) -> Tensor:
    """Set entries of the map below the int((1 - theta) N^2)-th lowest to 0."""
    ranked = sorted(weights.flatten().tolist())
    lowest = int(len(ranked) * (1 - theta))
    return torch.where(weights >= ranked[lowest - 1], weights, 0.0) if lowest else weights


def _softmax(logits: Tensor) -> Tensor:
    """Softmax of each row of [M, N]."""
    powers = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return powers / powers.sum(dim=1, keepdim=True)


def _scaled(block: nn.Module, x: Tensor, which: int) -> Tensor:
    """The block's LayerScale, under either name."""
    if hasattr(block, "ls1"):
        return (block.ls1 if which == 1 else block.ls2)(x)
    gamma = block.gamma_1 if which == 1 else block.gamma_2
    return x if gamma is None else x * gamma


def _classify(
    vit: nn.Module, description: ModelSpec, x: Tensor, size: Tensor, proportional: bool, by_size: bool
) -> Tensor:
    """Logits from the tokens [N, D] that leave the last block, and their sizes [N]."""
    x = vit.norm(x)
    if description.distilled:
        return (vit.head(x[0]) + vit.head_dist(x[1])) / 2
    first = 0 if description.pool_include_prefix else description.prefix_tokens
    pooled, sizes = x[first:], size[first:]
    weights = sizes if by_size else torch.ones_like(sizes)
    average = sum(w * token for w, token in zip(weights, pooled, strict=True)) / sum(weights)
    if vit.attn_pool is not None:
        out = _attention_pool(vit.attn_pool, pooled, sizes.log() if proportional else torch.zeros_like(sizes))
    elif description.pool == "token":
        out = x[0]
    elif description.pool == "avg":
        out = average
    elif description.pool == "max":
        out = pooled.max(dim=0).values
    else:
        assert description.pool == "avgmax"
        out = (pooled.max(dim=0).values + average) / 2
    return vit.head(vit.fc_norm(out))


def _attention_pool(pool: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """timm's AttentionPoolLatent over [N, D] with one additive logit per token [N]."""
    heads, width = pool.num_heads, pool.head_dim
    q, both = pool.q(pool.latent[0]), pool.kv(x)
    k, v = both[:, : heads * width], both[:, heads * width :]
    outs = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        logits = pool.q_norm(q[:, columns]) @ pool.k_norm(k[:, columns]).T / width**0.5
        outs.append(_softmax(logits + bias[None, :]) @ v[:, columns])
    out = pool.proj(torch.cat(outs, dim=1))
    if pool.mlp is not None:
        out = out + pool.mlp(pool.norm(out))
    if pool.pool == "token":
        return out[0]
    return out.mean(dim=0) if pool.pool == "avg" else out
