"""Load a model by name, with its weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from vp_exporter.data.labels import known_names
from vp_exporter.errors import UnsupportedModelError, WeightsError, first_line
from vp_exporter.model import weights as weight_files
from vp_exporter.model.describe import describe
from vp_exporter.model.hub import ModelName, folder_weights, hub_at_hand, parse_name
from vp_exporter.model.request import ModelRequest
from vp_exporter.model.spec import ModelSpec
from vp_exporter.model.state_dicts import adapt, drop_head, find_weights, projected


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in eval mode and fp32.

    Attributes:
        weights_source: Readable description: a file name (without folder), "timm pretrained (tag)" or "random".
        notes: What was chosen, left out or resampled, one line each.
        classes: Class names in the order of the logits, if the model's configuration has them.
    """

    vit: nn.Module
    description: ModelSpec
    weights_sha256: str
    weights_source: str
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def load_model(request: ModelRequest) -> LoadedModel:
    """Create a model and load its weights.

    Raises:
        UnsupportedModelError: if timm does not know the model, or it is not supported.
        WeightsError: if there is not exactly one source of weights, or they do not fit.
    """
    sources = [request.weights is not None, request.pretrained, request.random_init]
    if sum(sources) != 1:
        raise WeightsError(
            f"{'no' if not any(sources) else 'more than one'} source of weights is named",
            expected="one of `weights=FILE`, `pretrained=True` (timm's hub) or `random_init=True` (latency only)",
        )
    name = parse_name(request.name)
    hidden = sorted({"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & set(request.args))
    if hidden:  # timm would load weights that the manifest does not record, possibly from a pickle
        raise WeightsError(f"`args` names {hidden[0]}", expected="weights by `weights` or `pretrained=True` only")
    if request.use_ema is not None and request.weights is None and name.folder is None:
        raise WeightsError("`use_ema=True` or `use_ema=False` is given without `weights`", expected="`weights=FILE`")
    args = _arguments(request.args, request.size)
    file = request.file
    if request.pretrained and name.folder is not None:
        file = folder_weights(name.folder)
    if file is not None:
        vit, notes, source = _from_file(request, name, args, file)
    elif request.pretrained:
        vit, notes, source = _from_hub(request, name, args)
    else:
        torch.manual_seed(0)  # reproducible, so that timings of two exports are comparable
        vit, notes, source = _create(name, _with_classes(args, request.num_classes)), [], "random"
    description = describe(vit, _label(name, vit))
    _check_size(description, request.size)
    return LoadedModel(
        vit,
        description,
        weight_files.fingerprint(vit),
        source,
        tuple(notes),
        known_names(vit, description.num_classes, pretrained=request.pretrained),
    )


def describe_by_name(
    name: str, args: Mapping[str, Any], num_classes: int | None = None, img_size: tuple[int, int] | None = None
) -> ModelSpec:
    """Describe a model without allocating its weights.

    Raises:
        UnsupportedModelError: if timm does not know the model, or it is not supported.
    """
    parsed = parse_name(name)
    with torch.device("meta"):
        vit = _create(parsed, _with_classes(_arguments(args, img_size), num_classes))
    description = describe(vit, _label(parsed, vit))
    _check_size(description, img_size)
    return description


def _from_file(
    request: ModelRequest, name: ModelName, args: dict[str, Any], file: Path
) -> tuple[nn.Module, list[str], str]:
    tensors, _ = weight_files.read_weights(file)
    with torch.device("meta"):
        shape = _create(name, args)
    describe(shape, _label(name, shape))  # report an unsupported model before problems with its weights
    found = find_weights(tensors, shape, file.name, request.use_ema)
    notes, state = list(found.notes), found.state
    classes, usual = request.num_classes, getattr(shape, "num_classes", None)
    if classes == 0:
        state, dropped = drop_head(state)
        if dropped:
            notes.append(f"weights: the head of {dropped} classes is left out: features come out")
    elif classes is None:
        classes = weight_files.classes_of(state) if found.named else projected(state)
        if classes is not None and classes != usual:
            what = f"{classes} classes" if classes else "no classes (features come out)"
            notes.append(f"weights: {file.name} has {what}, where {shape_name(shape)} has {usual}: taken from the file")
    vit = _create(name, _with_classes(args, classes))
    adapted = adapt(state, vit, file.name)
    weight_files.load_into(vit, adapted.state, file.name)
    source = file.name if request.weights is not None else f"{file.parent.name}/{file.name}"
    return vit, [*notes, *adapted.notes], source


def _from_hub(request: ModelRequest, name: ModelName, args: dict[str, Any]) -> tuple[nn.Module, list[str], str]:
    _check_classes(request, None if name.source else timm.get_pretrained_cfg(name.text))
    with hub_at_hand() as answers:
        vit = _create(name, _with_classes(args, request.num_classes), pretrained=True)
    config = getattr(vit, "pretrained_cfg", None) or {}
    _check_classes(request, config)
    notes = [] if answers else ["weights: the hub does not answer: they are those of the cache"]
    if name.source:
        return vit, notes, f"{name.source}:{name.place}"
    return vit, notes, f"timm pretrained ({config.get('tag') or 'default'})"


def _check_classes(request: ModelRequest, config: Any) -> None:
    """Check the number of classes: for a different one, timm would give a pretrained model a new, random head."""
    has = config.get("num_classes") if isinstance(config, Mapping) else getattr(config, "num_classes", None)
    if request.num_classes and has is not None and has != request.num_classes:
        raise WeightsError(
            f"`num_classes` is {request.num_classes}, and the pretrained weights of {request.name} have {has}",
            expected=f"{has}, or 0 for features" if has else "0",
            fix="a head of another size would be untrained: fine-tune the model and give `weights`",
        )


def shape_name(vit: nn.Module) -> str:
    """timm's name of the architecture."""
    config = getattr(vit, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(vit).__name__)


def _label(name: ModelName, vit: nn.Module) -> str:
    """Name for plans and bundles: timm's, never a local folder."""
    return shape_name(vit) if name.source else name.text


def _arguments(args: Mapping[str, Any], img_size: tuple[int, int] | None) -> dict[str, Any]:
    if img_size is None:
        return dict(args)
    if "img_size" in args:
        raise UnsupportedModelError("`img_size` and model argument `img_size` are both given", expected="one of them")
    return {**args, "img_size": img_size}


def _with_classes(args: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    return dict(args) if classes is None else {**args, "num_classes": classes}


def _check_size(description: ModelSpec, img_size: tuple[int, int] | None) -> None:
    if img_size is None:
        return
    for side, patch in zip(img_size, description.patch_size, strict=True):
        if side % patch:
            raise UnsupportedModelError(
                f"`img_size` {'x'.join(map(str, img_size))} leaves a part of a patch over",
                expected=f"multiples of {patch}, the patch size of {description.name}",
                fix=f"give {side // patch * patch or patch} or {(side // patch + 1) * patch}",
            )


def _create(name: ModelName, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("timm").setLevel(logging.ERROR)
        try:
            if name.source == "hf-hub" and not pretrained:
                with hub_at_hand():  # fetches its configuration
                    model: nn.Module = timm.create_model(name.text, pretrained=False, **args)
            else:
                model = timm.create_model(name.text, pretrained=pretrained, **args)
        except Exception as error:  # hub clients have exceptions that cannot be imported here
            first = first_line(error)
            if name.source and (isinstance(error, KeyError) or first.startswith("Unknown model")):
                raise UnsupportedModelError(
                    f"{name.text} is no model of timm {timm.__version__}: its config.json names "
                    + ("no architecture" if isinstance(error, KeyError) else f"another, {first}"),
                    expected="a repository that timm wrote",
                    fix="name the timm model, and its weights with `weights=FILE`",
                ) from error
            if pretrained or name.source == "hf-hub":
                what = "pretrained weights" if pretrained else "configuration"
                raise WeightsError(
                    f"timm cannot fetch the {what} of {name.text}: {first}",
                    expected="a reachable hub or a filled cache",
                    fix="download them elsewhere and name them with `weights`",
                ) from error
            if "Invalid pretrained tag" in first:
                tags = timm.list_pretrained(name.text.split(".", 1)[0] + ".*")
                fix = f"it has {', '.join(tags[:5])}" if tags else "leave the tag out"
            else:
                fix = "check `args`"
            raise UnsupportedModelError(
                f"timm cannot create {name.text} with {dict(args)}: {first}", fix=fix
            ) from error
    return model.eval()
