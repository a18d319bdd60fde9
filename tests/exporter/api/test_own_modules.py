"""Modules in memory: accepted if they compute the same as timm's class, else rejected with a suggestion."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

import vp_exporter as vp
from tests.exporter.cli.samples import ARGS, NAME, create
from vp_exporter.api.models import take
from vp_exporter.model.loading import LoadedModel
from vp_exporter.utils.progress import SILENT


def loaded(model: Any, backbone: str | None = None) -> LoadedModel:
    return take(model, backbone, SILENT)


class Renamed(VisionTransformer):
    """Changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Louder(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class Labelled(VisionTransformer):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(x)}


class Picky(VisionTransformer):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class OtherBlock(Block):
    """Changes nothing."""


class Lora(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Parameter(torch.randn_like(base.weight) * 0.01)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.extra.t()


class Mixing(nn.Module):
    """Depends on all tokens, so removing some changes the result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.mean(1, keepdim=True)


class Classifier(nn.Module):
    """A user's module around a ViT."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"encoder": vit})
        self.neck = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.model["encoder"](x))


def derived(kind: type[nn.Module]) -> nn.Module:
    """An instance of a class unknown to timm, with the sample's weights."""
    args = {key: value for key, value in ARGS.items() if key != "num_classes"}
    vit = kind(patch_size=16, num_classes=3, **args).eval()  # type: ignore[call-arg]
    vit.load_state_dict(create().state_dict())
    return vit


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    vit = create()
    change(vit)
    return vit


def test_a_timm_model_is_taken_with_what_is_known_of_it() -> None:
    vit = create()
    found = loaded(vit)
    assert found.description.name == NAME  # no tag: the weights may have been trained further
    assert found.description.named
    assert found.weights_source == "in memory"
    assert torch.equal(found.vit.head.weight, vit.head.weight)


def test_the_module_is_left_as_it_is() -> None:
    vit = create().half().train()
    vit.blocks[0].eval()
    before = {name: (part.training, id(part)) for name, part in vit.named_modules()}
    found = loaded(vit)
    assert {name: (part.training, id(part)) for name, part in vit.named_modules()} == before
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float16}
    assert all(parameter.requires_grad for parameter in vit.parameters())
    assert {parameter.dtype for parameter in found.vit.parameters()} == {torch.float32}
    assert not found.vit.training


def _other_blocks(vit: nn.Module) -> None:
    for block in vit.blocks:
        block.__class__ = OtherBlock


def _harmless_hook(vit: nn.Module) -> None:
    vit.blocks[0].register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize("change", [_other_blocks, _harmless_hook], ids=["blocks", "hook"])
def test_what_changes_nothing_is_taken(change: Callable[[nn.Module], object]) -> None:
    assert loaded(changed(change)).description.name == NAME


def test_a_derived_class_that_changes_nothing_is_taken() -> None:
    found = loaded(derived(Renamed))
    assert found.description.name == "Renamed"
    assert not found.description.named
    assert found.weights_source == "in memory (Renamed)"
    assert found.weights_sha256 == loaded(create()).weights_sha256


def test_a_plan_is_held_to_the_sizes_of_a_class_without_a_name() -> None:
    plan = vp.build_plan("grid", create(), keep_rate=0.5)
    images = torch.randn(2, 3, 64, 64)
    own, timms = vp.reduce(derived(Renamed), plan), vp.reduce(create(), plan)
    with torch.no_grad():
        assert torch.equal(own(images), timms(images))
    bigger = vp.build_plan("grid", NAME, keep_rate=0.5)
    with pytest.raises(vp.PlanError, match="the plan has image_size"):
        vp.reduce(derived(Renamed), bigger)


@pytest.mark.parametrize("path", ["model.encoder", "1"])
def test_a_vit_in_a_wrapper(path: str) -> None:
    vit = create()
    wrapper = nn.Sequential(nn.Identity(), vit) if path == "1" else Classifier(vit)
    assert loaded(wrapper, path).weights_sha256 == loaded(vit).weights_sha256
    with pytest.raises(vp.UnsupportedModelError, match=f"a ViT lies in it: pass `backbone='{path}'`"):
        loaded(wrapper)


def test_what_a_wrapper_does_beside_the_vit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    vp.reduce(Classifier(create()), None, backbone="model.encoder")
    said = "only the ViT inside Classifier is taken: what Classifier does around it is not part of it"
    assert said + ", nor are its 12 other parameters" in caplog.text
    assert loaded(Classifier(create()), "model.encoder").weights_source == "in memory, inside Classifier"
    caplog.clear()
    vp.reduce(nn.Sequential(nn.Identity(), derived(Renamed)), None, backbone="1")
    assert caplog.text.endswith("what Sequential does around it is not part of it\n")
    assert loaded(nn.Sequential(derived(Renamed)), "0").weights_source == "in memory (Renamed), inside Sequential"


