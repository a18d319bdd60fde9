"""Read weights from files without executing code, copy them into a model, and compute their fingerprint.

Reads safetensors files, and checkpoints through torch.load(weights_only=True), which rejects pickled code except for
one class that timm also allows: argparse.Namespace, in which training scripts keep their arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.errors import WeightsError
from vp_exporter.utils.file_types import kind_of

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pyth")
# Common file names in a training script's output folder, best first.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model_best.pth.tar", "last.pth.tar", "pytorch_model.pth")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor of a file, and the file's metadata (safetensors only).

    Returns:
        Tensors by name; keys of nested mappings are joined with dots, as in `state_dict.blocks.0.norm1.weight`.
        `vp_exporter.model.state_dicts` finds the model among them.

    Raises:
        WeightsError: if the file is missing, has another format, contains pickled code or no weights.
    """
    if path.is_dir():
        raise _folder(path)
    if not path.is_file():
        remote = path.parts[:1] in (("http:",), ("https:",), ("s3:",), ("gs:",))
        raise WeightsError(
            f"there is no weights file {path}",
            expected="a .safetensors or .pth file",
            fix="download it first, and name the file" if remote else "",
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES or _is_checkpoint(path):
        return _read_torch(path), {}
    kind = kind_of(path)
    raise WeightsError(
        f"the weights file {path} ends in {path.suffix!r}",
        expected=f".safetensors or {', '.join(TORCH_SUFFIXES)}",
        fix=f"it is {kind}" if kind else "",
    )


def _folder(path: Path) -> WeightsError:
    fix = ""
    inside = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
    if inside:
        fix = f"name {path / inside}"
    elif (path / ".metadata").is_file():
        convert = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth"
        fix = f"it is a distributed checkpoint; convert it: {convert}"
    return WeightsError(
        f"there is no weights file {path}: it is a folder", expected="a .safetensors or .pth file", fix=fix
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if _is_checkpoint(path):
            raise WeightsError(
                f"{path} is not safetensors: it looks like a pickle or zip checkpoint",
                expected="a safetensors file",
                fix="convert it with safetensors.torch.save_file, or name it .pth if it is a checkpoint of tensors",
            ) from error
        raise WeightsError(
            f"{path} is damaged: {error}", expected="a safetensors file", fix="copy or download it again"
        ) from error


def _is_checkpoint(path: Path) -> bool:
    """Whether a file starts like those of torch.save: a zip archive, or a pickle of protocol 2 or later."""
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head == b"PK" or (head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types: pickle, zip, EOF, runtime
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript model", expected="a state dict",
                fix="save model.state_dict() of the timm model that it was made of",
            ) from error  # fmt: skip
        if "weights_only" in str(error) or "Unsupported" in str(error):
            name = _refused(path, str(error))
            raise WeightsError(
                f"{path} holds pickled objects that could run code",
                expected="tensors only",
                fix="save the state dict alone, best as .safetensors; it is never loaded otherwise"
                + (f" (it names {name})" if name else ""),
            ) from error
        # Short, and never just a number: torch raises KeyError(101) for the byte "e", and EOFError() for an empty file.
        first = (str(error).splitlines() or [""])[0].split(". ")[0]
        reason = first if isinstance(error, OSError | RuntimeError) and first else "it is damaged, or no checkpoint"
        raise WeightsError(
            f"cannot read {path}: {reason}", expected="a file that torch.save wrote", fix="copy or download it again"
        ) from error
    tensors = dict(_tensors(data, "")) if isinstance(data, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no state dict", expected="a mapping of parameter names to tensors")
    return tensors


def _refused(path: Path, message: str) -> str:
    """Name of the global that was rejected, from the message; else the first that would be rejected; else ""."""
    found = re.search(r"(?:GLOBAL|class|global:?)\s+[`'\"]?([A-Za-z_][\w.]*\.\w+)", message)
    if found:
        return found.group(1)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive
        return ""
    return names[0] if names else ""


def _tensors(data: Mapping[Any, Any], prefix: str, depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and depth:
            yield from _tensors(value, name + ".", depth - 1)


def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model. Every parameter must be given, and none left over.

    Args:
        source: Name of the file in messages.

    Raises:
        WeightsError: naming the first parameter that is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise WeightsError(
                f"{name} in {source} has shape {list(weights[name].shape)}",
                expected=f"{list(tensor.shape)}, as the model has",
                fix="name the model that the weights belong to" + _shape_hint(name),
            )
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has left over", extra)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise WeightsError(
            f"{source} {what} {names[0]}{more}", expected=f"the {len(wanted)} parameters of the model",
            fix="name the model that the weights belong to" + _name_hint(missing, extra),
        )  # fmt: skip
    whole = (name for name, tensor in weights.items() if not tensor.is_floating_point())
    quantised = next((name for name in whole if wanted[name].is_floating_point()), None)
    if quantised:
        raise WeightsError(
            f"{quantised} in {source} has dtype {str(weights[quantised].dtype).removeprefix('torch.')}",
            expected="floating-point weights",
            fix="name the checkpoint from before quantisation",
        )
    broken = next((n for n, t in weights.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if broken:
        raise WeightsError(f"{broken} in {source} holds NaN or infinity", expected="finite weights")
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in weights.items()})


def classes_of(weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes in the head of a state dict: 0 without a head, None if unknown."""
    heads = [t for n, t in weights.items() if n.rsplit(".", 2)[-2:] == ["head", "weight"] and t.ndim == 2]
    return heads[0].shape[0] if heads else (0 if any("blocks." in name for name in weights) else None)


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and content of every parameter and buffer in the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(data.dtype), list(data.shape)]).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shape_hint(name: str) -> str:
    if name.startswith("head"):
        return ", or its classes with `num_classes`"
    return ", or its image size with `img_size`" if name == "pos_embed" else ""


def _name_hint(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Suggestion for a common cause of mismatching names."""
    extra_text, missing_text = " ".join(extra), " ".join(missing)
    if "lora_" in extra_text:
        return "; these are LoRA adapters: merge them into the model first (peft: merge_and_unload)"
    if "fc_norm." in extra_text and "fc_norm." not in missing_text:
        return ", or give model argument `global_pool=avg`: these weights average the patches"
    if "ls1.gamma" in extra_text and "ls1.gamma" not in missing_text:
        return ", or give model argument `init_values=1e-5`: these weights have LayerScale"
    if "reg_token" in extra_text:
        return ", one with register tokens"
    return ""
