"""`build_plan`: make a plan with a named method. `reduce`: apply a plan to a PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vp_exporter.api import models

if TYPE_CHECKING:
    import os

    import numpy as np

    from vp_exporter.methods import MethodRequest
    from vp_exporter.model.spec import ModelSpec
    from vp_exporter.plan import ReductionPlan
    from vp_exporter.rewrite.reduced_vit import ReducedViT

    PlanLike: TypeAlias = ReductionPlan | MethodRequest | np.ndarray | str | os.PathLike[str]


def build_plan(
    method: str,
    model: models.ModelLike | str,
    *,
    target_macs: float | None = None,
    r: int | Sequence[int] | None = None,
    keep_rate: float | None = None,
    preset: str | None = None,
    schedule: Literal["constant", "decreasing", "increasing"] | None = None,
    blocks: Sequence[int] | None = None,
    tau: float | None = None,
    seed: int | None = None,
    proportional_attention: bool | None = None,
    backbone: str | None = None,
    **method_args: Any,
) -> ReductionPlan:
    """Make a plan with a named method. The model is not run: only token counts and MACs are computed.

    Set the amount to remove by exactly one argument: `target_macs`, `r`, `keep_rate`, `preset`, or a list that the
    method accepts, e.g. `tokens_out`.

    Args:
        method: "tome", "ppt", "evit", "topk", "bat", "diffrate", "pitome", "gtp"; or a static mask: "random", "grid",
            "center".
        model: A timm ViT (`torch.nn.Module`), a `ModelRequest`, or a timm name.
        target_macs: Share of the dense model's MACs, between 0 and 1.
        r: Tokens to remove per block: one number for all acting blocks, or one for each.
        keep_rate: Share of the patch tokens that each stage keeps, between 0 and 1.
        preset: Published setting of the method, e.g. "evit-0.7".
        schedule: Shape of `r` over the blocks: "constant" (default), "decreasing" (2r to 0) or "increasing".
        blocks: Blocks where the method acts, 0-based and ascending; by default as in its paper.
        tau: For ppt: variance of the scores from which an image is pruned rather than pooled.
        seed: Seed of method "random".
        proportional_attention: Add log(token size) to the attention logits; by default as in the method's paper.
        backbone: Attribute path to the ViT inside `model`, e.g. "model.encoder".
        **method_args: Arguments of the method itself, e.g. `fuse=False` (evit) or `clusters=20` (bat).

    Returns:
        A plan with fixed token counts per block; write it with `plan.save("plan.json")`.

    Raises:
        VpError: if the method is unknown or arguments conflict.
        PlanError: if the amount does not fit the model; names the block and the limit.
        UnsupportedModelError: if the model is not supported.

    Examples:
        >>> import timm, vp_exporter as vp
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4)
        >>> plan = vp.build_plan("tome", vit, target_macs=0.65)
        >>> [row.attention for row in plan.tokens()]
        [17, 14, 11, 8]
    """
    from vp_exporter.methods import MethodRequest
    from vp_exporter.methods import build_plan as make

    request = MethodRequest(
        method=method,
        preset=preset,
        r=r if r is None or isinstance(r, int) else tuple(r),
        schedule=schedule,
        blocks=None if blocks is None else tuple(blocks),
        keep_rate=keep_rate,
        tau=tau,
        target_macs=target_macs,
        seed=seed,
        proportional_attention=proportional_attention,
        args=method_args,
    )
    return make(request, models.describe(model, backbone))


def reduce(
    model: models.ModelLike,
    plan: PlanLike | None,
    *,
    backbone: str | None = None,
    kernels: Literal["portable", "vp"] = "portable",
) -> ReducedViT:
    """Apply a plan to a model, for study or fine-tuning. The returned PyTorch module shares the model's parameters.

    Args:
        model: A timm ViT (`torch.nn.Module`), put into eval mode; or a `ModelRequest`.
        plan: A `ReductionPlan`; the path of a plan (.json) or a mask (.npy, .npz, .safetensors); a mask
            [depth, patches]; or None for the dense model in the same form.
        backbone: Attribute path to the ViT inside `model`, e.g. "model.encoder".
        kernels: "portable" uses torch's operations, "vp" the operators of vp_kernels.

    Returns:
        A module that maps preprocessed images, float32 [batch, 3, height, width], to logits, float32 [batch, classes].

    Raises:
        PlanError: if the plan cannot be read or is for another model.
        UnsupportedModelError: if the model is not supported, or does not compute what timm's class computes.

    Examples:
        >>> import timm, torch, vp_exporter as vp
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5)
        >>> reduced = vp.reduce(vit, vp.build_plan("evit", vit, keep_rate=0.7))
        >>> reduced(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """
    import torch.nn as nn

    from vp_exporter.model.own_module import describe_module, find_vit
    from vp_exporter.rewrite.reduced_vit import ReducedViT

    loaded = models.take(model, backbone, models.progress_of(None))
    vit, spec = loaded.vit, loaded.description
    if isinstance(model, nn.Module):  # the copy was only for the check
        vit = find_vit(model, backbone)
        spec = describe_module(vit)
    return ReducedViT(vit, spec, None if plan is None else resolve(plan, spec), kernels)


def resolve(plan: PlanLike, spec: ModelSpec) -> ReductionPlan:
    """Read or make the plan for a model.

    Raises:
        PlanError: if it cannot be read, is inconsistent or is for another model.
    """
    from vp_exporter.methods import MethodRequest
    from vp_exporter.methods import build_plan as make
    from vp_exporter.plan.files import plan_of

    return make(plan, spec) if isinstance(plan, MethodRequest) else plan_of(plan, spec)
