"""Find a model's weights in a checkpoint, and convert them to timm's names and the model's sizes.

A checkpoint may hold a model several times (student and teacher, with and without averaging), under prefixes added by
wrappers and the user's modules (`module.`, `_orig_mod.`, `net.backbone.`). One rule finds them all: a ViT has one patch
embedding, and what precedes its name is the model's prefix.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn as nn
from torch import Tensor

from vp_exporter.errors import WeightsError, first_line
from vp_exporter.model.parameter_names import NAMING_SCHEMES, NamingScheme

# Name parts added by wrappers at any depth: DDP and DataParallel, torch.compile, FSDP, activation checkpointing,
# Fabric.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPED = rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*"
# Prefixes of weights averaged over training. A momentum encoder (MoCo) is also an average, but its authors evaluate the
# other model.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged|avg|swa|teacher|target|momentum)(?:[._]|$)")
_MOMENTUM = re.compile(r"(?:^|[._])momentum(?:[._]|$)")
# Parts used only in (pre-)training.
_TRAINING_ONLY = re.compile(r"^(?:mask_token$|decoder|predictor\.|projector\.|head2\.|dino_head\.|ibot_head\.)")


@dataclass(frozen=True)
class FoundWeights:
    """One model of a checkpoint.

    Attributes:
        state: Tensors under timm's names, or in a layout that timm's filters convert.
        notes: What was chosen and what was left out, one line each.
        named: Whether the names are timm's already.
    """

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    named: bool = True


@dataclass(frozen=True)
class _Place:
    """Location of a model: its naming scheme and prefix."""

    scheme: NamingScheme
    prefix: str
    width: int
    averaged: bool


def find_weights(
    tensors: Mapping[str, Tensor], model: nn.Module, source: str, use_ema: bool | None = None
) -> FoundWeights:
    """Find the weights of one model.

    Args:
        tensors: All tensors of a file, as returned by `read_weights`.
        model: Model to load; may be on the meta device. Its width distinguishes a student from a larger teacher.
        source: Name of the file in messages.
        use_ema: Take averaged weights (True) or those of the last step (False); None takes averaged ones if present, as
            timm does.

    Raises:
        WeightsError: if the requested kind of weights is missing, or there are two indistinguishable models.
    """
    places = _places(tensors)
    if not places:
        return FoundWeights(_without_wrappers(_unwrapped(tensors)), named=False)
    embed = getattr(getattr(model, "patch_embed", None), "proj", None)
    width = None if embed is None else embed.weight.shape[0]
    fitting = [place for place in places if place.width == width] or places
    place = _choose(fitting, tensors, source, use_ema)
    below = _below(tensors, place.prefix)
    beside = _beside(tensors, place.prefix, places)
    notes = []
    if len(fitting) > 1:
        rest = ", ".join(repr(each.prefix) for each in fitting if each is not place)
        turn = f"`use_ema={not place.averaged}`"
        choice = f"; {turn} takes the other" if any(each.averaged != place.averaged for each in fitting) else ""
        notes.append(f"weights: {place.prefix or 'the top level'!r} of {source} (also there: {rest}{choice})")
    translate = place.scheme.translate
    if translate is None:  # timm's filters find the rest
        return FoundWeights(below, tuple(notes), named=False)
    state = translate(below, beside)
    if place.scheme.name != "timm":
        notes.append(f"weights: {source} has the names of {place.scheme.name}, translated to timm's")
    if "register_tokens" in state:
        state.setdefault("mask_token", state["cls_token"])  # lets timm's filter recognise DINOv2 with registers
    dropped = [name for name in state if _TRAINING_ONLY.match(name) and not _for_timm(name, state)]
    dropped += [name for name in state if re.match(r"head\.(?!weight$|bias$)", name)]
    state = {name: tensor for name, tensor in state.items() if name not in dropped}
    used = _used_beside(place.scheme)
    dropped += [name for name in beside if name.endswith("weight") and not name.startswith(("optim", *used))]
    if dropped:
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        notes.append(f"weights: left out {dropped[0]}{more} of {source}: no part of the model")
    return FoundWeights(state, tuple(notes))


def _for_timm(name: str, state: Mapping[str, Tensor]) -> bool:
    return name == "mask_token" and "register_tokens" in state


def _used_beside(scheme: NamingScheme) -> tuple[str, ...]:
    return {
        "transformers": ("classifier.", "cls_classifier.", "distillation_classifier."),
        "mmpretrain": ("head.",),
    }.get(scheme.name, ())


def _places(tensors: Mapping[str, Tensor]) -> list[_Place]:
    found = []
    for scheme in NAMING_SCHEMES:
        pattern = re.compile(rf"(?P<prefix>(?:.*\.)??{_WRAPPED})" + _loose(scheme.anchor))
        for name, tensor in tensors.items():
            match = pattern.fullmatch(name)
            if match and tensor.ndim >= 2:
                prefix = match.group("prefix")
                found.append(_Place(scheme, prefix, tensor.shape[0], bool(_AVERAGED.search(prefix))))
    # Lightning's WeightAveraging stores the average in the usual place, and the current weights elsewhere.
    if any(each.prefix.startswith("current_model_state.") for each in found):
        found = [replace(each, averaged=each.prefix.startswith("state_dict.")) for each in found]
    # OpenCLIP's towers use timm's names below `visual.trunk.`; timm's filter also needs the projection beside it.
    return [
        replace(each, scheme=NamingScheme("OpenCLIP", ""), prefix=each.prefix.removesuffix("visual.trunk."))
        if each.prefix.endswith("visual.trunk.")
        else each
        for each in found
    ]


def _loose(name: str) -> str:
    """Regular expression for a dotted name with wrappers' parts anywhere inside."""
    first, *rest = name.split(".")
    return re.escape(first) + "".join(rf"\.{_WRAPPED}" + re.escape(part) for part in rest)


