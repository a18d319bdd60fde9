"""Preprocessing in the manifest, applied by vp_engines.preprocess, against timm's own evaluation transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from vp_engines.errors import VpError
from vp_engines.preprocess import preprocess
from vp_exporter.model.describe import describe
from vp_exporter.model.preprocessing import PreprocessingOverrides, preprocessing_of
from vp_exporter.model.spec import ModelSpec

# name, arguments, then the expected (crop mode, resize), calculated by hand.
MODELS: dict[str, tuple[str, dict[str, Any], str, Any]] = {
    "crop-0.9-half-mean": ("vit_small_patch16_224", {}, "center", 248),  # floor(224 / 0.9) = floor(248.9)
    "crop-0.9-imagenet-mean": ("deit_small_patch16_224", {}, "center", 248),
    "384": ("vit_base_patch16_384", {}, "center", 384),
    "siglip": ("vit_base_patch16_siglip_224", {}, "center", 248),
    "siglip-squash": ("vit_base_patch16_siglip_224.webli", {}, "center", 248),
    "clip-0.95": ("vit_base_patch16_clip_224", {}, "center", 235),  # floor(224 / 0.95) = floor(235.8)
    "squash": ("eva_giant_patch14_336", {}, "squash", (336, 336)),
    "dinov2-518": ("vit_small_patch14_dinov2", {}, "center", 518),
    "larger-image": ("vit_small_patch16_224", {"img_size": 288}, "center", 320),
    "wide": ("vit_small_patch16_224", {"img_size": (160, 224)}, "center", (177, 248)),
    "tall": ("deit_small_patch16_224", {"img_size": (240, 96)}, "center", (266, 106)),
    "wide-squash": ("eva_giant_patch14_336", {"img_size": (140, 224)}, "squash", (140, 224)),
}
# (width, height) as in Pillow: square, both orientations, odd differences, smaller than the input, a strip.
SIZES = [(256, 256), (500, 333), (333, 500), (501, 334), (97, 64), (61, 300)]


def make(name: str, args: dict[str, Any]) -> tuple[nn.Module, ModelSpec]:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, depth=1, **args)
    return model, describe(model, name)


def pictures(seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    noise = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
    images = [Image.fromarray(pixels) for pixels in noise]
    return [*images, images[1].convert("L"), images[2].convert("P")]


def timms_result(vit: nn.Module, size: tuple[int, int], images: list[Image.Image], **changes: Any) -> np.ndarray:
    config = {**resolve_model_data_config(vit), "input_size": (3, *size), **changes}
    transform = create_transform(**config, is_training=False)
    return np.stack([transform(image.convert("RGB")).numpy() for image in images])


@pytest.mark.parametrize("case", MODELS)
def test_pixels_equal_timms(case: str) -> None:
    name, args, crop_mode, resize = MODELS[case]
    vit, description = make(name, args)
    spec = preprocessing_of(vit, description)
    assert (spec.input_size, spec.crop_mode) == ((3, *description.image_size), crop_mode)
    assert (tuple(spec.resize) if isinstance(spec.resize, list | tuple) else spec.resize) == resize
    images = pictures(seed=len(case))
    theirs = timms_result(vit, description.image_size, images)
    ours = preprocess(images, spec)
    assert ours.shape == theirs.shape == (len(images), 3, *description.image_size)
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize(
    "override",
    [
        {"crop_pct": 0.8},
        {"crop_pct": 1.0},
        {"interpolation": "bilinear"},
        {"interpolation": "nearest"},
        {"interpolation": "lanczos"},
        {"mean": [0.0, 0.0, 0.0]},
        {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]},
        {"crop_pct": 0.7, "interpolation": "bilinear", "std": (1.0, 1.0, 1.0)},
    ],
    ids=str,
)
def test_overrides(override: dict[str, Any]) -> None:
    vit, description = make("deit_small_patch16_224", {"img_size": 64})
    images = pictures(seed=7)
    spec = preprocessing_of(vit, description, PreprocessingOverrides(**override))
    ours, theirs = preprocess(images, spec), timms_result(vit, (64, 64), images, **override)
    assert np.abs(ours - theirs).max() < 1e-5  # a standard deviation of 0.1 gives values up to 9
    assert np.abs(ours - preprocess(images, preprocessing_of(vit, description))).max() > 0.01  # it had an effect


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"crop_pct": 0.0}, r"`crop_pct` is 0\.0; expected above 0 and at most 1"),
        ({"crop_pct": -0.5}, "`crop_pct` is -0.5"),
        ({"crop_pct": 1.01}, "`crop_pct` is 1.01"),
        ({"crop_pct": float("nan")}, "`crop_pct` is nan"),
        ({"interpolation": "cubic"}, "`interpolation` is 'cubic'; expected one of bicubic, bilinear, nearest, lanczos"),
        ({"interpolation": "random"}, "`interpolation` is 'random'"),
        ({"mean": [0.5]}, "`mean` has 1 values; expected 3, one for each channel"),
        ({"mean": []}, "`mean` has 0 values"),
        ({"std": [0.5] * 4}, "`std` has 4 values"),
        ({"mean": [0.5, float("nan"), 0.5]}, r"`mean` is \[0\.5, nan, 0\.5\]; expected finite"),
        ({"std": [0.5, float("inf"), 0.5]}, r"`std` is \[0\.5, inf, 0\.5\]; expected finite"),
        ({"std": [0.5, 0.0, 0.5]}, r"`std` is \[0\.5, 0\.0, 0\.5\]; .*above 0 for `std`"),
        ({"std": [0.5, -1.0, 0.5]}, r"`std` is .*above 0 for `std`"),
    ],
    ids=str,
)
def test_bad_overrides(override: dict[str, Any], says: str) -> None:
    vit, description = make("deit_small_patch16_224", {})
    with pytest.raises(VpError, match=says):
        preprocessing_of(vit, description, PreprocessingOverrides(**override))


def test_random_interpolation_is_for_training_only() -> None:
    vit, description = make("deit_small_patch16_224", {})
    vit.pretrained_cfg = {**vit.pretrained_cfg, "interpolation": "random"}  # type: ignore[dict-item, assignment]
    assert preprocessing_of(vit, description).interpolation == "bicubic"


def test_border_mode() -> None:
    vit, description = make("vit_small_patch16_224", {"img_size": 64})
    vit.pretrained_cfg = {**vit.pretrained_cfg, "crop_mode": "border"}  # type: ignore[dict-item, assignment]
    images = pictures(seed=3)
    ours = preprocess(images, preprocessing_of(vit, description))
    assert np.abs(ours - timms_result(vit, (64, 64), images)).max() < 1e-6


@pytest.mark.parametrize("channels", [1, 4])
def test_only_rgb(channels: int) -> None:
    vit, description = make("vit_tiny_patch16_224", {"in_chans": channels})
    with pytest.raises(VpError, match=rf"vit_tiny_patch16_224 takes {channels} channels; expected 3: RGB images"):
        preprocessing_of(vit, description)
