"""Description of a model by sizes and counts, without a module or weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockMacs:
    """Multiply-accumulates of one block.

    Per token in the attention's linear layers, per token in the MLP, and the width w of the attention, which costs
    2 * tokens^2 * w (logits and weighted sum).
    """

    attention_linear: int
    mlp_linear: int
    attention_width: int


@dataclass(frozen=True)
class ModelSpec:
    """Description of a ViT, as returned by `vp_exporter.model.describe.describe`.

    Attributes:
        name: timm's name; for a module not created by timm, the name of its class.
        image_size, patch_size, grid: Height and width, in pixels and in patches.
        prefix_tokens: Number of class, distillation and register tokens, always first in the sequence.
        pool: "token", "avg", "avgmax", "max" or "map".
        num_classes: 0 for a feature extractor.
        blocks: MACs of each block.
        patch_embed_macs: MACs per embedded patch.
        head_macs: (fixed, per pooled token) MACs of pooling and head.
        named: Whether `name` is timm's. If not, plans are only checked against the sizes.
    """

    name: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    in_chans: int
    prefix_tokens: int
    class_token: bool
    distilled: bool
    register_tokens: int
    embed_dim: int
    num_heads: int
    pool: str
    pool_include_prefix: bool
    num_classes: int
    blocks: tuple[BlockMacs, ...]
    patch_embed_macs: int
    head_macs: tuple[int, int]
    named: bool = True

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]
