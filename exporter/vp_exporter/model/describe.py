"""Supported timm Vision Transformers, and the reason for each unsupported one.

The forward pass is rewritten, so all of it must be known. A class is supported only if it is exactly a known class
(`type(x) is`), because a subclass may compute something else. Subclasses are accepted if the module is checked
numerically afterwards (`vp_exporter.rewrite.equivalence`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
from timm.layers import Attention, AttentionPoolLatent, GluMlp, LayerScale, Mlp, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer

from vp_exporter.errors import UnsupportedModelError
from vp_exporter.model.spec import BlockMacs, ModelSpec

POOLS = ("token", "avg", "avgmax", "max", "map")


def describe(model: nn.Module, name: str, *, subclasses: bool = False) -> ModelSpec:
    """Describe a timm model.

    Args:
        subclasses: Treat subclasses of a known class like that class.

    Raises:
        UnsupportedModelError: with the reason.
    """
    reason = refusal(model, subclasses=subclasses)
    if reason:
        raise UnsupportedModelError(
            f"{name} cannot be reduced: {reason}", expected="a plain ViT", fix="docs/models.md lists what is supported"
        )
    vit = model
    embed: PatchEmbed = vit.patch_embed
    distilled = isinstance(vit, VisionTransformerDistilled)
    patch_macs = embed.proj.weight.numel()
    head_fixed = _linear_macs(vit.head) + _linear_macs(getattr(vit, "head_dist", None))
    head_per_token = 0
    if vit.attn_pool is not None:
        pool: AttentionPoolLatent = vit.attn_pool
        head_fixed += pool.latent_len * (_linear_macs(pool.q) + _linear_macs(pool.proj) + _linear_macs(pool.mlp))
        head_per_token = _linear_macs(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
    return ModelSpec(
        name=name,
        image_size=tuple(embed.img_size),
        patch_size=tuple(embed.patch_size),
        grid=tuple(embed.grid_size),
        in_chans=embed.proj.in_channels,
        prefix_tokens=vit.num_prefix_tokens,
        class_token=vit.cls_token is not None,
        distilled=distilled,
        register_tokens=vit.num_prefix_tokens - int(vit.cls_token is not None) - int(distilled),
        embed_dim=vit.embed_dim,
        num_heads=vit.blocks[0].attn.num_heads,
        pool=vit.global_pool,
        # Eva's attention pooling includes the prefix tokens; VisionTransformer has an attribute for it.
        pool_include_prefix=vit.attn_pool is not None if isinstance(vit, Eva) else vit.pool_include_prefix,
        num_classes=vit.num_classes,
        blocks=tuple(
            BlockMacs(
                _linear_macs(block.attn),
                _linear_macs(block.mlp),
                block.attn.num_heads * block.attn.head_dim,
            )
            for block in vit.blocks
        ),
        patch_embed_macs=patch_macs,
        head_macs=(head_fixed, head_per_token),
    )


def refusal(model: nn.Module, *, subclasses: bool = False) -> str | None:
    """Why a timm model is not supported, as a short phrase, or None. `subclasses` as for `describe`."""

    def known(part: object, *kinds: type) -> bool:
        return isinstance(part, kinds) if subclasses else type(part) in kinds

    if not known(model, VisionTransformer, VisionTransformerDistilled, Eva):
        return f"its class {type(model).__name__} is not a plain ViT"
    if not known(model.patch_embed, PatchEmbed):
        return f"its patch embedding {type(model.patch_embed).__name__} is a network of its own"
    embed = model.patch_embed
    if embed.dynamic_img_pad and any(
        side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)
    ):
        return "its patch embedding pads the image to whole patches"
    if getattr(model, "rope", None) is not None:
        return "it has rotary position embeddings"
    if model.global_pool not in POOLS:
        what = "no pooling" if not model.global_pool else f"the pooling {model.global_pool!r}"
        return f"it has {what}, which needs every patch"
    if model.attn_pool is not None:
        pool = model.attn_pool
        if not known(pool, AttentionPoolLatent) or pool.pos_embed is not None:
            return f"its attention pooling {type(pool).__name__} is not a latent query"
    return next((reason for block in model.blocks if (reason := _block_refusal(block, known))), None)


def _block_refusal(block: nn.Module, known: Callable[..., bool]) -> str | None:
    if known(block, Block):
        known_attention = known(block.attn, Attention)
        strange = [scale for scale in (block.ls1, block.ls2) if not known(scale, LayerScale, nn.Identity)]
        if strange:
            return f"its blocks scale with {type(strange[0]).__name__}"
    elif known(block, EvaBlock):
        known_attention = known(block.attn, EvaAttention)
    else:
        return f"its block {type(block).__name__} is not the standard one"
    if not known_attention:
        return f"its attention {type(block.attn).__name__} is not the standard one"
    if not known(block.mlp, Mlp, GluMlp, SwiGLU):
        return f"its MLP {type(block.mlp).__name__} is not the standard one"
    return None


def _linear_macs(module: nn.Module | None) -> int:
    """Multiply-accumulates per token in the linear layers of a module."""
    if module is None:
        return 0
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
