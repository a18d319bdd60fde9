"""A tiny ViT as a user has it: a timm name with arguments, a weights file, a mask, a plan and images."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from vp_engines.manifest import MANIFEST_NAME, canonical_json
from vp_exporter.model.describe import describe
from vp_exporter.plan import PlanModel
from vp_exporter.plan.masks import plan_from_mask

NAME = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
CLASSES = 3
PATCHES = 16
COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220))
FAST = ("--seconds", "0.1", "--batch", "2")

Arguments = Mapping[str, Any]


class Inputs(NamedTuple):
    """Paths of the inputs of `vp-export`."""

    weights: Path
    mask: Path
    plan: Path
    data: Path


def model_args(**changes: Any) -> list[str]:
    """The tiny model as `KEY=VALUE` arguments."""
    return [f"{key}={value}" for key, value in {**ARGS, **changes}.items()]


def mask() -> np.ndarray:
    """A mask that drops 4 of the 16 patches at block 0 and 4 more at block 1."""
    rows = np.ones((ARGS["depth"], PATCHES))
    rows[:, ::4] = 0
    rows[1, 1::4] = 0
    return rows


def create(num_classes: int = CLASSES, **changes: Any) -> torch.nn.Module:
    """The tiny model with parameters far from their initial values, which could hide a missing one."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, num_classes=num_classes, **{**ARGS, **changes}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.08))
    return vit


def write_inputs(folder: Path) -> Inputs:
    """Write a classifier with images that it knows: 3 classes of 8 noisy images, one colour per class."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(folder / "weights.safetensors", folder / "mask.npy", folder / "plan.json", folder / "images")
    rng = np.random.default_rng(0)
    for name, colour in zip("abc", COLOURS, strict=True):
        (inputs.data / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(np.array(colour) + rng.normal(0, 20, (80, 72, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(inputs.data / name / f"{i}.png")
    vit = create()
    _fit_head(vit)
    save_file(vit.state_dict(), inputs.weights)
    np.save(inputs.mask, mask())
    plan_from_mask(mask(), PlanModel.of(describe(vit, NAME)), method="test").save(inputs.plan)
    return inputs


def _fit_head(vit: torch.nn.Module) -> None:
    """Fit the head by least squares on the three colours, without noise."""
    plain = torch.tensor(COLOURS).float().div(127.5).sub(1)[:, :, None, None].expand(-1, -1, 64, 64)
    with torch.no_grad():
        features = vit.forward_head(vit.forward_features(plain), pre_logits=True)
        vit.head.weight.copy_(10 * torch.linalg.lstsq(features, torch.eye(CLASSES)).solution.T)
        vit.head.bias.zero_()


def argv(options: Arguments) -> list[str]:
    """{"--out": path, "--force": True, "--batch": [1, 2], "--plan": None} -> arguments; None leaves an option out."""
    words: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        for item in value if isinstance(value, list | tuple) else (value,):
            words += [key] if item is True else [key, str(item)]
    return words


def export_options(inputs: Inputs, out: Path, **changes: Any) -> dict[str, Any]:
    """Options of a plain export, by default with a mask and without images.

    Args:
        changes: option (with _ for -, without the leading dashes) -> value; None removes it.
    """
    options = {
        "--model": NAME, "--model-arg": model_args(), "--weights": inputs.weights, "--masks": inputs.mask,
        "--out": out, "--seconds": 0.1, "--batch": 2,
    }  # fmt: skip
    return {**options, **{"--" + key.replace("_", "-"): value for key, value in changes.items()}}


def call(app: Callable[..., Any], *words: str | Path) -> Result:
    """Run a command in this process."""
    result: Result = CliRunner().invoke(app, [str(word) for word in words])  # type: ignore[arg-type]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file and folder below, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def check_error(result: Result, code: int, pattern: str) -> None:
    """Check for one matching line "error: ..." on stderr (besides warnings), no stdout, and the exit code."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), f"{lines[0]!r} does not match {pattern!r}"
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert result.exit_code == code


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as an attacker would, with a correct digest."""
    path = bundle / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    document.pop("digest")
    change(document)
    document["digest"] = hashlib.sha256(canonical_json(document)).hexdigest()
    path.write_bytes(canonical_json(document))


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
