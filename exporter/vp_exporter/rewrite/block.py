"""Modules of a reduced model. Each wraps the timm module whose parameters it shares.

Training-time regularisation (dropout, drop path, patch drop) is omitted: a reduced model is for inference.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.eva import EvaBlock
from torch import Tensor

from vp_exporter.reducers import InnerStep
from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens
from vp_exporter.rewrite.attention import AttentionForm, attention, packed_attention
from vp_exporter.rewrite.attention_statistics import CollectStatistics, attention_map, needs_map


class PatchEmbedding(nn.Module):
    """Image to tokens, embedding only the patches at `keep`.

    A patch embedding is a convolution with stride equal to its kernel, so each patch is one matrix product: cut the
    image into patches, select the kept ones, multiply. Dropped patches are never computed.

    Args:
        vit: The timm model; parameters are shared.
        keep: Patch positions to embed, ascending; None for all.
    """

    index: Tensor | None
    table: Tensor | None
    weight: Tensor | None

    def __init__(self, vit: nn.Module, keep: tuple[int, ...] | None) -> None:
        super().__init__()
        self.vit = [vit]  # in a list: parameters are registered once, by ReducedViT.vit
        embed = vit.patch_embed
        self.grid, self.patch, self.chans = embed.grid_size, embed.patch_size, embed.proj.in_channels
        self.prefix = vit.num_prefix_tokens
        self.register_buffer("index", None if keep is None else torch.tensor(keep), persistent=False)
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("weight", None, persistent=False)

    def freeze(self) -> None:
        """Precompute what depends on parameters alone, so that an exported graph holds it as a constant."""
        with torch.no_grad():
            self.table, self.weight = self.position_table(), self.patch_weight()

    def patch_weight(self) -> Tensor:
        """The convolution's weight as a matrix [C * ph * pw, D]."""
        weight: Tensor = self.vit[0].patch_embed.proj.weight
        return weight.reshape(weight.shape[0], -1).t().contiguous()

    def position_table(self) -> Tensor:
        """Table added to the tokens, [1, prefix + kept, D]: prefix tokens and position embeddings."""
        vit = self.vit[0]
        prefix = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = [token for token in prefix if token is not None]
        width = vit.embed_dim
        position = vit.pos_embed
        if position is None:
            position = vit.patch_embed.proj.weight.new_zeros(1, self.grid[0] * self.grid[1], width)
        first = position.shape[1] - self.grid[0] * self.grid[1]  # 0 if prefix tokens have no position (DeiT-3)
        patches = position[:, first:]
        if self.index is not None:
            patches = patches.index_select(1, self.index)
        if not prefix:
            return patches
        head = torch.cat(prefix, dim=1)
        return torch.cat([head + position[:, :first] if first else head, patches], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, prefix + kept, D]."""
        (gh, gw), (ph, pw) = self.grid, self.patch
        vit = self.vit[0]
        if images.shape[-2:] != (gh * ph, gw * pw):  # ignore the remainder if the stride does not divide the image
            images = images[..., : gh * ph, : gw * pw]
        patches = images.reshape(-1, self.chans, gh, ph, gw, pw).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, gh * gw, self.chans * ph * pw)
        if self.index is not None:
            patches = patches.index_select(1, self.index)
        weight = self.patch_weight() if self.weight is None else self.weight
        x = patches @ weight
        if vit.patch_embed.proj.bias is not None:
            x = x + vit.patch_embed.proj.bias
        x = vit.patch_embed.norm(x)
        # Zero rows plus a table rather than a concatenation: the class token need not be expanded to the batch.
        if self.prefix:
            x = F.pad(x, (0, 0, self.prefix, 0))
        x = x + (self.position_table() if self.table is None else self.table)
        return vit.norm_pre(x)


class ReducedBlock(nn.Module):
    """Transformer block under a plan: a gather at its input, a key bias, and a reducer between attention and MLP.

    Args:
        block: timm's Block or EvaBlock.
        index: Positions in the input sequence (prefix tokens included) to keep; None for all.
        key_bias: One attention logit per token; None for zero.
        step: Reducer between attention and MLP.
        proportional: Add the log of token sizes to the logits.
        carry_size: Track the token sizes that result from `step`.
        carry_positions: Track grid positions, for a later step.
    """

    index: Tensor | None
    key_bias: Tensor | None

    def __init__(
        self,
        block: nn.Module,
        index: tuple[int, ...] | None = None,
        key_bias: tuple[float, ...] | None = None,
        step: InnerStep | None = None,
        *,
        proportional: bool = False,
        carry_size: bool = False,
        carry_positions: bool = False,
    ) -> None:
        super().__init__()
        self.block = [block]
        self.statistics = None if step is None else CollectStatistics(step.needs, block.attn.num_heads)
        self.maps, self.theta = step is not None and needs_map(step), 1.0 if step is None else step.theta
        self.reduce = (
            None
            if step is None
            else Reduce(step, proportional=proportional, carry_size=carry_size, carry_positions=carry_positions)
        )
        self.attention_form: AttentionForm = "sdpa"
        self.register_buffer("index", None if index is None else torch.tensor(index), persistent=False)
        bias = None if key_bias is None else torch.tensor([key_bias], dtype=torch.float32)
        self.register_buffer("key_bias", bias, persistent=False)

    def forward(self, stream: Stream) -> Stream:
        """[B, N, D] -> [B, kept, D]."""
        block = self.block[0]
        if self.index is not None:  # static steps precede all others: no sizes or per-image positions yet
            stream = replace(stream, x=stream.x.index_select(1, self.index))
        out, statistics = self._attend(block.norm1(stream.x), self._bias(stream))
        stream = replace(stream, x=stream.x + self._scale(out, 1))
        if self.reduce is not None:
            assert statistics is not None
            stream = self.reduce(stream, statistics)
        x = stream.x
        return replace(stream, x=x + self._scale(block.mlp(block.norm2(x)), 2))

    def _bias(self, stream: Stream) -> Tensor | None:
        """Bias of the attention logits, float32 [1 or B, N]."""
        if stream.log_size is None:
            return self.key_bias
        return stream.log_size if self.key_bias is None else stream.log_size + self.key_bias

    def _attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionStatistics | None]:
        """Output of the attention [B, N, D], and the statistics that the reducer needs."""
        layer = self.block[0].attn
        heads, width, tokens = layer.num_heads, layer.head_dim, x.shape[1]
        separate = layer.qkv is None  # separate projections of EVA-02
        if self.attention_form == "packed" and not self.maps:
            q, k, v = (
                (project(x) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
                if separate
                else qkv_of(layer, x).split(heads * width, dim=-1)
            )
            q, k = (_norm_heads(norm, t, heads, width) for norm, t in ((layer.q_norm, q), (layer.k_norm, k)))
            statistics = None if self.statistics is None else self.statistics(q, k, v, bias)
            out = packed_attention(q, k, v, heads, bias)
        else:
            if separate:
                q, k, v = (
                    project(x).reshape(-1, tokens, heads, width).transpose(1, 2)
                    for project in (layer.q_proj, layer.k_proj, layer.v_proj)
                )
            else:
                q, k, v = qkv_of(layer, x).reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = layer.q_norm(q), layer.k_norm(k)
            weights = attention_map(q, k, bias, self.theta) if self.maps else None
            statistics = None if self.statistics is None else self.statistics(q, k, v, bias, weights)
            if weights is None:
                out = attention(q, k, v, bias, self.attention_form)
            else:
                out = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(-1, tokens, heads * width)
        out = layer.norm(out)
        if layer.gate is not None:
            out = out * layer.gate(x).sigmoid()
        return layer.proj(out), statistics

    def _scale(self, x: Tensor, which: int) -> Tensor:
        block = self.block[0]
        if isinstance(block, EvaBlock):
            gamma = block.gamma_1 if which == 1 else block.gamma_2
            return x if gamma is None else x * gamma
        scale = block.ls1 if which == 1 else block.ls2
        return x * scale.gamma if isinstance(scale, LayerScale) else x

    def fold_scales(self) -> None:
        """Fold LayerScale into the preceding projection. Modifies the timm block, so use it on a copy only."""
        block = self.block[0]
        eva = isinstance(block, EvaBlock)
        pairs = ((block.attn.proj, "gamma_1", "ls1"), (block.mlp.fc2, "gamma_2", "ls2"))
        with torch.no_grad():
            for linear, eva_name, name in pairs:
                scale = getattr(block, eva_name if eva else name)
                gamma = scale if eva else getattr(scale, "gamma", None)
                if gamma is None:
                    continue
                linear.weight.mul_(gamma[:, None])
                if linear.bias is not None:
                    linear.bias.mul_(gamma)
                setattr(block, eva_name if eva else name, None if eva else nn.Identity())


class Reduce(nn.Module):
    """Applies a step between attention and MLP. A module, so that its nodes carry its name in an exported graph.

    Args:
        step: Chooses tokens per image.
        proportional: Compute log sizes for the logits of later attentions.
        carry_size: Track token sizes.
        carry_positions: Track grid positions.
    """

    def __init__(self, step: InnerStep, *, proportional: bool, carry_size: bool, carry_positions: bool) -> None:
        super().__init__()
        self.step, self.proportional = step, proportional
        self.carry_size, self.carry_positions = carry_size, carry_positions

    def forward(self, stream: Stream, statistics: AttentionStatistics) -> Stream:
        """[B, N, D] -> [B, N', D]."""
        chosen = self.step.choose(stream, statistics)
        if not self.carry_positions:
            stream = replace(stream, positions=None)
        stream = reduce_tokens(stream, chosen, carry_size=self.carry_size)
        if self.proportional and stream.size is not None:
            stream = replace(stream, log_size=stream.size.log())
        return stream


class PoolAndHead(nn.Module):
    """Pooling and classifier: sequence to logits (or to pooled features if the model has no classes).

    Args:
        vit: The timm model.
        include_prefix: Whether pooling includes the prefix tokens (ModelSpec.pool_include_prefix).
        by_size: Weight tokens by size in averages, if they have sizes.
    """

    def __init__(self, vit: nn.Module, include_prefix: bool, *, by_size: bool = True) -> None:
        super().__init__()
        self.vit = [vit]
        self.prefix = vit.num_prefix_tokens
        self.include_prefix, self.by_size = include_prefix, by_size
        self.distilled = getattr(vit, "head_dist", None) is not None

    def forward(self, x: Tensor, size: Tensor | None = None, *, proportional: bool = False) -> Tensor:
        """[B, N, D] -> [B, classes] (or [B, D]).

        Args:
            size: float32 [B, N], number of patches in each token; weights of averages.
            proportional: Add log(size) to the logits of attention pooling.
        """
        vit = self.vit[0]
        if self.distilled:  # as timm's forward_head: mean of the two classifiers
            x = vit.norm(x[:, :2])
            return (vit.head(x[:, 0]) + vit.head_dist(x[:, 1])) / 2
        if vit.attn_pool is None and vit.global_pool == "token":
            x = vit.norm(x[:, 0])  # the norm is per token, so other tokens need none
        else:
            x = vit.norm(x)
            first = 0 if self.include_prefix else self.prefix
            x, size = x[:, first:], None if size is None else size[:, first:]
            if vit.attn_pool is not None:
                x = self._attention_pool(x, size.log() if proportional and size is not None else None)
            else:
                x = _pool(x, vit.global_pool, size if self.by_size else None)
        return vit.head(vit.fc_norm(x))

    def _attention_pool(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """timm's AttentionPoolLatent. One query per head: plain matrix products with a constant query."""
        pool = self.vit[0].attn_pool
        heads, width, tokens = pool.num_heads, pool.head_dim, x.shape[1]
        q = pool.q_norm(pool.q(pool.latent).reshape(1, pool.latent_len, heads, width).transpose(1, 2))
        k, v = pool.kv(x).reshape(-1, tokens, 2, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * width**-0.5) @ pool.k_norm(k).transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[:, None, None, :].to(logits.dtype)
        weights = torch.softmax(logits, dim=-1)
        x = pool.proj((weights @ v).transpose(1, 2).reshape(-1, pool.latent_len, heads * width))
        if pool.mlp is not None:
            x = x + pool.mlp(pool.norm(x))
        if pool.pool == "token":
            return x[:, 0]
        return x.mean(1) if pool.pool == "avg" else x


def qkv_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Projection to queries, keys and values, [B, N, D] -> [B, N, 3 * H * d]."""
    bias = layer.qkv.bias
    if getattr(layer, "q_bias", None) is not None:  # EVA: the key has no bias
        bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    return F.linear(x, layer.qkv.weight, bias)


def _norm_heads(norm: nn.Module, x: Tensor, heads: int, width: int) -> Tensor:
    """Apply a per-head norm to [B, N, H * d]."""
    if isinstance(norm, nn.Identity):
        return x
    return norm(x.reshape(-1, x.shape[1], heads, width)).reshape(-1, x.shape[1], heads * width)


def _pool(x: Tensor, kind: str, size: Tensor | None) -> Tensor:
    """Average (weighted by size) or maximum over tokens."""
    if kind == "max":
        return x.amax(dim=1)
    if size is None:
        mean = x.mean(dim=1)
    else:
        share = size / size.sum(dim=1, keepdim=True)
        mean = (share.to(x.dtype)[:, None, :] @ x).squeeze(1)
    return mean if kind == "avg" else 0.5 * (x.amax(dim=1) + mean)
