"""Find the timm ViT in a module that the user has in memory."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn as nn

from vp_exporter.data.labels import known_names
from vp_exporter.errors import UnsupportedModelError, first_line
from vp_exporter.model.describe import describe, refusal
from vp_exporter.model.loading import LoadedModel
from vp_exporter.model.spec import ModelSpec
from vp_exporter.model.weights import fingerprint

_OTHERS = ("transformers", "torchvision", "mmpretrain")  # state_dicts.py translates their weight names


def find_vit(model: object, backbone: str | None = None) -> nn.Module:
    """Find the ViT in a module.

    Args:
        model: The module.
        backbone: Attribute path of the ViT, such as "model.encoder"; None if `model` is the ViT.

    Raises:
        UnsupportedModelError: if there is nothing at that path, or no supported ViT; the message says where one is.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"`model` is a {type(model).__name__}", expected="a timm ViT (a torch.nn.Module) or a vp.ModelRequest"
        )
    found: Any = model
    for part in backbone.split(".") if backbone is not None else ():
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UnsupportedModelError(
                f"`backbone={backbone!r}`: {type(found).__name__} has no attribute {part!r}",
                expected="attributes from the module to its ViT, such as 'model.encoder'",
                fix=_where(model) or "leave it out where the module is the ViT",
            ) from None
    name = type(model).__name__ if backbone is None else f"`backbone={backbone!r}` of {type(model).__name__}"
    if not isinstance(found, nn.Module):
        raise UnsupportedModelError(f"{name} is a {type(found).__name__}", expected="a timm ViT", fix=_where(model))
    reason = _refusal(found)
    if reason is not None:
        fix = _where(found, backbone) or _other_library(found) or "docs/models.md lists what is supported"
        raise UnsupportedModelError(f"{name} cannot be reduced: {reason}", expected="a plain timm ViT", fix=fix)
    return found


def describe_module(vit: nn.Module) -> ModelSpec:
    """Describe a ViT found by `find_vit`.

    Its name is timm's without the tag, since the tag names weights and these may have been trained further.

    Raises:
        UnsupportedModelError: if it is of a subclass with a different structure.
    """
    config = getattr(vit, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    try:
        spec = describe(vit, str(name or type(vit).__name__), subclasses=True)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(vit).__name__} is not laid out as timm's class that it derives from: {error}",
            fix="docs/models.md lists what is supported",
        ) from error
    return dataclasses.replace(spec, named=bool(name))


def copy_module(model: nn.Module, vit: nn.Module) -> LoadedModel:
    """Copy the ViT to the CPU, in fp32 and eval mode; `vit` itself is not modified.

    Args:
        model: The user's module, for its name.
        vit: The ViT in it.

    Raises:
        UnsupportedModelError: if it cannot be copied, or has a different structure.
    """
    try:
        with torch.no_grad():
            twin = copy.deepcopy(vit).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
            sha256 = fingerprint(twin)
    except Exception as error:  # its modules may raise anything
        first = first_line(error)
        raise UnsupportedModelError(
            f"{type(vit).__name__} cannot be copied: {first}",
            expected="a module that copy.deepcopy takes",
            fix="load its state_dict into a new timm model, and give that one",
        ) from error
    spec = describe_module(twin)
    notes, source = [], "in memory" if spec.named else f"in memory ({type(vit).__name__})"
    if model is not vit:
        wrapper, left = type(model).__name__, _outside(model, vit)
        more = f", nor are its {left} other parameters" if left else ""
        notes.append(f"only the ViT inside {wrapper} is taken: what {wrapper} does around it is not part of it{more}")
        source += f", inside {wrapper}"
    return LoadedModel(twin, spec, sha256, source, tuple(notes), known_names(twin, spec.num_classes, pretrained=False))


def _refusal(vit: nn.Module) -> str | None:
    try:
        return refusal(vit, subclasses=True)
    except AttributeError as error:
        return f"it lacks what timm's class has ({error})"


def _where(model: nn.Module, below: str | None = None) -> str:
    """Hint at the ViTs inside a module; "" if there are none."""
    found = [name for name, part in model.named_modules() if name and _refusal(part) is None]
    paths = [repr(f"{below}.{name}" if below else name) for name in found[:3]]
    return f"a ViT lies in it: pass `backbone={' or '.join(paths)}`" if paths else ""


def _other_library(model: nn.Module) -> str:
    library = type(model).__module__.split(".")[0]
    if library not in _OTHERS:
        return ""
    return (
        f"save its state_dict, and give vp.ModelRequest(NAME, weights=FILE) with the timm model of that size: the "
        f"names of {library}'s weights are translated"
    )


def _outside(model: nn.Module, vit: nn.Module) -> int:
    """Number of parameters of the module outside the ViT."""
    inside = {id(parameter) for parameter in vit.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
