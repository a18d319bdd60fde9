"""Turn images into the float32 batch that an engine takes, with Pillow and numpy alone.

Reproduces the pixels of timm's eval transform (torchvision on PIL images), including rounding, since a shift of half a
pixel changes logits. As in timm, images are converted to RGB as stored: EXIF orientation is not applied, so rotate such
photographs first; transparency is dropped, not composited; only the first frame of an animation is used. One case
differs, where timm is wrong: 16-bit grey images, which Pillow clips to white, are scaled to 8 bits.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from vp_engines.errors import EngineUnavailableError, InputError

if TYPE_CHECKING:
    from PIL import Image

    from vp_engines.manifest import Preprocessing

    ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | np.ndarray | Image.Image

# Formats that Pillow passes to another program (Ghostscript, the Windows metafile renderer): unsafe for untrusted
# files.
_FOREIGN_FORMATS = frozenset({"EPS", "WMF"})
# Common image formats; see `readable_suffixes` for those that can be read here.
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
        ".tif", ".tiff", ".gif", ".jp2", ".j2k", ".tga", ".avif", ".avifs", ".heic", ".heics", ".heif", ".hif",
    }
)  # fmt: skip
_KINDS = "a path, bytes, a PIL image or a uint8 array [height, width, 3]"


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Image suffixes that Pillow can read here, including those of pillow-heif if it is installed.

    Raises:
        EngineUnavailableError: if Pillow is not installed.
    """
    Image = _pillow()
    Image.init()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix in IMAGE_SUFFIXES if known.get(suffix) in Image.OPEN)


@functools.cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise EngineUnavailableError("Pillow is not installed", fix="install it with 'pip install pillow'") from None
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return Image


def preprocess(images: Sequence[ImageLike] | np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Prepare a batch.

    Args:
        images: At least one of: a path, an encoded file as bytes or as a binary file object, a PIL image (not
            modified), a pixel array (uint8 or uint16, [height, width] or [height, width, 1, 3 or 4], in RGB order as in
            Pillow, not BGR as in OpenCV); or one uint8 array [batch, height, width, 3].
        spec: Preprocessing from the manifest.

    Returns:
        float32 [len(images), 3, height, width], C-contiguous.

    Raises:
        InputError: if an image cannot be read or is too large (names the image), or there are no images.
        EngineUnavailableError: if Pillow is not installed.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if isinstance(images, (str, bytes, bytearray, memoryview)) or not isinstance(images, Sequence):
        kind = f"{_array(images)}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        raise InputError(
            f"images is {kind}",
            expected="a list of paths, bytes, PIL images or arrays",
            fix="put a single image into a list: [image]",
        )
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
    return repr(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else f"number {index} of the batch"


def _load(image: ImageLike, index: int) -> Image.Image:
    """Decode one image to RGB."""
    Image = _pillow()
    name = _name(image, index)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    source: Any = image
    if isinstance(image, (bytes, bytearray, memoryview)):
        source = io.BytesIO(image)
    elif not isinstance(image, (str, os.PathLike, Image.Image)) and not hasattr(image, "read"):
        kind = type(image).__name__
        fix = "give image.permute(1, 2, 0).numpy(), as uint8" if kind == "Tensor" else ""
        raise InputError(f"image {name} is a {kind}", expected=_KINDS, fix=fix)
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name)
        with Image.open(source) as opened:
            if opened.format in _FOREIGN_FORMATS:
                raise InputError(f"format {opened.format} is not read here", fix="convert it to PNG")
            limit = Image.MAX_IMAGE_PIXELS
            # Pillow itself only raises above twice the limit
            if limit is not None and opened.width * opened.height > limit:
                raise InputError(
                    f"{opened.width} x {opened.height} pixels, which could be a decompression bomb: at most {limit}"
                )
            return _to_rgb(opened, name)
    except _Refused:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise InputError(f"image {name} cannot be read: {_reason(error, source)}") from None


class _Refused(InputError):
    """An image that was read but is not accepted; the message is complete."""


def _reason(error: Exception, source: Any) -> str:
    from PIL import UnidentifiedImageError

    if not isinstance(error, UnidentifiedImageError):
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return " ".join(reason.split())[:200] or type(error).__name__
    size = len(source.getbuffer()) if isinstance(source, io.BytesIO) else _size(source)
    if size == 0:
        return "it is empty (0 bytes)"
    suffix = os.path.splitext(os.fspath(source))[1].lower() if isinstance(source, (str, os.PathLike)) else ""
    if suffix in IMAGE_SUFFIXES - readable_suffixes():
        package = "pip install pillow-heif" if suffix.startswith((".hei", ".hif")) else "pip install -U pillow"
        return f"Pillow does not read {suffix} here; '{package}'"
    return "no format that Pillow knows"


def _size(source: Any) -> int | None:
    try:
        return os.stat(source).st_size
    except (OSError, TypeError, ValueError):
        return None


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    from PIL import Image

    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    depth = pixels.dtype.itemsize if pixels.dtype.kind == "u" else 0
    if depth not in (1, 2) or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        fix = ""
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and channels not in (1, 3, 4):
            fix = "give image.transpose(1, 2, 0)"
        elif pixels.dtype.kind == "f":
            fix = "scale it to 0 to 255 and give .astype(np.uint8); what is preprocessed already goes to run()"
        raise InputError(f"image {name} is {_array(pixels)}", expected="uint8 [height, width, 3]", fix=fix)
    if pixels.size == 0:
        raise InputError(f"image {name} is {_array(pixels)}", expected="at least one pixel")
    if depth == 2:
        pixels = _to_8_bits(pixels)
    flat = pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(flat)).convert("RGB")


def _array(pixels: np.ndarray) -> str:
    return f"an array of {pixels.dtype} {list(pixels.shape)}"


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):  # older versions decode them as I
        values = np.asarray(image.convert("I") if mode != "I" else image)
        return Image.fromarray(_to_8_bits(values)).convert("RGB")
    if mode in ("I", "F"):
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise _Refused(
            f"image {name} has pixels of {kind}, whose range is not known",
            expected="8 or 16 bits a channel",
            fix="scale it to 8 bits and save it again",
        )
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colours, without Pillow's warning
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale 0 .. 65535 to 0 .. 255, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _fit(image: Image.Image, spec: Preprocessing, name: str) -> Image.Image:
    """Resize, then crop or pad an RGB image to `spec.input_size`."""
    from PIL import Image

    size = _resized(image.height, image.width, spec)
    limit = Image.MAX_IMAGE_PIXELS
    if min(size) < 1 or (limit is not None and size[0] * size[1] > limit):
        # A strip of 1 x 60000 pixels is small, but not once its shorter side is scaled to 256.
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
    """Crop the centre of an image, padding with `fill` if it is too small."""
    from PIL import Image

    if image.width < width or image.height < height:
        # The odd pixel of padding goes to the right and bottom.
        padded = Image.new("RGB", (max(image.width, width), max(image.height, height)), fill)
        padded.paste(image, (max(width - image.width, 0) // 2, max(height - image.height, 0) // 2))
        image = padded
    # round() rounds halves to even, as torchvision does.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
