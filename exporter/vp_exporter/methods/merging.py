"""Methods that remove r tokens per block: tome, pitome and gtp at every block, ppt at stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.methods.base import Family, Method, Steps, acting_blocks, stage_blocks
from vp_exporter.methods.options import MethodOptions
from vp_exporter.methods.schedule import counts_of, cut, share_of, slope
from vp_exporter.model.spec import ModelSpec

# PiToMe's matching in each half of the blocks: the authors' settings for DeiT, and for MAE.
HALVES = {"bipartite-first": ("bipartite", "protect"), "protect-first": ("protect", "bipartite")}


def half(patches: int) -> int:
    """Maximum for bipartite matching."""
    return patches // 2


def all_but_one(patches: int) -> int:
    """Maximum for propagation."""
    return patches - 1


@dataclass(frozen=True)
class MergingMethod(Method):
    """Removes r patch tokens at each acting block.

    Attributes:
        limit: Maps the number of patch tokens to the maximum that can be removed.
        staged: Act at the stage blocks by default, rather than at every block.
    """

    limit: Callable[[int], int] = half
    staged: bool = False

    def steps(self, request: MethodOptions, model: ModelSpec) -> Steps:
        blocks = self._blocks(request, model)
        if request.keep_rate is not None:
            return self._made(request, model, blocks, self._kept(request.keep_rate, model.patches, len(blocks)))
        if isinstance(request.r, tuple):
            if len(request.r) > len(blocks):
                raise PlanError(
                    f"`r` lists {len(request.r)} values",
                    expected=f"at most {len(blocks)}, one for each of the blocks {', '.join(map(str, blocks))}",
                )
            return self._made(request, model, blocks, request.r)
        assert request.r is not None
        return self._made(request, model, blocks, self._sloped(request, model, len(blocks), request.r))

    def family(self, request: MethodOptions, model: ModelSpec) -> Family:
        blocks = self._blocks(request, model)
        # Scale so that the first acting block removes its maximum.
        weights = slope(request.schedule or "constant", len(blocks), 1.0)
        first = next(i for i, weight in enumerate(weights) if weight > 0)
        most = self.limit(model.patches) / weights[first]
        why = f"block {blocks[first]} can lose at most {self.limit(model.patches)} of its {model.patches} patch tokens"
        return Family(
            at=lambda u: self._made(request, model, blocks, self._sloped(request, model, len(blocks), u * most)),
            setting=lambda u: {"r": round(u * most, 6)},
            bound=why,
        )

    def _blocks(self, request: MethodOptions, model: ModelSpec) -> tuple[int, ...]:
        default = stage_blocks(model.depth) if self.staged else tuple(range(model.depth))
        return acting_blocks(request, model, default)

    def _sloped(self, request: MethodOptions, model: ModelSpec, blocks: int, r: float) -> list[int]:
        shape = request.schedule or "constant"
        # A slope's first count was not given by the caller, so it is clipped like the others.
        return cut(counts_of(shape, blocks, r), model.patches, self.limit, first=shape != "constant")

    @staticmethod
    def _kept(keep_rate: float, patches: int, blocks: int) -> list[int]:
        counts = []
        for _ in range(blocks):
            counts.append(patches - share_of(keep_rate, patches))
            patches -= counts[-1]
        return counts

    def _made(self, request: MethodOptions, model: ModelSpec, blocks: Sequence[int], counts: Sequence[int]) -> Steps:
        return tuple(
            self.step(block, {"r": r, **self._fields(request, block, model)}, model)
            for block, r in zip(blocks, counts, strict=False)
            if r
        )

    def _fields(self, request: MethodOptions, block: int, model: ModelSpec) -> dict[str, Any]:
        """Fields of the reducer besides r; others get the reducer's defaults."""
        values = dict(request.args)
        matching = values.get("matching")
        if isinstance(matching, str) and matching in HALVES:
            values["matching"] = HALVES[matching][block >= math.ceil(model.depth / 2)]
        if self.name == "ppt":
            values["tau"] = request.tau
        return values