def _choose(places: list[_Place], tensors: Mapping[str, Tensor], source: str, use_ema: bool | None) -> _Place:
    averaged = [each for each in places if each.averaged]
    plain = [each for each in places if not each.averaged]
    if use_ema and not averaged:
        raise WeightsError(f"{source} holds no averaged weights", expected="some", fix="leave out `use_ema=True`")
    if use_ema is False and not plain:
        raise WeightsError(f"{source} holds averaged weights only", expected="others", fix="leave out `use_ema=False`")
    if use_ema is None:
        preferred = [each for each in averaged if not _MOMENTUM.search(each.prefix)]
        chosen = preferred or plain or averaged
    else:
        chosen = averaged if use_ema else plain
    first = chosen[0]
    mine = _below(tensors, first.prefix)
    for other in chosen[1:]:
        theirs = _below(tensors, other.prefix)
        same = mine.keys() == theirs.keys() and all(
            mine[name].shape == theirs[name].shape and bool((mine[name] == theirs[name]).all()) for name in mine
        )
        if not same:
            raise WeightsError(
                f"{source} holds several models of this width: {first.prefix!r} and {other.prefix!r}",
                expected="one",
                fix="save the state dict of the one that is meant",
            )
    return first


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return _without_wrappers(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )


def _beside(tensors: Mapping[str, Tensor], prefix: str, places: list[_Place]) -> dict[str, Tensor]:
    """Tensors beside the model, other models excluded: the heads of the user's module, for example."""
    if not prefix:
        return {}
    models = tuple(place.prefix for place in places if place.prefix)
    return _below({name: t for name, t in tensors.items() if not name.startswith(models)}, _parent(prefix))


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): tensor for name, tensor in tensors.items()
    }


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """If no model is recognised, the tensors below the usual key, so that messages show parameter names."""
    for key in ("state_dict_ema.", "model_ema.", "state_dict.", "model."):
        inside = {name.removeprefix(key): tensor for name, tensor in tensors.items() if name.startswith(key)}
        if inside:
            return inside
    return tensors


def _parent(prefix: str) -> str:
    parts = [part for part in prefix.split(".") if part]
    while parts and parts[-1] in _WRAPPERS:
        parts.pop()
    return "".join(part + "." for part in parts[:-1])


