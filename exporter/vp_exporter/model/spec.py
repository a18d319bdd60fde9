"""What the rest of the exporter knows of a model: sizes and counts, no module and no weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockMacs:
    """Multiply-accumulates of one block: per token in the attention's linear layers, per token in the MLP, and the
    width w of the attention, which costs 2 * tokens^2 * w (logits and weighted sum)."""

    attention_linear: int
    mlp_linear: int
    attention_width: int


@dataclass(frozen=True)
class ModelSpec:
    """A ViT in numbers, as `vp_exporter.model.describe.describe` finds it.

    Attributes:
        name: timm's; of a module that timm did not create, its class's.
        image_size, patch_size, grid: height and width, in pixels and in patches.
        prefix_tokens: class token, distillation token and register tokens together, always first in the sequence.
        pool: "token", "avg", "avgmax", "max" or "map".
        num_classes: 0 for a feature extractor.
        blocks: MACs of each block.
        patch_embed_macs: per embedded patch.
        head_macs: (fixed, per pooled token) MACs of pooling and head.
        named: whether `name` is timm's. Where it is not, a plan is held to the sizes alone.
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
