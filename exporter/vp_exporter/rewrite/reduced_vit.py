"""ReducedViT: a timm ViT that runs a reduction plan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers import InnerStep, StaticStep, Tokens, ops
from vp_exporter.reducers.graph import TokenGraph, code_index
from vp_exporter.reducers.stream import Stream
from vp_exporter.rewrite.attention import AttentionForm
from vp_exporter.rewrite.block import PatchEmbedding, PoolAndHead, ReducedBlock
from vp_exporter.rewrite.fused_block import FusedBlock, check_kernels

Kernels = Literal["portable", "vp"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ReducedViT(nn.Module):
    """A ViT under a plan; without a plan, the dense model in the same form (the baseline for comparisons).

    Has no parameters of its own: training or loading `vit` affects it too. With static steps it equals the dense model
    with the removed tokens masked out of every later attention.

    Args:
        vit: The timm model, in eval mode.
        description: Description of that model (vp_exporter.model.describe.describe).
        plan: What to remove where.
        kernels: "portable" uses standard torch operations, "vp" the operators of vp_kernels.

    Raises:
        PlanError: if the plan is for another model.
        UnsupportedModelError: if the vp operators do not support the model's heads.

    Examples:
        >>> import timm, torch, vp_exporter as vp
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
        >>> reduced = vp.reduce(vit, vp.build_plan("tome", vit, r=4))
        >>> [tokens.shape[1] for tokens in reduced.block_tokens(torch.zeros(1, 3, 64, 64))]
        [13, 9]
    """

    places: Tensor | None
    code_index: Tensor | None

    def __init__(
        self,
        vit: nn.Module,
        description: ModelSpec,
        plan: ReductionPlan | None = None,
        kernels: Kernels = "portable",
    ) -> None:
        super().__init__()
        if plan is not None:
            plan.check_model(description)
        self.vit = vit.eval()
        self.description, self.plan, self.kernels = description, plan, kernels
        if kernels == "vp":
            check_kernels(description, vit.blocks[0].attn.head_dim)
        self._build()

    def _build(self) -> None:
        plan, prefix = self.plan, self.description.prefix_tokens
        blocks, keep = [], None
        alive = Tokens(prefix, self.description.patches, tuple(range(self.description.patches)))
        inner = [step for step in plan.steps if isinstance(step, InnerStep)] if plan else []
        self.proportional = plan is not None and plan.proportional_attention
        carry_size = self.proportional or any(step.carries_size for step in inner)
        places: list[int] | None = None
        last_tracked = max((step.block for step in inner if "positions" in step.needs), default=-1)
        block_of = FusedBlock if self.kernels == "vp" else ReducedBlock
        for number, block in enumerate(self.vit.blocks):
            at_input, within = (plan.steps_at(number, place) if plan else None for place in ("input", "inner"))
            bias = plan.key_bias.get(number) if plan else None
            index = None
            if at_input is not None:
                assert isinstance(at_input, StaticStep)  # the only reducer at a block's input
                if number == 0:
                    keep = at_input.keep
                else:
                    index = (*range(prefix), *(prefix + at for at in at_input.local_index(alive)))
                alive = at_input.apply(alive)
            if within is not None:
                assert isinstance(within, InnerStep)
                places = list(alive.positions or ()) if places is None else places  # as the first inner step sees them
                alive = within.apply(alive)
            blocks.append(
                block_of(
                    block,
                    index,
                    bias,
                    within,
                    proportional=self.proportional,
                    carry_size=carry_size,
                    carry_positions=number < last_tracked,
                )
            )
        self.embed = PatchEmbedding(self.vit, keep)
        self.blocks = nn.ModuleList(blocks)
        by_size = not inner or any(step.pools_by_size for step in inner)
        self.head = PoolAndHead(self.vit, self.description.pool_include_prefix, by_size=by_size)
        self._build_graphs(inner, range(self.description.patches) if keep is None else keep)
        track = last_tracked >= 0 and bool(places)
        self.register_buffer(
            "places", ops.grid_codes(places or [], self.description.grid[1]) if track else None, persistent=False
        )

    def _build_graphs(self, inner: Sequence[InnerStep], embedded: Sequence[int]) -> None:
        """Build the graphs of the embedded patches that steps need."""
        description = self.description
        # The authors' code counts M + 1 neighbours if there is no class token.
        more = 1 if description.prefix_tokens else 2
        self.asked = tuple(sorted({step.links for step in inner if step.links is not None}))
        self.graphs = nn.ModuleList(
            TokenGraph(embedded, description.grid[1], kind, count + more, description.prefix_tokens)
            for kind, count in self.asked
        )
        index = code_index(embedded, description.grid[1]) if self.asked else None
        self.register_buffer("code_index", index, persistent=False)

    @property
    def fused_attentions(self) -> int:
        """Number of blocks with fused attention: a step that needs the whole map prevents it in its block."""
        return sum(not block.maps for block in self.blocks)

    @property
    def output_name(self) -> Literal["logits", "features"]:
        """Name of the output of `forward`."""
        return "logits" if self.description.num_classes else "features"

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: float32 [B, C, H, W], preprocessed.

        Returns:
            float32 [B, classes], or [B, embed_dim] pooled features if the model has no classes; float32 at any
            precision of the weights, so that every engine has the same signature.
        """
        *_, last = self._streams(images)
        return self.head(last.x, last.size, proportional=self.proportional).float()

    def block_tokens(self, images: Tensor) -> list[Tensor]:
        """Tokens [B, N_b, D] after each block, in order (for checks and analysis)."""
        return [stream.x for stream in self._streams(images)]

    def _streams(self, images: Tensor) -> Iterator[Stream]:
        """Stream after each block."""
        x = self.embed(images.to(self.vit.patch_embed.proj.weight.dtype))
        links = {asked: graph(x) for asked, graph in zip(self.asked, self.graphs, strict=True)}
        stream = Stream(
            x,
            self.description.prefix_tokens,
            positions=self.places,
            columns=self.description.grid[1],
            links=links,
            code_index=self.code_index,
        )
        for block in self.blocks:
            stream = block(stream)
            yield stream

    def for_export(self, precision: str = "fp32", form: AttentionForm = "sdpa", kernels: Kernels | None = None) -> Self:
        """Copy the model for lowering: weights cast, LayerScale folded, constants precomputed in fp32.

        Args:
            precision: "fp32", "fp16" or "bf16".
            form: Form of attention in portable blocks (vp_exporter.rewrite.attention).
            kernels: "portable" or "vp"; None for that of this model.
        """
        twin = type(self)(copy.deepcopy(self.vit).float(), self.description, self.plan, kernels or self.kernels)
        for block in twin.blocks:
            block.fold_scales()
            block.attention_form = form
        twin.embed.freeze()
        twin.requires_grad_(False)
        return twin.to(DTYPES[precision])
