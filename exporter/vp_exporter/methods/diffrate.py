"""DiffRate's counts per layer: given, or scaled from the published ones (Chen et al., ICCV 2023)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.methods.base import Family, Method, Steps, acting_blocks, listed
from vp_exporter.methods.options import MethodOptions, label
from vp_exporter.methods.schedule import rounded
from vp_exporter.model.spec import ModelSpec

# Learned by the authors for DeiT-S at 2.905 GMACs (rates in their repository): tokens after dropping and after merging
# in each of 12 blocks, out of 197 including the class token.
PRUNE_TO = (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3)
MERGE_TO = (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)


@dataclass(frozen=True)
class DiffRateMethod(Method):
    """Given counts or, for a MAC target, the published ones scaled.

    The scaling is our own. m(x), the share of patch tokens remaining at relative depth x in the published rates, is
    interpolated linearly and raised to a power s: s = 0 keeps every token, 1 gives the published curve, larger values
    remove more. The split into dropped and merged tokens at each depth is as published, too.
    """

    def steps(self, request: MethodOptions, model: ModelSpec) -> Steps:
        blocks = acting_blocks(request, model, tuple(range(model.depth)))
        prune, merge = (
            listed(label(key, arg=True), request.args[key], blocks, low=1) for key in ("prune_to", "merge_to")
        )
        steps, left = [], model.prefix_tokens + model.patches
        for block, prune_to, merge_to in zip(blocks, prune, merge, strict=True):
            if (prune_to, merge_to) != (left, left):  # a block that removes nothing has no step
                steps.append(self.step(block, {**_other(request), "prune_to": prune_to, "merge_to": merge_to}, model))
            left = merge_to
        return tuple(steps)

    def family(self, request: MethodOptions, model: ModelSpec) -> Family:
        blocks = acting_blocks(request, model, tuple(range(model.depth)))
        alive = [share_alive((block + 1) / model.depth) for block in blocks]
        first = next((block for block, share in zip(blocks, alive, strict=True) if share < 1), None)
        if first is None:
            raise PlanError(
                f"the published rates remove nothing at `blocks={', '.join(map(str, blocks))}`",
                expected="a block behind the first twelfth of the model",
                fix="leave out `blocks`",
            )
        return Family(
            at=lambda u: self._scaled(request, model, blocks, alive, _power(u)),
            setting=lambda u: {"power": round(_power(u), 6)},
            bound=f"block {first} is the first to reduce and keeps at least 1 patch token",
        )

    def _scaled(
        self,
        request: MethodOptions,
        model: ModelSpec,
        blocks: Sequence[int],
        alive: Sequence[float],
        power: float,
    ) -> Steps:
        steps, left = [], model.patches
        for block, share in zip(blocks, alive, strict=True):
            out = min(left, max(1, rounded(model.patches * share**power)))
            if out < left:
                dropped = rounded((left - out) * share_dropped((block + 1) / model.depth))
                prefix = model.prefix_tokens
                counts = {"prune_to": prefix + left - dropped, "merge_to": prefix + out}
                steps.append(self.step(block, {**_other(request), **counts}, model))
            left = out
        return tuple(steps)


def _other(request: MethodOptions) -> dict[str, Any]:
    """Arguments other than counts."""
    return {key: value for key, value in request.args.items() if key not in ("prune_to", "merge_to")}


def _power(u: float) -> float:
    """Map 0 .. 1 to 0 .. infinity, with the published curve in the middle."""
    return u / (1 - u) if u < 1 else 1e9


def _curves() -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(relative depth, share of patch tokens remaining), (relative depth, share of removed tokens that are dropped)."""
    alive, dropped, before = [(0.0, 1.0)], [(0.0, 0.0)], 197
    for i, (prune_to, merge_to) in enumerate(zip(PRUNE_TO, MERGE_TO, strict=True), start=1):
        depth = i / len(MERGE_TO)
        alive.append((depth, (merge_to - 1) / 196))
        dropped.append((depth, (before - prune_to) / (before - merge_to) if merge_to < before else 0.0))
        before = merge_to
    return alive, dropped


_ALIVE, _DROPPED = _curves()


def share_alive(depth: float) -> float:
    """Share of patch tokens remaining at a relative depth, 0 to 1, in the published rates."""
    return _between(_ALIVE, depth)


def share_dropped(depth: float) -> float:
    """Share of the removed tokens that is dropped at a relative depth."""
    return _between(_DROPPED, depth)


def _between(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation of a curve over 0 .. 1; exact at its points."""
    at = min(bisect_left(curve, (x - 1e-12,)), len(curve) - 1)
    (x1, y1) = curve[at]
    if at == 0 or abs(x1 - x) < 1e-12:
        return y1
    x0, y0 = curve[at - 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
