"""Supported and rejected models, with each reason shown on a timm model; and docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import AttentionPoolLatent, LayerScale
from timm.models.vision_transformer import Block, VisionTransformer

from vp_exporter.errors import UnsupportedModelError
from vp_exporter.model.describe import describe, refusal
from vp_exporter.model.support_table import document, model_names, support_rows
from vp_exporter.plan import PlanModel

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def make(name: str, **args: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **{"depth": 2, **args})
    return model


def test_a_plain_vit() -> None:
    found = describe(make("vit_small_patch16_224", depth=12), "vit_small_patch16_224.augreg_in1k")
    assert PlanModel.of(found, "ab") == PlanModel(
        "vit_small_patch16_224.augreg_in1k", (224, 224), (16, 16), 1, 12, 196, "ab"
    )
    assert (found.grid, found.in_chans, found.embed_dim, found.num_heads) == ((14, 14), 3, 384, 6)
    assert (found.pool, found.pool_include_prefix, found.num_classes) == ("token", False, 1000)


@pytest.mark.parametrize(
    ("name", "args", "prefix", "registers", "distilled", "pool"),
    [
        ("vit_tiny_patch16_224", {}, 1, 0, False, "token"),
        ("deit_tiny_distilled_patch16_224", {}, 2, 0, True, "token"),
        ("vit_small_patch14_reg4_dinov2", {}, 5, 4, False, "token"),
        ("vit_medium_patch16_gap_256", {}, 0, 0, False, "avg"),
        ("vit_base_patch16_siglip_224", {}, 0, 0, False, "map"),
        ("aimv2_large_patch14_224", {}, 0, 0, False, "avg"),
        ("eva_giant_patch14_224", {}, 1, 0, False, "avg"),
        ("eva_giant_patch14_224", {"num_reg_tokens": 3, "global_pool": "token"}, 4, 3, False, "token"),
        ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 2, "global_pool": "max"}, 2, 2, False, "max"),
    ],
)
def test_prefix_tokens_and_pooling(
    name: str, args: dict[str, Any], prefix: int, registers: int, distilled: bool, pool: str
) -> None:
    found = describe(make(name, **args), name)
    assert (found.prefix_tokens, found.register_tokens) == (prefix, registers)
    assert (found.distilled, found.pool) == (distilled, pool)
    assert found.class_token == (prefix - registers - distilled == 1)


def test_sizes_that_are_not_square() -> None:
    found = describe(make("vit_tiny_patch16_224", img_size=(70, 96), patch_size=(16, 8)), "vit_tiny_patch16_224")
    assert (found.image_size, found.patch_size, found.grid, found.patches) == ((70, 96), (16, 8), (4, 12), 48)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope": ("eva02_tiny_patch14_224", {}, "it has rotary position embeddings"),
    "rope-dinov3": ("vit_small_patch16_dinov3", {}, "it has rotary position embeddings"),
    "hybrid": ("vit_tiny_r_s16_p8_224", {}, "its patch embedding HybridEmbed is a network of its own"),
    "parallel-scaling": ("vit_base_patch16_xp_224", {}, "its block ParallelScalingBlock is not the standard one"),
    "parallel-things": ("vit_small_patch16_18x2_224", {}, "its block ParallelThingsBlock is not the standard one"),
    "res-post-norm": ("vit_base_patch16_rpn_224", {}, "its block ResPostBlock is not the standard one"),
    "diff-attention": ("vit_dlittle_patch16_reg1_gap_256", {}, "its attention DiffAttention is not the standard one"),
    "eva-post-norm": ("eva_giant_patch14_224", {"use_post_norm": True}, "its block EvaBlockPostNorm"),
    "relpos": ("vit_relpos_small_patch16_224", {}, "its class VisionTransformerRelPos is not a plain ViT"),
    "beit": ("beit_base_patch16_224", {}, "its class Beit is not a plain ViT"),
    "sam": ("samvit_base_patch16", {}, "its class VisionTransformerSAM is not a plain ViT"),
    "naflex": ("naflexvit_base_patch16_gap", {}, "its class NaFlexVit is not a plain ViT"),
    "no-pooling": ("vit_tiny_patch16_224", {"global_pool": ""}, "it has no pooling, which needs every patch"),
    "no-pooling-eva": ("eva_giant_patch14_224", {"global_pool": ""}, "it has no pooling, which needs every patch"),
    "prr-pooling": ("vit_tiny_patch16_224", {"global_pool": "prr"}, "it has the pooling 'prr'"),
    "padding": (
        "vit_tiny_patch16_224",
        {"img_size": 70, "dynamic_img_pad": True, "dynamic_img_size": True},
        "its patch embedding pads the image",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, args, reason = REFUSED[case]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = make(name, **args)
    assert reason in str(refusal(model))
    with pytest.raises(UnsupportedModelError) as caught:
        describe(model, name)
    assert f"{name} cannot be reduced: {reason}" in caught.value.found
    assert "docs/models.md" in caught.value.fix


class Subclass(VisionTransformer):
    """Could compute anything."""


class StrangeBlock(Block):
    """Could compute anything."""


class StrangeScale(LayerScale):
    """Could compute anything."""


class StrangePool(AttentionPoolLatent):
    """Could compute anything."""


class StrangeMlp(timm.layers.Mlp):
    """Could compute anything."""


def test_a_subclass_is_refused() -> None:
    with torch.device("meta"):
        model = Subclass(depth=1, embed_dim=16, num_heads=2)
    assert refusal(model) == "its class Subclass is not a plain ViT"
    model = make("vit_tiny_patch16_224")
    model.patch_embed.__class__ = type("StrangeEmbed", (type(model.patch_embed),), {})  # type: ignore[assignment]
    assert "StrangeEmbed is a network of its own" in str(refusal(model))


@pytest.mark.parametrize("block", [0, 1])
def test_a_strange_part_of_any_block_is_refused(block: int) -> None:
    def changed(part: str, kind: type, **args: Any) -> str | None:
        model: Any = make("vit_tiny_patch16_224", **args)
        owner = model.blocks[block]
        (owner if part == "self" else getattr(owner, part)).__class__ = kind
        return refusal(model)

    assert changed("self", Block) is None
    assert changed("self", StrangeBlock) == "its block StrangeBlock is not the standard one"
    assert changed("mlp", StrangeMlp) == "its MLP StrangeMlp is not the standard one"
    strange = type("StrangeAttention", (timm.layers.Attention,), {})
    assert changed("attn", strange) == "its attention StrangeAttention is not the standard one"
    assert changed("ls1", StrangeScale, init_values=0.1) == "its blocks scale with StrangeScale"
    assert "its blocks scale with" in str(changed("ls2", StrangeScale, init_values=0.1))


def test_strange_attention_pooling_is_refused() -> None:
    model: Any = make("vit_base_patch16_siglip_224")
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(1, device="meta"))
    assert refusal(model) == "its attention pooling AttentionPoolLatent is not a latent query"
    model.attn_pool.pos_embed = None
    assert refusal(model) is None
    model.attn_pool.__class__ = StrangePool
    assert refusal(model) == "its attention pooling StrangePool is not a latent query"


def test_a_network_that_is_no_vit() -> None:
    assert refusal(nn.Linear(1, 1)) == "its class Linear is not a plain ViT"
    assert refusal(timm.create_model("resnet18")) == "its class ResNet is not a plain ViT"


@pytest.mark.slow
def test_document_is_up_to_date() -> None:
    """The document was generated from whole models; one block of each must give the same."""
    text = DOCUMENT.read_text(encoding="utf-8")
    stated = re.search(r"Generated from timm (\S+) by", text)
    assert stated is not None
    if stated[1] != timm.__version__:
        pytest.skip(f"docs/models.md is of timm {stated[1]}; this is {timm.__version__}")
    assert document(support_rows(model_names(), whole=False)) == text, (
        "python -m vp_exporter.model.support_table > docs/models.md"
    )


def test_document_names_models_once() -> None:
    names = re.findall(r"^\| `(\S+)` \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 300
    assert {"vit_small_patch16_224", "deit_small_patch16_224", "eva02_tiny_patch14_224"} <= set(names)


def test_document_on_a_few_models() -> None:
    rows = support_rows(["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
    assert [row.reason for row in rows] == [None, None, "its class Beit is not a plain ViT"]
    text = document(rows)
    assert "2 of 3 models are supported" in text
    assert "| its class Beit is not a plain ViT | 1 |" in text
    line = "| `deit_tiny_distilled_patch16_224` | token | class + distillation | 224 x 224 pixels, 14 x 14 patches |"
    assert line in text.splitlines()
    assert rows == support_rows([row.name for row in rows], whole=False)
