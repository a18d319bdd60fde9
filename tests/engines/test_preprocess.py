"""Our Pillow-only preprocessing against timm's eval transform, pixel for pixel, on edge-case sizes and modes."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from tests.pairwise import pairwise
from vp_engines.errors import InputError
from vp_engines.manifest import Preprocessing
from vp_engines.preprocess import IMAGE_SUFFIXES, preprocess, readable_suffixes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient, which reveals a shift by a single pixel."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 128, height)[:, None, None] + np.linspace(0, 64, width)[None, :, None]
    pixels = (ramp + rng.integers(0, 64, (height, width, 4))).astype(np.uint8)
    rgba = Image.fromarray(pixels, "RGBA")
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    if mode == "PA":
        return rgba.convert("LA").convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), pixels[..., :3].tobytes())
    return rgba.convert("RGB").convert(mode)


def spec_like_timm(
    size: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str, **changes: Any
) -> Preprocessing:
    """Manifest entry for timm's settings, derived as in the exporter."""
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
    # As in timm's ImageDataset.
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


@pytest.mark.parametrize(
    ("crop_pct", "size", "crop_mode"),
    pairwise([0.875, 0.9, 1.0], SIZES, ["center", "squash", "border"]),
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_equal_to_timm_on_awkward_sizes(crop_pct: float, size: tuple[int, int], crop_mode: str) -> None:
    check(picture(*size), (64, 64), crop_pct, crop_mode, "bicubic")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_equal_to_timm_in_every_interpolation(interpolation: str, crop_mode: str) -> None:
    check(picture(97, 61), (48, 48), 0.875, crop_mode, interpolation)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (33, 47), (224, 221)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_equal_to_timm_on_targets_that_are_not_square(size: tuple[int, int], crop_mode: str) -> None:
    for width, height in [(97, 61), (61, 97), (20, 20), (640, 427)]:
        check(picture(width, height), size, 0.875, crop_mode, "bicubic")


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "PA", "CMYK", "1", "YCbCr", "HSV", "LAB"])
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
    with pytest.raises(InputError, match=r"number 0 of the batch is a int; expected a path, bytes"):
        preprocess([5], SPEC)  # type: ignore[list-item]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = np.random.default_rng(4).integers(0, 65536, (61, 97)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "big-endian", "image", "array", "array-with-channel"])
def test_grey_images_of_16_bits_are_scaled(kind: str) -> None:
    """Pillow's own conversion clips them to white."""
    deep: Any = Image.fromarray(GREY)
    if kind in ("PNG", "TIFF"):
        deep = encoded(deep, kind)
    elif kind == "PGM":
        deep = b"P5 97 61 65535\n" + GREY.astype(">u2").tobytes()
    elif kind == "big-endian":
        deep = Image.frombytes("I;16B", (97, 61), GREY.astype(">u2").tobytes())
    elif kind.startswith("array"):
        deep = GREY[..., None] if kind.endswith("channel") else GREY
    shallow = np.rint(GREY / 257).astype(np.uint8)  # no value lies halfway: 257 is odd
    assert np.array_equal(preprocess([deep], SPEC), preprocess([Image.fromarray(shallow)], SPEC))


def test_colours_of_16_bits() -> None:
    """Scaled as by torchvision's reader, within one level."""
    torchvision = pytest.importorskip("torchvision.io")
    values = np.random.default_rng(5).integers(0, 65536, (48, 48, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 48, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    spec = spec_like_timm((48, 48), 1.0, "center", "bicubic", mean=[0.0] * 3, std=[1.0] * 3)
    ours = preprocess([data], spec)[0] * 255
    torch = pytest.importorskip("torch")
    theirs = torchvision.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8)).numpy()
    assert theirs.dtype in (np.uint8, np.uint16)
    scale = 1 if theirs.dtype == np.uint8 else 257
    assert np.abs(ours - theirs.astype(np.float64) / scale).max() <= 1


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_no_known_range_are_refused(mode: str) -> None:
    image = Image.fromarray(np.full((8, 8), 1000, np.int32 if mode == "I" else np.float32))
    for one in (image, encoded(image, "TIFF")):
        with pytest.raises(InputError, match=r"whose range is not known; expected 8 or 16 bits.*scale it"):
            preprocess([one], SPEC)