def _scale(vit: nn.Module) -> None:
    vit.blocks[1].attn.scale *= 1.05
    vit.blocks[1].attn.fused_attn = False


def _hook(vit: nn.Module) -> None:
    vit.blocks[0].register_forward_hook(lambda module, inputs, output: output * 1.01)


def _method(vit: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, x) + 0.01

    vit.blocks[0].mlp.forward = types.MethodType(forward, vit.blocks[0].mlp)
    vit.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 0.01, vit)


def _lora(vit: nn.Module) -> None:
    vit.blocks[0].attn.qkv = Lora(vit.blocks[0].attn.qkv)


def _mixing_norm(vit: nn.Module) -> None:
    vit.blocks[0].norm2 = Mixing(vit.blocks[0].norm2)


def _last_norm(vit: nn.Module) -> None:
    vit.norm = Mixing(vit.norm)


def _headless(vit: nn.Module) -> None:
    """All logits are 0, whatever the changes."""
    nn.init.zeros_(vit.head.weight)
    nn.init.zeros_(vit.head.bias)
    _hook(vit)


def _nan(vit: nn.Module) -> None:
    vit.head.bias.data[0] = float("nan")


REFUSED: Mapping[str, tuple[Callable[[], Any], str]] = {
    "forward": (lambda: derived(Louder), "Louder does not compute what timm's class computes.*differ by 0.001 of"),
    "scale": (lambda: changed(_scale), "does not compute what timm's class computes"),
    "hook": (lambda: changed(_hook), "does not compute what timm's class computes"),
    "method": (lambda: changed(_method), "does not compute what timm's class computes"),
    "adapter": (lambda: changed(_lora), "does not compute.*adapters that are not merged"),
    "zero-head": (lambda: changed(_headless), "does not compute what timm's class computes"),
    "mixing": (lambda: changed(_mixing_norm), "mixes tokens outside of attention"),
    "nan": (lambda: changed(_nan), "gives NaN or infinite outputs on random images; .*check its weights"),
    "dict": (lambda: derived(Labelled), "forward of Labelled gives a dict; expected one tensor"),
    "arguments": (lambda: derived(Picky), r"Picky does not run on images of \[3, 64, 64\]: TypeError"),
    "no-module": (lambda: "weights.pth", "`model` is a str; expected a timm ViT"),
    "no-vit": (lambda: nn.Linear(2, 2), "its class Linear is not a plain ViT; .*docs/models.md lists"),
    "other-timm": (lambda: timm.create_model("resnet10t"), "its class ResNet is not a plain ViT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_computes_something_else_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(vp.UnsupportedModelError, match=message):
        loaded(make())


def test_a_norm_at_the_end_that_mixes_tokens() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, global_pool="avg", fc_norm=False, **ARGS).eval()
    _last_norm(vit)
    with pytest.raises(vp.UnsupportedModelError, match="mixes tokens outside of attention"):
        loaded(vit)


def test_a_module_that_cannot_be_copied() -> None:
    vit = create()
    vit.cached = vit.head.weight * 2
    with pytest.raises(vp.UnsupportedModelError, match="VisionTransformer cannot be copied: Only Tensors"):
        loaded(vit)
    del vit.cached
    quantised = torch.ao.quantization.quantize_dynamic(vit)
    with pytest.raises(vp.UnsupportedModelError, match="VisionTransformer cannot be copied"):
        loaded(quantised)


def test_another_library_s_vit_says_how_its_weights_get_in() -> None:
    torchvision = pytest.importorskip("torchvision.models")
    vit = torchvision.VisionTransformer(64, 16, 1, 2, 64, 64, num_classes=3)
    with pytest.raises(vp.UnsupportedModelError, match=r"give vp.ModelRequest\(NAME, weights=FILE\)"):
        loaded(vit)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.decoder", "ModuleDict has no attribute 'decoder'; .*pass `backbone='model.encoder'`"),
        ("neck", "`backbone='neck'` of Classifier cannot be reduced"),
        ("model", "pass `backbone='model.encoder'`"),
        ("forward", "`backbone='forward'` of Classifier is a method"),
    ],
)
def test_a_path_to_no_vit(path: str, message: str) -> None:
    with pytest.raises(vp.UnsupportedModelError, match=message):
        loaded(Classifier(create()), path)
