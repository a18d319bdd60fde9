"""Options of a method: amount, blocks, and the method's own arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vp_engines.errors import VpError

SHAPES = ("constant", "decreasing", "increasing")
MOST = 1_000_000  # tokens, as in a plan: far above any ViT, and safe from float overflow


@dataclass(frozen=True)
class MethodOptions:
    """A method's name and options, each checked for its range; `MethodRequest` checks which can be combined.

    Exactly one field sets the amount of reduction: `r`, `keep_rate`, `target_macs`, `preset`, or lists in `args`,
    depending on the method.

    Attributes:
        method: A name in vp_exporter.methods.METHODS.
        preset: A name in vp_exporter.methods.PRESETS; sets the token counts.
        r: Tokens removed per block: one number for every acting block (the mean, if `schedule` is a slope), or a list,
            padded with 0.
        schedule: "constant" (default), "decreasing" (2r to 0) or "increasing" (0 to 2r).
        blocks: Acting blocks, 0-based and ascending; None for the method's default.
        keep_rate: Share of patch tokens that a stage keeps, in (0, 1).
        tau: Threshold of ppt on the variance of the scores.
        target_macs: Share of the dense model's MACs, in (0, 1).
        seed: Seed of method "random"; None for 0.
        proportional_attention: None for the paper's setting.
        args: Arguments of the method, JSON values.

    Raises:
        VpError: if a value is out of range.
    """

    method: str
    preset: str | None = None
    r: int | tuple[int, ...] | None = None
    schedule: str | None = None
    blocks: tuple[int, ...] | None = None
    keep_rate: float | None = None
    tau: float | None = None
    target_macs: float | None = None
    seed: int | None = None
    proportional_attention: bool | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows: tuple[Any, ...] = self.r if isinstance(self.r, tuple) and self.r else (self.r,)
        low = 0 if isinstance(self.r, tuple) else 1
        odd = [r for r in rows if r is not None and not _is_whole(r, low)]
        if odd:
            raise VpError(
                f"`r` is {odd[0]!r}",
                expected="a whole number from 1, such as 13, or a list with one for each acting block, such as 0,6,8",
            )
        if self.schedule is not None and self.schedule not in SHAPES:
            raise VpError(f"`schedule` is {self.schedule!r}", expected=f"one of {', '.join(SHAPES)}")
        if self.schedule is not None and isinstance(self.r, tuple):
            raise VpError("`schedule` is given with a list of r", expected="one number, whose blocks it shapes")
        if self.schedule is not None and self.keep_rate is not None:
            raise VpError(
                "`schedule` is given with `keep_rate`", expected="`schedule` with `r`, whose blocks it shapes"
            )
        if self.blocks is not None:
            bad = not self.blocks or any(not _is_whole(block, 0) for block in self.blocks)
            if bad or any(a >= b for a, b in zip(self.blocks, self.blocks[1:], strict=False)):
                raise VpError(f"`blocks` is {list(self.blocks)}", expected="ascending 0-based blocks, such as 3,6,9")
        for name in ("keep_rate", "target_macs"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < 1):
                what = "the share of patch tokens that stay" if name == "keep_rate" else "a share of the dense MACs"
                raise VpError(f"{label(name)} is {value!r}", expected=f"{what}, above 0 and below 1, such as 0.7")
        if self.tau is not None and not (_is_number(self.tau) and self.tau >= 0):
            raise VpError(f"`tau` is {self.tau!r}", expected="a finite number, at least 0, such as 7e-5")
        if self.seed is not None and not _is_whole(self.seed, 0):
            raise VpError(f"`seed` is {self.seed!r}", expected="a whole number, at least 0")

    def _has(self, name: str) -> bool:
        return name in self.args or getattr(self, name, None) is not None

    def asked(self) -> dict[str, Any]:
        """The options that are set, as JSON values: the plan's `budget`."""
        found: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "method" or value is None or (entry.name == "args" and not value):
                continue
            found[entry.name] = list(value) if isinstance(value, tuple) else value
        if "args" in found:
            found["args"] = dict(self.args)
        return found


def label(name: str, *, arg: bool = False) -> str:
    """Name of a field, or of an argument of the method, in messages."""
    return f"method argument `{name}`" if arg else f"`{name}`"


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
