"""Preprocessing of a model, from its timm configuration, in the form that a bundle stores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch.nn as nn
from timm.data import resolve_model_data_config

from vp_engines.errors import VpError
from vp_engines.manifest import Preprocessing
from vp_exporter.model.spec import ModelSpec

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")


@dataclass(frozen=True)
class PreprocessingOverrides:
    """Overrides of timm's configuration; None keeps timm's value.

    Attributes:
        crop_pct: The model's input size divided by the resized image's size, in (0, 1].
        interpolation: One of INTERPOLATIONS.
        mean, std: Per channel, on the scale 0 to 1.
        crop_mode: One of CROP_MODES.
    """

    crop_pct: float | None = None
    interpolation: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_mode: str | None = None


def read_preprocessing(
    given: Preprocessing | Mapping[str, Any] | None, vit: nn.Module, description: ModelSpec
) -> Preprocessing:
    """Preprocessing from the user's values, completed by the model's timm configuration.

    Args:
        given: A complete Preprocessing, or any of timm's `mean`, `std`, `crop_pct`, `interpolation`, `crop_mode`,
            `input_size`.

    Raises:
        VpError: if a value is invalid or for another image size, or mean and std are missing and the model has no
            configuration.
    """
    if isinstance(given, Preprocessing):
        _check_size(given.input_size, description)
        return given
    if given is not None and not isinstance(given, Mapping):
        raise VpError(
            f"`preprocessing` is a {type(given).__name__}", expected="a dict such as timm's data configuration"
        )
    stated = dict(given or {})
    if (size := stated.pop("input_size", None)) is not None:
        _check_size(size, description)
    known = [field.name for field in fields(PreprocessingOverrides)]
    if strange := sorted(set(stated) - set(known)):
        raise VpError(f"`preprocessing` holds {strange[0]!r}", expected=f"only {', '.join([*known, 'input_size'])}")
    if not getattr(vit, "pretrained_cfg", None) and not {"mean", "std"} <= set(stated):
        raise VpError(
            f"{description.name} has no `pretrained_cfg`, so how its images are prepared is unknown",
            expected="`preprocessing` with mean and std",
            fix="state what it was trained with: dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)",
        )
    return preprocessing_of(vit, description, PreprocessingOverrides(**stated))


def _check_size(size: Sequence[int], description: ModelSpec) -> None:
    if tuple(size)[-2:] != description.image_size:
        raise VpError(
            f"`preprocessing` is for images of {list(size)}",
            expected=f"{[description.in_chans, *description.image_size]}, as the model takes",
        )


def preprocessing_of(
    vit: nn.Module, description: ModelSpec, overrides: PreprocessingOverrides = PreprocessingOverrides()
) -> Preprocessing:
    """timm's evaluation transform of a model, at its current image size.

    Raises:
        VpError: if an override is invalid, or the model does not take three channels.
    """
    if description.in_chans != 3:
        raise VpError(f"{description.name} takes {description.in_chans} channels", expected="3: RGB images")
    config: dict[str, Any] = resolve_model_data_config(vit)
    crop_pct = config["crop_pct"] if overrides.crop_pct is None else overrides.crop_pct
    if not 0 < crop_pct <= 1:
        raise VpError(f"`crop_pct` is {crop_pct}", expected="above 0 and at most 1")
    interpolation = overrides.interpolation or config["interpolation"]
    if interpolation not in INTERPOLATIONS:
        # timm's "random" is for training
        interpolation = "bicubic" if overrides.interpolation is None else interpolation
    if interpolation not in INTERPOLATIONS:
        raise VpError(f"`interpolation` is {interpolation!r}", expected=f"one of {', '.join(INTERPOLATIONS)}")
    for name, values in (("mean", overrides.mean), ("std", overrides.std)):
        if values is not None and len(values) != 3:
            raise VpError(f"`{name}` has {len(values)} values", expected="3, one for each channel, as 0.5,0.5,0.5")
        if values is not None and (not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0)):
            raise VpError(f"`{name}` is {list(values)}", expected="finite numbers, above 0 for `std`")
    height, width = description.image_size
    # As in timm.data.transforms_factory: floor, and one number (the shorter side) for a square input.
    scaled = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    crop_mode = overrides.crop_mode or config.get("crop_mode") or "center"
    if crop_mode not in CROP_MODES:
        raise VpError(f"`crop_mode` is {crop_mode!r}", expected=f"one of {', '.join(CROP_MODES)}")
    square = scaled[0] == scaled[1] and crop_mode == "center"
    return Preprocessing.model_validate(
        {
            "input_size": (3, height, width),
            "resize": scaled[0] if square else scaled,
            "crop_mode": crop_mode,
            "interpolation": interpolation,
            "mean": tuple(overrides.mean or config["mean"]),
            "std": tuple(overrides.std or config["std"]),
        }
    )
