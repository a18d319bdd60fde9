"""Block of a reduced model on the vp operators (vp_kernels), as run on CUDA.

Differs from `block.ReducedBlock` only in the number of passes over the tokens:

- attention reads the projection's output in place, and returns the scores in the same pass;
- kept rows are gathered, added to the attention's output and normalised in one pass;
- a reducer with an operator of its own (`InnerStep.fused`) is one or two launches; all others choose as in the portable
  form, and merge in one launch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.errors import UnsupportedModelError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers import InnerStep, ops
from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap, reduce_tokens, sizes_without_merge
from vp_exporter.rewrite import operators
from vp_exporter.rewrite.attention_statistics import attention_map, graph_score
from vp_exporter.rewrite.block import ReducedBlock, qkv_of

HEAD_DIMS = (32, 64, 80, 96, 128)  # of vp::attention; a test checks this against vp_kernels
MAX_TOKENS = 1024


def check_kernels(description: ModelSpec, head_dim: int) -> None:
    """Check that the operators support a model.

    Raises:
        UnsupportedModelError: naming what they support.
    """
    tokens = description.prefix_tokens + description.patches
    if head_dim not in HEAD_DIMS:
        raise UnsupportedModelError(
            f"{description.name} has heads of {head_dim} channels",
            expected=f"{', '.join(map(str, HEAD_DIMS))} for the vp kernels",
            fix="use `kernels=portable`",
        )
    if tokens > MAX_TOKENS:
        raise UnsupportedModelError(
            f"{description.name} has {tokens} tokens",
            expected=f"at most {MAX_TOKENS} for the vp kernels",
            fix="use `kernels=portable`",
        )


class FusedBlock(ReducedBlock):
    """`ReducedBlock` on the vp operators; same arguments."""

    fused_reduce: FusedReduce | None

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
        super().__init__(block, index, key_bias)
        self.needs, self.theta = (frozenset(), 1.0) if step is None else (step.needs, step.theta)
        self.maps = self.theta < 1
        self.fused_reduce = (
            None
            if step is None
            else FusedReduce(step, proportional=proportional, carry_size=carry_size, carry_positions=carry_positions)
        )

    def forward(self, stream: Stream) -> Stream:
        """[B, N, D] -> [B, kept, D]."""
        block = self.block[0]
        if self.index is None:
            normed = block.norm1(stream.x)
        else:
            x, normed = gather_and_norm(stream.x, self.index, block.norm1)
            stream = replace(stream, x=x)
        out, statistics = self._attend_packed(normed, self._bias(stream))
        out = self._scale(out, 1)
        if self.fused_reduce is None:
            stream = replace(stream, x=stream.x + out)
            normed = block.norm2(stream.x)
        else:
            stream, normed = self.fused_reduce(stream, out, statistics, block.norm2)
        return replace(stream, x=stream.x + self._scale(block.mlp(normed), 2))

    def _attend_packed(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionStatistics]:
        """Output of the attention [B, N, D], and its statistics."""
        layer = self.block[0].attn
        heads, width, tokens = layer.num_heads, layer.head_dim, x.shape[1]
        if layer.qkv is None:  # separate projections of EVA-02
            parts = [
                project(x).reshape(-1, tokens, heads, width) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
            ]
            qkv = torch.stack(parts, dim=2)
        else:
            qkv = qkv_of(layer, x).reshape(-1, tokens, 3, heads, width)
        if not (isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity)):
            q, k, v = qkv.unbind(2)
            qkv = torch.stack((layer.q_norm(q), layer.k_norm(k), v), dim=2)
        needs, weights = self.needs, None
        if "graph_score" in needs or self.theta < 1:
            weights = attention_map(qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2), bias, self.theta)
        if weights is not None and self.theta < 1:  # no operator omits entries of the map
            v = qkv[:, :, 2].transpose(1, 2)
            out = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(-1, tokens, heads * width)
            row = weights[:, :, 0].mean(dim=1)
        else:
            out, row = operators.attention(qkv, bias, "class" if "class_attention" in needs else "none")
        out = layer.norm(out)
        if layer.gate is not None:
            out = out * layer.gate(x).sigmoid()
        statistics = AttentionStatistics(
            class_attention=row,
            value_norm=ops.norm(qkv[:, :, 2].flatten(2)) if "value_norm" in needs else None,
            graph_score=graph_score(weights) if weights is not None and "graph_score" in needs else None,
            head_keys=qkv[:, :, 1] if "keys" in needs else None,
        )
        return layer.proj(out), statistics


class FusedReduce(nn.Module):
    """Applies a step in a `FusedBlock`, from the attention's output to the MLP's input; arguments as for `Reduce`."""

    def __init__(self, step: InnerStep, *, proportional: bool, carry_size: bool, carry_positions: bool) -> None:
        super().__init__()
        self.step, self.proportional = step, proportional
        self.carry_size, self.carry_positions = carry_size, carry_positions

    def forward(
        self, stream: Stream, out: Tensor, statistics: AttentionStatistics, norm: nn.Module
    ) -> tuple[Stream, Tensor]:
        """Add the attention's output, reduce, normalise.

        Args:
            stream: Input of the attention, [B, N, D].
            out: Output of the attention, [B, N, D].
            statistics: With `head_keys` in place of `keys`.
            norm: The norm that follows.

        Returns:
            The reduced stream, [B, N', D], and its normalised tokens.
        """
        added = replace(stream, x=stream.x + out)
        # Tracking grid positions takes an index map, which a fused operator does not return.
        found = (
            None if self.carry_positions else self.step.fused(added, statistics, operators, carry_size=self.carry_size)
        )
        if found is None:
            if statistics.head_keys is not None:
                statistics = replace(statistics, keys=statistics.head_keys.float().sum(dim=2))
            found = self.step.choose(added, statistics)
        if not self.carry_positions:
            stream, added = replace(stream, positions=None), replace(added, positions=None)
        normed: Tensor | None = None
        if isinstance(found, Stream):
            new = replace(found, positions=None)
        elif found.merge is None and found.propagation is None:
            new, normed = self._keep(stream, out, added.x, found, norm)
        else:
            new = reduce_tokens(added, found, carry_size=self.carry_size, merge=operators.merge_rows)
        if not self.carry_size:
            new = replace(new, size=None)
        if self.proportional and new.size is not None:
            new = replace(new, log_size=new.size.log())
        return new, norm(new.x) if normed is None else normed

    def _keep(
        self, stream: Stream, out: Tensor, added: Tensor, chosen: TokenMap, norm: nn.Module
    ) -> tuple[Stream, Tensor]:
        """Keep rows and append new ones, without merging into kept rows."""
        extra = chosen.extra
        if chosen.pool is not None:
            extra = chosen.pool.rows.to(added.dtype) @ ops.take_rows(added, chosen.pool.source)
        x, normed = gather_and_norm(stream.x, chosen.keep, norm, out, extra)
        return sizes_without_merge(stream, x, chosen, carry_size=self.carry_size), normed


def gather_and_norm(
    x: Tensor, index: Tensor, norm: nn.Module, residual: Tensor | None = None, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gather rows of x (+ residual), append extra, normalise: one operator if the norm is a LayerNorm."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm) and weight is not None and bias is not None:
        return operators.gather_norm(x, index, weight, bias, float(norm.eps), residual, extra)
    x = x if residual is None else x + residual
    kept = x.index_select(1, index) if index.ndim == 1 else ops.take_rows(x, index)
    if extra is not None:
        kept = torch.cat([kept, extra], dim=1)
    return kept, norm(kept)
