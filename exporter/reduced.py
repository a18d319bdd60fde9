"""ReducedViT: a timm ViT that runs a reduction plan over its own parameters."""

from __future__ import annotations

import copy
from typing import Literal, Self

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.attention import AttentionForm
from vp_exporter.blocks import PatchEmbedding, PoolAndHead, ReducedBlock
from vp_exporter.models import ViTDescription
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers import StaticStep, Tokens

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ReducedViT(nn.Module):
    """A ViT under a plan; with no plan, the dense model in the same form (the baseline that it is compared with).

    It holds no parameters of its own: training or loading `vit` changes it too. For a plan with static steps it
    equals the dense model in which removed tokens are masked out of every later attention.

    Args:
        vit: the timm model, in eval mode.
        description: of that model (vp_exporter.models.describe).
        plan: what to drop where.

    Raises:
        PlanError: the plan is for another model.
    """

    def __init__(self, vit: nn.Module, description: ViTDescription, plan: ReductionPlan | None = None) -> None:
        super().__init__()
        if plan is not None:
            plan.check_model(description)
        self.vit = vit.eval()
        self.description, self.plan = description, plan
        self._build()

    def _build(self) -> None:
        plan, prefix = self.plan, self.description.prefix_tokens
        blocks, keep = [], None
        alive = Tokens(prefix, self.description.patches, tuple(range(self.description.patches)))
        for number, block in enumerate(self.vit.blocks):
            step = plan.steps_at(number, "input") if plan else None
            bias = plan.key_bias.get(number) if plan else None
            index = None
            if step is not None:
                assert isinstance(step, StaticStep)  # the only reducer that acts on a block's input
                if number == 0:
                    keep = step.keep
                else:
                    index = (*range(prefix), *(prefix + at for at in step.local_index(alive)))
                alive = step.apply(alive)
            blocks.append(ReducedBlock(block, index, bias))
        self.embed = PatchEmbedding(self.vit, keep)
        self.blocks = nn.ModuleList(blocks)
        self.head = PoolAndHead(self.vit, self.description.pool_include_prefix)

    @property
    def output_name(self) -> Literal["logits", "features"]:
        """What `forward` returns."""
        return "logits" if self.description.num_classes else "features"

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: float32 [B, C, H, W], preprocessed.

        Returns:
            float32 [B, classes], or [B, embed_dim] pooled features where the model has no classes; float32 whatever
            the precision of the weights, so that every engine has the same signature.
        """
        x = self.embed(images.to(self.vit.patch_embed.proj.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()

    def block_tokens(self, images: Tensor) -> list[Tensor]:
        """The tokens [B, N_b, D] that leave each block, in order (for checks and for studies)."""
        x, rows = self.embed(images.to(self.vit.patch_embed.proj.weight.dtype)), []
        for block in self.blocks:
            x = block(x)
            rows.append(x)
        return rows

    def for_export(self, precision: str = "fp32", form: AttentionForm = "sdpa") -> Self:
        """A copy that is ready to lower: weights cast, LayerScale folded, constants computed in fp32 beforehand.

        Args:
            precision: "fp32", "fp16" or "bf16".
            form: how attention is written (vp_exporter.attention).
        """
        twin = type(self)(copy.deepcopy(self.vit).float(), self.description, self.plan)
        for block in twin.blocks:
            block.fold_scales()
            block.attention_form = form
        twin.embed.freeze()
        twin.requires_grad_(False)
        return twin.to(DTYPES[precision])
