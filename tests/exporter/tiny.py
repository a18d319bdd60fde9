"""Small ViTs of every supported kind, and random plans for them."""

from __future__ import annotations

import numpy as np
import timm
import torch
import torch.nn as nn

from vp_exporter.model.describe import describe
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.masks import plan_from_mask

# id -> (timm name, arguments): each differs from the others in something that ReducedViT must handle.
KINDS: dict[str, tuple[str, dict]] = {
    "class-token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layerscale-no-embed-class": ("deit3_small_patch16_224", {}),
    "average-pool": ("vit_medium_patch16_gap_256", {}),
    "average-pool-fc-norm-class-token": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "map-pool": ("vit_base_patch16_siglip_224", {}),
    "registers-swiglu": ("vit_giant_patch14_dinov2", {"reg_tokens": 4, "no_embed_class": True, "mlp_ratio": 2.0}),
    "clip-pre-norm": ("vit_base_patch16_clip_quickgelu_224", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "rms-norm-swiglu": ("aimv2_large_patch14_224", {}),
    "eva": ("eva_giant_patch14_224", {"mlp_ratio": 2.0}),
    "features": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "max-pool": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
}
DEPTH = 4


def tiny_vit(
    kind: str = "class-token", seed: int = 0, heads: int = 4, depth: int = DEPTH
) -> tuple[nn.Module, ModelSpec]:
    """A 4-block (or `depth`), 64-wide model of 4x4 or 5x5 patches with parameters far from their initial values.

    Fresh models have zero biases, unit norms and LayerScales of 1e-5, which could hide a missing term.
    """
    name, extra = KINDS[kind]
    args = {"depth": depth, "embed_dim": 64, "num_heads": heads, "img_size": 64, "patch_size": 16, **extra}
    if "no_embed_class" in extra:
        args["img_size"] = 80
    if "num_classes" not in args and kind not in ("map-pool", "rms-norm-swiglu"):
        args["num_classes"] = 7
    torch.manual_seed(seed)
    model = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.08))
    return model, describe(model, name)


def random_mask(model: PlanModel, seed: int = 0, *, scales: bool = False, first: bool = True) -> np.ndarray:
    """A mask that drops patches at blocks 0 (if `first`), 1 and 3; with `scales` the kept ones are scaled."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(model.patches)
    mask = np.ones((model.depth, model.patches))
    for block, share in ((0, 0.25 if first else 0.0), (1, 0.4), (3, 0.6)):
        mask[block:, order[: int(share * model.patches)]] = 0
    return mask * rng.uniform(0.3, 3.0, mask.shape) if scales else mask


def random_plan(model: PlanModel, seed: int = 0, *, scales: bool = False, first: bool = True) -> ReductionPlan:
    """`random_mask` as a plan."""
    return plan_from_mask(random_mask(model, seed, scales=scales, first=first), model)
