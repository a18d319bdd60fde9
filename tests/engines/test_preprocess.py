"""Our Pillow-only preprocessing against timm's eval transform, pixel for pixel, on sizes and modes that are awkward."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vp_engines.errors import InputError
from vp_engines.manifest import Preprocessing
from vp_engines.preprocess import preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient: every pixel counts, and a shift by one shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 128, height)[:, None, None] + np.linspace(0, 64, width)[None, :, None]
    pixels = (ramp + rng.integers(0, 64, (height, width, 4))).astype(np.uint8)
    rgba = Image.fromarray(pixels, "RGBA")
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    return rgba.convert("RGB").convert(mode)


def spec_like_timm(
    size: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str, **changes: Any
) -> Preprocessing:
    """The manifest's entry for timm's settings: the rule that the exporter follows."""
    scaled = [math.floor(side / crop_pct) for side in size]
    resize: Any = scaled[0] if crop_mode == "center" and scaled[0] == scaled[1] else scaled
    values: dict[str, Any] = {
        "input_size": [3, *size],
        "resize": resize,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": MEAN,
        "std": STD,
        **changes,
    }
    return Preprocessing(**values)


def timm_result(
    image: Image.Image, size: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str
) -> np.ndarray:
    data = pytest.importorskip("timm.data")
    pytest.importorskip("torchvision")
    transform = data.create_transform(
        input_size=(3, *size),
        is_training=False,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
    )
    # As timm's ImageDataset hands it over.
    result: np.ndarray = transform(image.convert("RGB")).numpy()
    return result


def check(image: Image.Image, size: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str) -> None:
    ours = preprocess([image], spec_like_timm(size, crop_pct, crop_mode, interpolation))[0]
    theirs = timm_result(image, size, crop_pct, crop_mode, interpolation)
    assert ours.shape == theirs.shape == (3, *size)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-6


SIZES = [
    (64, 64), (65, 64), (64, 65), (37, 91), (91, 37), (333, 500), (500, 333), (501, 334), (73, 73), (20, 30), (3, 2),
    (1, 1), (1, 50), (50, 1), (2, 75), (71, 72), (640, 427), (128, 64),
]  # fmt: skip


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_equal_to_timm_on_awkward_sizes(width: int, height: int, crop_mode: str, crop_pct: float) -> None:
    check(picture(width, height), (64, 64), crop_pct, crop_mode, "bicubic")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_equal_to_timm_in_every_interpolation(interpolation: str, crop_mode: str) -> None:
    check(picture(97, 61), (48, 48), 0.875, crop_mode, interpolation)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (33, 47), (224, 221)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_equal_to_timm_on_targets_that_are_not_square(size: tuple[int, int], crop_mode: str) -> None:
    for width, height in [(97, 61), (61, 97), (20, 20), (640, 427)]:
        check(picture(width, height), size, 0.875, crop_mode, "bicubic")


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1", "YCbCr", "I;16"])
def test_equal_to_timm_in_every_image_mode(mode: str) -> None:
    check(picture(97, 61, mode), (48, 48), 0.875, "center", "bicubic")


def test_equal_to_timm_when_the_resize_is_smaller_than_the_crop() -> None:
    for width, height in [(97, 61), (61, 97), (40, 41)]:
        check(picture(width, height), (48, 48), 1.3, "center", "bicubic")
        check(picture(width, height), (48, 49), 1.3, "squash", "bicubic")


def test_many_random_sizes() -> None:
    rng = np.random.default_rng(7)
    for _ in range(150):
        width, height = (int(n) for n in rng.integers(20, 300, 2))
        crop_mode = str(rng.choice(["center", "squash", "border"]))
        check(picture(width, height), (32, 32), float(rng.choice([0.875, 0.9, 0.95, 1.0])), crop_mode, "bilinear")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
def test_paths_strings_bytes_and_images_give_the_same(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    picture(97, 61).save(path)
    spec = spec_like_timm((48, 48), 0.875, "center", "bicubic")
    with Image.open(path) as opened:
        batch = preprocess([path, str(path), path.read_bytes(), opened], spec)
        expected = timm_result(opened, (48, 48), 0.875, "center", "bicubic")
    assert batch.shape == (4, 3, 48, 48)
    assert batch.flags.c_contiguous
    for row in batch:
        assert np.abs(row - expected).max() < 1e-6


def test_exif_orientation_is_not_applied_as_in_timm(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = tmp_path / "turned.jpg"
    picture(97, 61).save(path, exif=exif)
    with Image.open(path) as opened:
        expected = timm_result(opened, (48, 48), 0.875, "center", "bicubic")
    got = preprocess([path], spec_like_timm((48, 48), 0.875, "center", "bicubic"))[0]
    assert np.abs(got - expected).max() < 1e-6


def test_without_resize_the_middle_is_cut() -> None:
    image = picture(11, 9)
    spec = spec_like_timm((4, 4), 1.0, "center", "bicubic", resize=None, mean=[0.0] * 3, std=[1.0] * 3)
    pixels = np.asarray(image).transpose(2, 0, 1)
    # (9 - 4) / 2 = 2.5 and (11 - 4) / 2 = 3.5 round to the even 2 and 4.
    assert np.array_equal(preprocess([image], spec)[0] * 255, pixels[:, 2:6, 4:8].astype(np.float32))


def test_the_callers_image_is_left_as_it_is() -> None:
    image = picture(97, 61, "P")
    before = image.tobytes()
    preprocess([image], spec_like_timm((48, 48), 0.875, "center", "bicubic"))
    assert (image.mode, image.size, image.tobytes()) == ("P", (97, 61), before)


SPEC = spec_like_timm((48, 48), 0.875, "center", "bicubic")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(200, 200).save(buffer, "JPEG")
    cases = {
        "missing.png": None,
        "text.png": b"this is no image",
        "empty.png": b"",
        "cut.jpg": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "folder.png": ...,
    }
    good = tmp_path / "good.png"
    picture(9, 9).save(good)
    for name, content in cases.items():
        path = tmp_path / name
        if content is ...:
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)  # type: ignore[arg-type]
        with pytest.raises(InputError) as caught:
            preprocess([good, path], SPEC)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unreadable_bytes_are_named_by_their_place() -> None:
    with pytest.raises(InputError, match="number 1 of the batch"):
        preprocess([picture(9, 9), b"nothing"], SPEC)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_damaged_files_never_raise_anything_else() -> None:
    rng = np.random.default_rng(3)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        picture(40, 30).save(buffer, kind)
        sound = buffer.getvalue()
        for _ in range(60):
            data = bytearray(sound)
            for position in rng.integers(0, min(len(data), 400), 6):
                data[position] = int(rng.integers(256))
            try:
                preprocess([bytes(data)], SPEC)
            except InputError as error:
                assert "number 0" in str(error)  # noqa: PT017


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (2000, 1000)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    with pytest.raises(InputError, match="decompression bomb"):
        preprocess([buffer.getvalue()], SPEC)


def test_a_strip_that_would_grow_beyond_all_bounds_is_refused() -> None:
    strip = Image.new("RGB", (1, 60_000))
    wide = spec_like_timm((224, 224), 0.875, "center", "bicubic")
    with pytest.raises(InputError, match="60000 x 1 pixels becomes 15360000 x 256"):
        preprocess([strip], wide)


def test_a_side_of_zero_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="when resized"):
        preprocess([picture(1, 1000)], spec_like_timm((48, 48), 1.0, "border", "bicubic"))


def test_eps_is_not_handed_to_ghostscript() -> None:
    buffer = io.BytesIO()
    picture(9, 9).save(buffer, "EPS")
    with pytest.raises(InputError, match="EPS"):
        preprocess([buffer.getvalue()], SPEC)


@pytest.mark.parametrize("images", ["a.png", b"bytes", Path("a.png"), 5, None])
def test_one_image_is_not_a_batch(images: Any) -> None:
    with pytest.raises(InputError, match="list of paths"):
        preprocess(images, SPEC)


def test_an_empty_batch_and_a_stranger_in_it_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        preprocess([], SPEC)
    with pytest.raises(InputError, match="number 0 of the batch is a ndarray"):
        preprocess([np.zeros((3, 4, 4))], SPEC)  # type: ignore[list-item]
