"""Methods by name. A reducer that is not listed here gets a method based on its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from vp_exporter.methods.base import Method
from vp_exporter.methods.diffrate import DiffRateMethod
from vp_exporter.methods.merging import MergingMethod, all_but_one
from vp_exporter.methods.stages import StageMethod
from vp_exporter.methods.static import StaticMethod
from vp_exporter.reducers import REDUCERS, Step

_SLOPED = ("r", "schedule", "blocks", "target_macs")
_STAGED = ("keep_rate", "blocks", "target_macs")
_RATE_OR_LIST = (("keep_rate",), ("tokens_out",))
_MASK = ("keep_rate", "target_macs")

_METHODS: tuple[Method, ...] = (
    MergingMethod("tome", _SLOPED, (("r",),), ("order",)),
    MergingMethod(
        "ppt", ("r", "keep_rate", "tau", "blocks", "target_macs"), (("r",), ("keep_rate",)), ("order",), staged=True
    ),
    StageMethod("evit", _STAGED, _RATE_OR_LIST, ("tokens_out", "fuse")),
    StageMethod("topk", _STAGED, _RATE_OR_LIST, ("tokens_out", "score")),
    StageMethod("bat", _STAGED, _RATE_OR_LIST, ("tokens_out", "clusters", "pairs", "weights")),
    DiffRateMethod(
        "diffrate", ("blocks", "target_macs"), (("prune_to", "merge_to"),), ("prune_to", "merge_to", "weights")
    ),
    MergingMethod("pitome", ("keep_rate", *_SLOPED), (("r",), ("keep_rate",)), ("margin", "matching")),
    MergingMethod(
        "gtp", _SLOPED, (("r",),), ("alpha", "score", "graph", "neighbours", "graph_from", "theta"), limit=all_but_one
    ),
)
_BASELINES: tuple[Method, ...] = (
    StaticMethod("random", (*_MASK, "seed"), (("keep_rate",),)),
    StaticMethod("grid", _MASK, (("keep_rate",),)),
    StaticMethod("center", _MASK, (("keep_rate",),)),
)


def _suggested(step: type[Step]) -> Method | None:
    """Method for a step with field `r` (removed per block) or `tokens_out` (kept at a few stages); else None."""
    names = tuple(field.name for field in fields(step) if field.name != "block")
    if "r" in names:
        return MergingMethod(step.reducer, _SLOPED, (("r",),), tuple(name for name in names if name != "r"))
    return StageMethod(step.reducer, _STAGED, _RATE_OR_LIST, names) if "tokens_out" in names else None


def _table() -> dict[str, Method]:
    named = {method.name for method in _METHODS}
    others = [_suggested(step) for name, step in REDUCERS.items() if name not in named]
    return {method.name: method for method in (*_METHODS, *others, *_BASELINES) if method is not None}


METHODS: Mapping[str, Method] = _table()