def drop_head(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Remove the classifier from a state dict, as timm does for `num_classes=0`; also returns its number of classes."""
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    return {name: tensor for name, tensor in state.items() if not re.match(r"head(_dist)?\.", name)}, classes


def projected(state: Mapping[str, Tensor]) -> int | None:
    """Width of a CLIP tower's projection, which timm's filter uses as the head; None if there is none."""
    if "visual.head.proj.weight" in state:  # OpenCLIP
        return state["visual.head.proj.weight"].shape[0]
    return state["visual.proj"].shape[1] if "visual.proj" in state else None  # OpenAI


def adapt(state: Mapping[str, Tensor], model: nn.Module, source: str) -> FoundWeights:
    """Convert weights to the model's sizes with the filter that timm applies to its own checkpoints.

    Resamples position embeddings to the model's grid and patch embeddings to its patch size, and converts other
    layouts.

    Raises:
        WeightsError: if the position embeddings do not form a grid.
    """
    filter_fn: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return FoundWeights(dict(state))
    if "dist_token" in state and getattr(model, "dist_token", None) is None:
        raise WeightsError(
            f"{source} is of a distilled model", expected="weights without a distillation token",
            fix="name the distilled model that the weights belong to (deit_*_distilled_*)",
        )  # fmt: skip
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        found: dict[str, Tensor] = filter_fn(dict(floats), model, **_filter_options(model))
    except Exception as error:  # reshapes to impossible shapes
        _check_positions(floats, model, source)
        first = first_line(error)
        raise WeightsError(
            f"timm cannot convert the weights of {source}: {first}", expected="weights of this model",
            fix="name the model that the weights belong to",
        ) from error  # fmt: skip
    if "pos_embed" in found and found["pos_embed"].shape != model.get_parameter("pos_embed").shape:
        _check_positions(floats, model, source)
    return FoundWeights(found, tuple(_resampled(floats, found, model, source)))


def _check_positions(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Check that the number of position embeddings forms a grid."""
    held, wanted = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if held is None or wanted is None or held.ndim != 3 or held.shape[2] != wanted.shape[2]:
        return
    rows, columns = model.patch_embed.grid_size
    patches = held.shape[1] - (wanted.shape[1] - rows * columns)
    if patches < 1 or round(patches**0.5) ** 2 != patches:
        raise WeightsError(
            f"{source} has positions of {patches} patches, which are no square",
            expected=f"{rows} x {columns}, as the model has, or a square grid to resample",
            fix="name the image size of the weights with `img_size`, or the model that they belong to",
        )


def _filter_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of timm's filter for this architecture."""
    if type(model).__module__.endswith(".eva"):
        return {}
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""
    options: dict[str, Any] = {"adapt_layer_scale": True}  # for deit3; no effect elsewhere, where no name has a gamma
    if "flexi" in name or "radio" in name:
        options |= {"interpolation": "bilinear", "antialias": False}
    aligned = getattr(sys.modules[type(model).__module__], "_RADIO_ALIGN_CORNERS", ())  # newer timm only
    if "radio" in name and aligned:
        options["align_corners"] = any(part in name for part in aligned)
    return options


def _resampled(before: Mapping[str, Tensor], after: Mapping[str, Tensor], model: nn.Module, source: str) -> list[str]:
    notes: list[str] = []
    old, new = before.get("pos_embed"), after.get("pos_embed")
    if old is not None and new is not None and old.shape != new.shape:
        wanted = model.get_parameter("pos_embed").shape[1]
        grid = tuple(model.patch_embed.grid_size)
        prefix = wanted - grid[0] * grid[1]
        # DINOv2 has a position for its class token, timm's model adds it to the token
        prefix += "register_tokens" in before
        patches = old.shape[1] - prefix
        if patches == grid[0] * grid[1]:
            return notes
        side = round(patches**0.5)
        was = f"{side} x {side}" if side * side == patches else str(patches)
        size = side * model.patch_embed.patch_size[0]
        keep = f"; `img_size={size}` keeps them" if side * side == patches else ""
        notes.append(
            f"weights: position embeddings of {source} resampled from {was} to {grid[0]} x {grid[1]} patches, "
            f"as timm does{keep}"
        )
    old, new = before.get("patch_embed.proj.weight"), after.get("patch_embed.proj.weight")
    if old is not None and new is not None and old.ndim == 4 and old.shape[2:] != new.shape[2:]:
        notes.append(
            f"weights: patch embedding of {source} resampled from {old.shape[2]} x {old.shape[3]} to "
            f"{new.shape[2]} x {new.shape[3]} pixels, as timm does"
        )
    return notes
