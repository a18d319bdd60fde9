"""Translate parameter names of other libraries' ViTs to timm's.

A naming scheme is recognised by its patch embedding, which every ViT has exactly once. timm's own names are one scheme.
Layouts that timm's checkpoint filters convert (OpenAI's CLIP, AIMv2, BEiT-3, RADIO, ...) are left to timm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class NamingScheme:
    """Naming scheme of one library.

    Attributes:
        name: Name of the library.
        anchor: Name of the patch embedding, after the model's prefix.
        translate: (tensors below the prefix, tensors beside it) -> tensors under timm's names; None if timm converts
            it.
    """

    name: str
    anchor: str
    translate: Callable[[State, State], State] | None = None


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> State:
    out = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return out


def _joined(state: State, parts: str) -> State:
    """Join query, key and value of each block to one `attn.qkv`; `parts` is their name, with {} for q, k, v."""
    out = dict(state)
    words = {"q": "query", "k": "key", "v": "value"}
    for name in state:
        found = re.fullmatch(r"blocks\.(\d+)\." + re.escape(parts).replace(r"\{\}", "query") + r"\.(weight|bias)", name)
        if found:
            block, kind = found.groups()
            names = [f"blocks.{block}.{parts.format(word)}.{kind}" for word in words.values()]
            if all(each in out for each in names):
                out[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([out.pop(each) for each in names])
    return out


def _transformers(state: State, beside: State) -> State:
    """Hugging Face transformers: ViT, DeiT, ViT-MAE, DINOv2 (with registers)."""
    out = _renamed(
        state,
        (
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.", ""),  # cls_token, mask_token, register_tokens
            (r"^encoder\.layer\.", "blocks."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.output\.dense\.", ".attn.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
            (r"\.mlp\.weights_in\.", ".mlp.fc1."),
            (r"\.mlp\.weights_out\.", ".mlp.fc2."),
            (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
            (r"^layernorm\.", "norm."),
        ),
    )
    out = _joined(out, "attention.attention.{}")
    out = {name: tensor for name, tensor in out.items() if not name.startswith("pooler.")}
    heads = {"classifier.": "head.", "cls_classifier.": "head.", "distillation_classifier.": "head_dist."}
    width = out["patch_embed.proj.weight"].shape[0]
    for old, new in heads.items():
        weight = beside.get(old + "weight")
        # DINOv2's classifier takes the class token and the mean of the patches, which timm's models do not support.
        if weight is not None and weight.ndim == 2 and weight.shape[1] == width:
            out |= {new + kind: beside[old + kind] for kind in ("weight", "bias") if old + kind in beside}
    return out


def _mmpretrain(state: State, beside: State) -> State:
    """OpenMMLab's mmpretrain (mmcls): VisionTransformer and DeiT."""
    out = _renamed(
        state,
        (
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"^layers\.", "blocks."),
            (r"\.ln(\d)\.", r".norm\1."),
            (r"^ln1\.", "norm."),
            (r"^pre_norm\.", "norm_pre."),
            (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
            (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
            (r"\.(?:attn\.gamma1|ffn\.gamma2)\.weight$", ".gamma"),
        ),
    )
    gammas = {name: tensor for name, tensor in state.items() if re.search(r"\.(attn\.gamma1|ffn\.gamma2)\.", name)}
    out = {name: tensor for name, tensor in out.items() if not name.endswith(".gamma")}
    for name, tensor in gammas.items():
        block = name.split(".")[1]
        out[f"blocks.{block}.ls{1 if 'gamma1' in name else 2}.gamma"] = tensor
    heads = (("head.layers.head.", "head."), ("head.layers.head_dist.", "head_dist."), ("head.fc.", "head."))
    for old, new in heads:
        out |= {new + kind: beside[old + kind] for kind in ("weight", "bias") if old + kind in beside}
    return out


def _torchvision(state: State, beside: State) -> State:
    """torchvision's VisionTransformer."""
    return _renamed(
        state,
        (
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^class_token$", "cls_token"),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.ln\.", "norm."),
            (r"^encoder\.layers\.encoder_layer_", "blocks."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
            (r"^heads\.(?:head\.)?(weight|bias)$", r"head.\1"),
        ),
    )


def _timm(state: State, beside: State) -> State:
    """timm, and all with its block names: DINO, MAE, DeiT, ...; DINOv2's training code groups blocks in chunks."""
    return _renamed(state, ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),))


NAMING_SCHEMES = (
    NamingScheme("timm", "patch_embed.proj.weight", _timm),
    NamingScheme("transformers", "embeddings.patch_embeddings.projection.weight", _transformers),
    NamingScheme("mmpretrain", "patch_embed.projection.weight", _mmpretrain),
    NamingScheme("torchvision", "conv_proj.weight", _torchvision),
    NamingScheme("CLIP", "visual.conv1.weight"),
    NamingScheme("AIMv2", "preprocessor.patchifier.proj.weight"),
    NamingScheme("BEiT-3", "beit3.vision_embed.proj.weight"),
    NamingScheme("RADIO", "radio_model.model.patch_generator.embedder.weight"),
)
