"""A request for a model by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vp_engines.errors import VpError


@dataclass(frozen=True)
class ModelRequest:
    """A model by name, and its weights.

    Attributes:
        name: timm model, with or without a pretrained tag; `hf-hub:org/name`, `local-dir:FOLDER`, `timm/NAME`.
        args: Keyword arguments of timm.create_model.
        weights: A .safetensors or .pth file; `pretrained` from timm's hub (local-dir: from the folder); or
            `random_init`, for latency measurements.
        num_classes: None takes it from the weights, or timm's default; 0 omits the head.
        img_size: Height and width in pixels, or one number for both; None takes timm's default.
        use_ema: Averaged weights of a checkpoint that has both; None takes them if present.

    Examples:
        >>> import vp_exporter as vp
        >>> tiny = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
        >>> request = vp.ModelRequest("vit_tiny_patch16_224", tiny, random_init=True, num_classes=3)
        >>> plan = vp.build_plan("grid", request, keep_rate=0.5)
        >>> vp.reduce(request, plan).vit.head
        Linear(in_features=64, out_features=3, bias=True)
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    weights: str | os.PathLike[str] | None = None
    pretrained: bool = False
    random_init: bool = False
    num_classes: int | None = None
    img_size: int | tuple[int, int] | None = None
    use_ema: bool | None = None

    @property
    def file(self) -> Path | None:
        """The file of `weights`."""
        return None if self.weights is None else Path(self.weights)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of `img_size`.

        Raises:
            VpError: if it is neither one nor two whole numbers above 0.
        """
        given = self.img_size
        sides = given if given is None or isinstance(given, tuple) else (given, given)
        if sides is not None and (len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides)):
            raise VpError(f"`img_size` is {given!r}", expected="pixels: 384, or (height, width)")
        return sides
