"""The preprocessing that a model was trained with, from its timm configuration, as the bundle states it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from timm.data import resolve_model_data_config

from vp_engines.errors import VpError
from vp_engines.manifest import Preprocessing
from vp_exporter.model.spec import ModelSpec

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")


@dataclass(frozen=True)
class PreprocessingOverrides:
    """What the user states in place of timm's configuration; None leaves timm's.

    Attributes:
        crop_pct: the model's input size over the size that the image is resized to, in (0, 1].
        mean, std: per channel, on the scale 0 to 1.
    """

    crop_pct: float | None = None
    interpolation: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def preprocessing_of(
    vit: nn.Module, description: ModelSpec, overrides: PreprocessingOverrides = PreprocessingOverrides()
) -> Preprocessing:
    """timm's evaluation transform of a model, at the image size that it has now.

    Raises:
        VpError: an override that makes no sense, or a model that does not take three channels.
    """
    if description.in_chans != 3:
        raise VpError(f"{description.name} takes {description.in_chans} channels", expected="3: RGB images")
    config: dict[str, Any] = resolve_model_data_config(vit)
    crop_pct = config["crop_pct"] if overrides.crop_pct is None else overrides.crop_pct
    if not 0 < crop_pct <= 1:
        raise VpError(f"--crop-pct is {crop_pct}", expected="above 0 and at most 1")
    interpolation = overrides.interpolation or config["interpolation"]
    if interpolation not in INTERPOLATIONS:
        interpolation = "bicubic" if overrides.interpolation is None else interpolation  # timm's "random" is training
    if interpolation not in INTERPOLATIONS:
        raise VpError(f"--interpolation is {interpolation!r}", expected=f"one of {', '.join(INTERPOLATIONS)}")
    for name, values in (("mean", overrides.mean), ("std", overrides.std)):
        if values is not None and len(values) != 3:
            raise VpError(f"--{name} has {len(values)} values", expected="3, one for each channel, as 0.5,0.5,0.5")
        if values is not None and (not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0)):
            raise VpError(f"--{name} is {list(values)}", expected="finite numbers, above 0 for --std")
    height, width = description.image_size
    # As timm.data.transforms_factory: floor, and one number (the shorter side) for a square input.
    scaled = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    crop_mode = config.get("crop_mode") or "center"
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