def test_transparency_is_dropped_as_in_timm(recwarn: pytest.WarningsRecorder) -> None:
    palette = picture(97, 61).quantize(16)
    palette.info["transparency"] = bytes(range(16))
    with Image.open(io.BytesIO(encoded(palette, "PNG", transparency=bytes(range(16))))) as opened:
        assert isinstance(opened.info["transparency"], bytes)
        got = preprocess([opened], SPEC)[0]
        assert not recwarn.list  # Pillow warns about such a conversion
        expected = timm_result(opened, (48, 48), 0.875, "center", "bicubic")
    assert np.abs(got - expected).max() < 1e-6


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(kind: str) -> None:
    first, second = picture(40, 30), Image.new("RGB", (40, 30))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
        expected = preprocess([opened.convert("RGB")], SPEC)
    assert np.array_equal(preprocess([data], SPEC), expected)
    assert np.abs(expected - preprocess([first], SPEC)).max() < 0.5


def test_arrays_are_images() -> None:
    image = picture(97, 61)
    pixels = np.asarray(image)
    expected = preprocess([image], SPEC)
    for one in (pixels, np.ascontiguousarray(pixels), np.asfortranarray(pixels), np.flip(np.flip(pixels, 1), 1)):
        assert np.array_equal(preprocess([one], SPEC), expected)
    assert np.array_equal(preprocess(np.stack([pixels, pixels]), SPEC), np.concatenate([expected, expected]))
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(preprocess([grey], SPEC), preprocess([image.convert("L")], SPEC))
    assert np.array_equal(preprocess([grey[..., None]], SPEC), preprocess([grey], SPEC))
    alpha = np.dstack([pixels, np.zeros_like(grey)])
    assert np.array_equal(preprocess([alpha], SPEC), expected)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (
            np.zeros((3, 40, 50), np.uint8),
            r"an array of uint8 \[3, 40, 50\]; .*transpose\(1, 2, 0",
        ),
        (np.zeros((40, 50, 3), np.float32), r"an array of float32 .*scale it to 0 to 255"),
        (np.zeros((40, 50, 2), np.uint8), r"an array of uint8 \[40, 50, 2\]"),
        (np.zeros((0, 50, 3), np.uint8), r"expected at least one pixel"),
        (np.zeros((40, 50, 3), bool), r"an array of bool"),
        (np.zeros(40, np.uint8), r"an array of uint8 \[40\]"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match="image number 0 of the batch is " + says if "pixel" not in says else says):
        preprocess([array], SPEC)


def test_one_array_is_not_a_batch() -> None:
    with pytest.raises(InputError, match=r"images is an array of uint8 .*put a single image into a list"):
        preprocess(np.zeros((40, 50, 3), np.uint8), SPEC)


def test_bytes_in_every_form(tmp_path: Path) -> None:
    data = encoded(picture(97, 61), "PNG")
    expected = preprocess([data], SPEC)
    for one in (bytearray(data), memoryview(data), io.BytesIO(data)):
        assert np.array_equal(preprocess([one], SPEC), expected)
    (tmp_path / "a.png").write_bytes(data)
    with (tmp_path / "a.png").open("rb") as file:
        assert np.array_equal(preprocess([file], SPEC), expected)


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    for one in (tmp_path / "a.jpg", b""):
        with pytest.raises(InputError, match=r"it is empty \(0 bytes\)"):
            preprocess([one], SPEC)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_pillow_only_warns_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500_000)
    with pytest.raises(InputError, match="2000 x 1000 pixels, which could be a decompression bomb: at most 1500000"):
        preprocess([encoded(Image.new("1", (2000, 1000)), "PNG")], SPEC)


def test_suffixes_are_those_that_pillow_reads() -> None:
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"} <= readable_suffixes()
    assert readable_suffixes() <= IMAGE_SUFFIXES
    avif = bool(features.check("avif"))
    assert (".avif" in readable_suffixes()) == avif
    if avif:
        image = picture(97, 61)
        data = encoded(image, "AVIF", quality=100, subsampling="4:4:4")
        assert np.abs(preprocess([data], SPEC) - preprocess([image], SPEC)).mean() < 0.05


def test_heic_needs_its_plug_in(tmp_path: Path) -> None:
    if ".heic" in readable_suffixes():
        pytest.skip("pillow-heif is installed")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InputError, match=r"Pillow does not read \.heic here; 'pip install pillow-heif'"):
        preprocess([tmp_path / "a.heic"], SPEC)
