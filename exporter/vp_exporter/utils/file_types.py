"""Recognise the type of a file or folder that is not a bundle, plan or mask, by content, to give better errors."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vp_engines.errors import VpError

EXPECTED = "a bundle folder, a plan or a mask"
PLAN_FORMAT = "vp-plan"  # same as vp_exporter.plan.FORMAT, without the import
_EXPORT = "`vp.export` makes a bundle of it: `model=NAME` `weights={}` `plan=PLAN.json` `out=NAME.vpe`"
_ENGINE = "an engine is inspected in its bundle: vp-inspect NAME.vpe"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"ftrt", "a TensorRT engine"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program or library"),
    (b"\x89HDF", "an HDF5 file"),
)


def refuse(path: Path) -> None:
    """Raise if a path is recognised as something other than a bundle, plan or mask; otherwise return.

    Raises:
        VpError: naming the type.
    """
    if path.exists():
        found = _folder(path) if path.is_dir() else _file(path)
    else:
        raise VpError(f"there is no {path}", expected=EXPECTED)
    if found is not None:
        what, fix = found
        raise VpError(f"{path} is {what}", expected=EXPECTED, fix=fix)


def kind_of(path: Path) -> str:
    """Type of a file in a few words ("an ONNX model"); "" if unknown, or if it is a plan or mask."""
    found = _file(path)
    return found[0] if found is not None else ""


def _folder(path: Path) -> tuple[str, str] | None:
    if (path / "manifest.json").exists():
        return None
    names = sorted(entry.name for entry in path.iterdir())
    if {"engine", "plan.json"} <= set(names):
        return None  # a bundle without manifest, reported by its reader
    bundles = [name for name in names if (path / name / "manifest.json").is_file()]
    if bundles:
        more = f" and {len(bundles) - 1} more" if len(bundles) > 1 else ""
        return f"a folder that holds the bundle {bundles[0]}{more}", f"name {path / bundles[0]}"
    if "config.json" in names:
        config = _json(path / "config.json")
        if isinstance(config, dict) and "architecture" in config:
            model = f"local-dir:{path}"
            fix = f"`vp.export` makes a bundle of it: `model={model}` `pretrained=True` `plan=FILE` `out=NAME.vpe`"
            return f"a folder of the timm model {config['architecture']}", fix
        if isinstance(config, dict) and "model_type" in config:
            return f"a folder of transformers' {config['model_type']!r}", _EXPORT.format(path / "model.safetensors")
    if "config.pbtxt" in names or any((path / name / "config.pbtxt").is_file() for name in names):
        return "a model repository of Triton Inference Server", "inspect the bundle that vp-serve made it of"
    if "report.json" in names or "report.html" in names:
        return "a folder with a report of vp-validate", "open its report.html, or name the bundle"
    plans = [name for name in names if name.endswith(".json") and _is_plan(_json(path / name))]
    if plans:
        return f"a folder of {_count(len(plans), 'plan')}", f"name one of them, such as {path / plans[0]}"
    if not names:
        return "an empty folder", "check the path"
    if _holds_images(path, names):
        return "a folder of images", "they are for `data` of `vp.export` and `vp.validate`, or for `vp.search`"
    weights = [name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx"))]
    if weights:
        return f"a folder without a manifest, with {weights[0]} in it", f"name {path / weights[0]} to hear what it is"
    return None


def _holds_images(path: Path, names: Sequence[str]) -> bool:
    from vp_engines.preprocess import IMAGE_SUFFIXES

    def image(name: str) -> bool:
        return Path(name).suffix.lower() in IMAGE_SUFFIXES

    folders = [path / name for name in names[:20] if (path / name).is_dir()]
    return any(map(image, names)) or any(image(entry.name) for folder in folders for entry in folder.iterdir())


def _file(path: Path) -> tuple[str, str] | None:
    if not path.is_file():
        return "a pipe or a device", ""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        return "an empty file", "copy or write it again"
    if head[:4] == b"PK\x03\x04" or head[:4] == b"PK\x05\x06":
        return _archive(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        return "a pickle, such as torch.save wrote before PyTorch 1.6", _EXPORT.format(path)
    if head[:6] == b"\x93NUMPY":
        return None
    if head[8:9] == b"{" and head[6:8] == b"\0\0":  # header length, then the JSON header
        return _safetensors(path)
    if head[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1", b"ftypheix"):
        return "an AVIF or HEIC image", _advice("image", path)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image", _advice("image", path)
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what, _advice(what, path)
    # ir_version, then one of these fields
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"*", b"B"):
        return "an ONNX model", f"{_ENGINE}; from the timm model itself, vp-export makes one"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        kind = text.lower()
        if b"<net" in kind or (path.suffix == ".xml" and path.with_suffix(".bin").exists()):
            return "an OpenVINO model", _ENGINE
        return ("a web page, such as a report", "open it in a browser") if b"html" in kind else ("an XML file", "")
    if text.startswith((b"{", b"[")):
        return _document(path)
    if path.suffix in (".json", ".npy", ".npz", ".safetensors"):
        return None  # possibly damaged, reported by their readers
    if b"\0" not in head:
        return "a text file", "class names are for `classes`" if path.suffix == ".txt" else ""
    return "no file of a kind that is known here", ""


def _advice(what: str, path: Path) -> str:
    if "image" in what:
        return "images are for `data`, or engine.preprocess([...]) in Python"
    if "archive" in what:
        return "unpack it, and name what is inside"
    return _ENGINE if "engine" in what else ""


def _archive(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "a zip archive that is cut short or damaged", "copy or download it again"
    if names and all(name.endswith(".npy") for name in names):
        known = {name.removesuffix(".npy") for name in names}
        if any(name.startswith(("Transformer/", "embedding/", "params/")) for name in known):
            return "an archive of JAX weights", "convert them with timm and give `weights=FILE.safetensors`"
        return None
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return (
            "a TorchScript model",
            "give `vp.export` the timm model's name and its weights: `model=NAME` `weights=FILE`",
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "a .pt2 package of torch.export or AOTInductor", _ENGINE
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch checkpoint", _EXPORT.format(path)
    if any(name == "manifest.json" or name.endswith("/manifest.json") for name in names):
        return "a zipped bundle", "unzip it, and name the folder"
    return f"a zip archive of {_count(len(names), 'file')}", "unzip it, and name what is inside"


def _safetensors(path: Path) -> tuple[str, str] | None:
    """Type of a safetensors file; None for a mask, or if it is not one after all."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(100 << 20, path.stat().st_size):
                return None
            header = json.loads(file.read(size))
    except (OSError, ValueError, struct.error):
        return None
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) <= 1 or not all(isinstance(entry, dict) and "shape" in entry for entry in tensors.values()):
        return None
    if "mask" in tensors:
        return None
    numbers = sum(_product(entry["shape"]) for entry in tensors.values())
    return f"the weights of a model ({len(tensors)} tensors, {numbers / 1e6:.1f} M values)", _EXPORT.format(path)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _document(path: Path) -> tuple[str, str] | None:
    data = _json(path)
    if not isinstance(data, dict) or _is_plan(data):
        return None
    if data.get("format") == "vpe":
        return "the manifest of a bundle", f"name the bundle's folder, {path.absolute().parent}"
    if "verdict" in data:
        return "a report of vp-validate", "name the bundle, or open report.html"
    if "architecture" in data or "model_type" in data:
        return "the configuration of a model", f"name its folder: `model=local-dir:{path.absolute().parent}`"
    if "weight_map" in data:
        return "the index of weights in several files", "join them into one .safetensors file for `weights`"
    return None


def _is_plan(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == PLAN_FORMAT


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
