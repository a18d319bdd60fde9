"""Reducers by their name in a plan. Each file in this folder that defines a `Step` is one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.reducers.base import InnerStep, Step, Tokens
from vp_exporter.reducers.static import StaticStep

__all__ = ["REDUCERS", "InnerStep", "StaticStep", "Step", "Tokens", "step_from_dict"]

# Modules shared by reducers. Some import torch, which reading a plan must not need.
_SHARED = frozenset({"base", "fused", "graph", "matching", "ops", "stream"})


def _found() -> dict[str, type[Step]]:
    """Reducer -> step class; `static` first, the others in alphabetical order."""
    steps: dict[str, type[Step]] = {StaticStep.reducer: StaticStep}
    for name in sorted(module.name for module in iter_modules(__path__)):
        if name not in _SHARED:
            module = import_module(f"{__name__}.{name}")
            kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Step)]
            steps |= {kind.reducer: kind for kind in kinds if kind.__module__ == module.__name__}
    return steps


REDUCERS: Mapping[str, type[Step]] = _found()


def step_from_dict(entry: Any) -> Step:
    """Parse one entry of a plan's `steps`.

    Raises:
        PlanError: if it is not a step, its reducer is unknown, or its fields are invalid.
    """
    if not isinstance(entry, Mapping):
        raise PlanError(f"a step is {entry!r}", expected="an object with block, reducer and the reducer's fields")
    block, reducer = entry.get("block"), entry.get("reducer")
    if isinstance(block, bool) or not isinstance(block, int):
        raise PlanError(f"a step has block {block!r}", expected="a 0-based block number")
    if not isinstance(reducer, str) or reducer not in REDUCERS:
        raise PlanError(
            f"the step at block {block} has the reducer {reducer!r}",
            expected=f"one of {', '.join(REDUCERS)}",
            fix="this version of vp-export cannot run it",
        )
    fields = {key: value for key, value in entry.items() if key not in ("block", "reducer")}
    return REDUCERS[reducer].from_fields(block, fields)
