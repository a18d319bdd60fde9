"""A model from its timm name and where its weights come from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from vp_exporter import weights as weight_files
from vp_exporter.errors import UnsupportedModelError, WeightsError
from vp_exporter.models import ViTDescription, describe


@dataclass(frozen=True)
class ModelRequest:
    """What the user names.

    Attributes:
        name: timm model, with or without a pretrained tag.
        args: keyword arguments of timm.create_model, such as img_size.
        weights: a .safetensors or .pth file; or `pretrained` from timm's hub; or `random_init` for latency studies.
        num_classes: None takes it from the weights, or timm's default.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    pretrained: bool = False
    random_init: bool = False
    num_classes: int | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in eval mode and fp32.

    Attributes:
        weights_source: for people: a file name (without its folder), "timm pretrained (tag)" or "random".
    """

    vit: nn.Module
    description: ViTDescription
    weights_sha256: str
    weights_source: str


def load_model(request: ModelRequest) -> LoadedModel:
    """Create the model and fill it.

    Raises:
        UnsupportedModelError: timm does not know it, or we do not take it apart.
        WeightsError: no source or several sources of weights, or weights that do not fit.
    """
    sources = [request.weights is not None, request.pretrained, request.random_init]
    if sum(sources) != 1:
        raise WeightsError(
            f"{'no' if not any(sources) else 'more than one'} source of weights is named",
            expected="one of --weights FILE, --pretrained (from timm's hub) or --random-init (latency studies only)",
        )
    known_model(request.name)
    hidden = sorted({"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & set(request.args))
    if hidden:  # timm would load weights behind our back, a pickle perhaps, and the manifest would not know
        raise WeightsError(f"--model-arg names {hidden[0]}", expected="weights by --weights or --pretrained only")
    args, state = dict(request.args), None
    if request.weights is not None:
        state, _ = weight_files.read_weights(request.weights)
    classes = request.num_classes
    if classes is None and state is not None:
        classes = weight_files.classes_of(state)
    if classes is not None:
        args["num_classes"] = classes
    if request.random_init:
        torch.manual_seed(0)  # the same "random" model every time, so that timings of two exports compare
    vit = _create(request, args)
    description = describe(vit, request.name)
    if state is not None:
        assert request.weights is not None
        weight_files.load_into(vit, state, request.weights.name)
        source = request.weights.name
    else:
        tag = (getattr(vit, "pretrained_cfg", None) or {}).get("tag") or "default"
        source = f"timm pretrained ({tag})" if request.pretrained else "random"
    return LoadedModel(vit, description, weight_files.fingerprint(vit), source)


def describe_by_name(name: str, args: Mapping[str, Any], num_classes: int | None = None) -> ViTDescription:
    """Describe a model without weights or memory.

    Raises:
        UnsupportedModelError: timm does not know it, or we do not take it apart.
    """
    known_model(name)
    extra = {} if num_classes is None else {"num_classes": num_classes}
    with torch.device("meta"):
        return describe(_create(ModelRequest(name), {**args, **extra}), name)


def known_model(name: str) -> None:
    """Refuse names that timm does not have.

    Raises:
        UnsupportedModelError: with the nearest names.
    """
    if timm.is_model(name):
        return
    import difflib

    near = difflib.get_close_matches(name.split(".", 1)[0], timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
    raise UnsupportedModelError(
        f"timm {timm.__version__} has no model {name!r}", expected="a timm model name", fix=hint
    )


def _create(request: ModelRequest, args: Mapping[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("timm").setLevel(logging.ERROR)
        try:
            model: nn.Module = timm.create_model(request.name, pretrained=request.pretrained, **args)
        except Exception as error:  # hub clients raise kinds of their own, which we cannot import to name
            first = (str(error).splitlines() or [type(error).__name__])[0]
            if request.pretrained:
                raise WeightsError(
                    f"timm cannot fetch the pretrained weights of {request.name}: {first}",
                    expected="a reachable hub or a filled cache",
                    fix="download them elsewhere and name them with --weights",
                ) from error
            raise UnsupportedModelError(
                f"timm cannot create {request.name} with {dict(args)}: {first}", fix="check --model-arg"
            ) from error
    return model.eval()
