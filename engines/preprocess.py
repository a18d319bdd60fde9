"""Image files -> the float32 batch that an engine takes, with Pillow and numpy alone.

Gives the pixels that timm's eval transform (torchvision on PIL images) gives, rounding rules included, since half a
pixel of shift already changes logits. As timm does, images are converted to RGB as they are stored: EXIF orientation is
not applied, so a photograph that relies on it should be turned upright beforehand.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vp_engines.errors import EngineUnavailableError, InputError

if TYPE_CHECKING:
    from PIL import Image

    from vp_engines.manifest import Preprocessing

    ImageLike = str | Path | bytes | Image.Image

# Formats that Pillow hands to a program outside (Ghostscript, the Windows metafile renderer): not for untrusted files.
_FOREIGN_FORMATS = frozenset({"EPS", "WMF"})


def preprocess(images: Sequence[ImageLike], spec: Preprocessing) -> np.ndarray:
    """Prepare a batch.

    Args:
        images: paths, encoded files as bytes, or PIL images (left as they are); at least one.
        spec: what to do, from the manifest.

    Returns:
        float32 [len(images), 3, height, width], C-contiguous.

    Raises:
        InputError: an image that cannot be read or is too large, named; or no images.
        EngineUnavailableError: Pillow is not installed.
    """
    if isinstance(images, (str, bytes, Path)) or not isinstance(images, Sequence):
        raise InputError(f"images is a {type(images).__name__}", expected="a list of paths, bytes or PIL images")
    if not images:
        raise InputError("the list of images is empty", expected="at least one image")
    _, height, width = spec.input_size
    batch = np.empty((len(images), 3, height, width), np.float32)
    mean = np.array(spec.mean, np.float32)[:, None, None]
    std = np.array(spec.std, np.float32)[:, None, None]
    for index, image in enumerate(images):
        pixels = np.asarray(_fit(_load(image, index), spec, _name(image, index)))  # uint8 [height, width, 3]
        batch[index] = (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std
    return batch


def _name(image: ImageLike, index: int) -> str:
    return repr(str(image)) if isinstance(image, (str, Path)) else f"number {index} of the batch"


def _load(image: ImageLike, index: int) -> Image.Image:
    """Decode one image to RGB."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise EngineUnavailableError("Pillow is not installed", fix="install it with 'pip install pillow'") from None
    if not isinstance(image, (str, Path, bytes, Image.Image)):
        kind = type(image).__name__
        raise InputError(f"image {_name(image, index)} is a {kind}", expected="a path, bytes or a PIL image")
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.format in _FOREIGN_FORMATS:
                raise InputError(f"format {opened.format} is not read here", fix="convert it to PNG")
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"image {_name(image, index)} cannot be read: no format that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = " ".join(reason.split())[:200]
        raise InputError(f"image {_name(image, index)} cannot be read: {text or type(error).__name__}") from None


def _fit(image: Image.Image, spec: Preprocessing, name: str) -> Image.Image:
    """Resize, then crop or pad an RGB image to `spec.input_size`."""
    from PIL import Image

    size = _resized(image.height, image.width, spec)
    limit = Image.MAX_IMAGE_PIXELS
    if min(size) < 1 or (limit is not None and size[0] * size[1] > limit):
        # A strip of 1 x 60000 pixels is small, but not once its shorter side is 256.
        raise InputError(
            f"image {name} of {image.height} x {image.width} pixels becomes {size[0]} x {size[1]} when resized",
            expected=f"1 to {limit} pixels",
        )
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling[spec.interpolation.upper()])
    fill = tuple(round(255 * value) for value in spec.mean) if spec.crop_mode == "border" else (0, 0, 0)
    return _center(image, spec.input_size[1], spec.input_size[2], fill)


def _resized(height: int, width: int, spec: Preprocessing) -> tuple[int, int]:
    """(height, width) after the resize step."""
    resize = spec.resize
    if resize is None:
        return height, width
    if spec.crop_mode == "center" and isinstance(resize, int):
        if width <= height:
            return int(resize * height / width), resize
        return resize, int(resize * width / height)
    target = (resize, resize) if isinstance(resize, int) else resize
    if spec.crop_mode == "squash":
        return target
    ratios = height / target[0], width / target[1]
    ratio = max(ratios) if spec.crop_mode == "border" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _center(image: Image.Image, height: int, width: int, fill: tuple[int, ...]) -> Image.Image:
    """The middle of an image, with a border of `fill` where it is too small."""
    from PIL import Image

    if image.width < width or image.height < height:
        # The odd pixel of a border goes to the right and the bottom.
        padded = Image.new("RGB", (max(image.width, width), max(image.height, height)), fill)
        padded.paste(image, (max(width - image.width, 0) // 2, max(height - image.height, 0) // 2))
        image = padded
    # Python rounds halves to even: so does torchvision, and the crop must start at the same pixel.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
