"""Exact multiply-accumulates (MACs) of a ViT, dense or under a plan.

Counted: every matrix product (patch embedding, qkv, logits, weighted sum, projection, MLP, pooling, head). A block that
n tokens enter and n' leave costs 4 n d^2 + 2 n^2 d + 8 n' d^2 at MLP ratio 4. Not counted: norms, softmax, activations,
gathers. torch.utils.flop_counter counts the same products (as 2 FLOPs each); a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan.plan import BlockTokens, ReductionPlan


@dataclass(frozen=True)
class MacCount:
    """MACs per image, by part."""

    patch_embed: int
    blocks: tuple[int, ...]
    head: int

    @property
    def total(self) -> int:
        return self.patch_embed + sum(self.blocks) + self.head


def count_macs(model: ModelSpec, plan: ReductionPlan | None = None) -> MacCount:
    """MACs per image of the dense model, or of the model under a plan."""
    dense = model.prefix_tokens + model.patches
    tokens: Sequence[BlockTokens]
    tokens = plan.tokens() if plan else [BlockTokens(dense, dense, None)] * model.depth
    first = plan.steps_at(0, "input") if plan else None
    embedded = tokens[0].attention - model.prefix_tokens if first else model.patches
    blocks = tuple(
        row.attention * block.attention_linear
        + 2 * row.attention**2 * block.attention_width
        + row.mlp * block.mlp_linear
        for row, block in zip(tokens, model.blocks, strict=True)
    )
    pooled = tokens[-1].mlp - (0 if model.pool_include_prefix else model.prefix_tokens)
    fixed, per_token = model.head_macs
    return MacCount(embedded * model.patch_embed_macs, blocks, fixed + pooled * per_token)


def mac_ratio(model: ModelSpec, plan: ReductionPlan) -> float:
    """Dense MACs divided by reduced MACs: the theoretical speed-up."""
    return count_macs(model).total / count_macs(model, plan).total
