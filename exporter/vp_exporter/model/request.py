"""A model by its name, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelRequest:
    """What the user names.

    Attributes:
        name: timm model, with or without a pretrained tag; `hf-hub:org/name`, `local-dir:FOLDER`, `timm/NAME`.
        args: keyword arguments of timm.create_model.
        weights: a .safetensors or .pth file; or `pretrained` from timm's hub (local-dir: from the folder); or
            `random_init` for latency studies.
        num_classes: None takes it from the weights, or timm's default; 0 leaves the head out.
        img_size: height and width in pixels; None takes timm's default.
        use_ema: averaged weights of a checkpoint that has both; None takes them where they are.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    pretrained: bool = False
    random_init: bool = False
    num_classes: int | None = None
    img_size: tuple[int, int] | None = None
    use_ema: bool | None = None
