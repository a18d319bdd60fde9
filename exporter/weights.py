"""Where weights come from, read without running anybody's code, and their fingerprint.

safetensors is read as such; .pth/.pt/.bin through torch.load(weights_only=True), which refuses pickled code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.errors import WeightsError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
# Where training scripts put the weights inside a checkpoint; averaged weights first, as timm does.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "model.")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a state dict and the file's metadata (safetensors only).

    Raises:
        WeightsError: no such file, another format, pickled code, or nothing that looks like weights.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}", expected="a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path), {}
    raise WeightsError(
        f"the weights file {path} ends in {path.suffix!r}", expected=f".safetensors or {', '.join(TORCH_SUFFIXES)}"
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
    """Whether a file starts as torch.save writes: a zip archive, or a pickle of protocol 2 or later."""
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError:
        return False
    return head == b"PK" or (head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, EOF, runtime: torch raises many kinds
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise WeightsError(
                f"{path} holds pickled objects that could run code",
                expected="tensors only",
                fix="save the state dict alone, best as .safetensors; it is never loaded otherwise",
            ) from error
        # Short, and never a bare number: torch raises KeyError(101) for the byte "e", and EOFError() for no bytes.
        first = (str(error).splitlines() or [""])[0].split(". ")[0]
        reason = first if isinstance(error, OSError | RuntimeError) and first else "it is damaged, or no checkpoint"
        raise WeightsError(
            f"cannot read {path}: {reason}", expected="a file that torch.save wrote", fix="copy or download it again"
        ) from error
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()) or not data:
        raise WeightsError(f"{path} holds no state dict", expected="a mapping of parameter names to tensors")
    return dict(data)


def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model: every parameter, none left over.

    Args:
        source: names the file in messages.

    Raises:
        WeightsError: names the first missing, left-over or differently shaped parameter.
    """
    weights = _without_prefix(weights, model)
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise WeightsError(
                f"{name} in {source} has shape {list(weights[name].shape)}",
                expected=f"{list(tensor.shape)}, as the model has",
                fix="name the model that the weights belong to" + _hint(name),
            )
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has left over", extra)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise WeightsError(
            f"{source} {what} {names[0]}{more}", expected=f"the {len(wanted)} parameters of the model",
            fix="name the model that the weights belong to",
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
    """How many classes the head of a state dict has: 0 where it has no head, None where that cannot be told."""
    heads = [t for n, t in weights.items() if n.rsplit(".", 2)[-2:] == ["head", "weight"] and t.ndim == 2]
    return heads[0].shape[0] if heads else (0 if any("blocks." in name for name in weights) else None)


def fingerprint(model: nn.Module) -> str:
    """sha256 over every parameter and buffer in the state dict: name, dtype, shape and bytes, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(data.dtype), list(data.shape)]).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_prefix(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    wanted = set(model.state_dict())
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights) and not wanted & set(weights):
            return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _hint(name: str) -> str:
    if name.startswith("head"):
        return ", or its classes with --num-classes"
    return ", or its image size with --model-arg img_size=..." if name == "pos_embed" else ""
