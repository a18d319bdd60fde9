"""The reducers by the word that names them in a plan. Adding one: write its file here, add it to `_STEPS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.reducers.base import InnerStep, Step, Tokens
from vp_exporter.reducers.bat import BatStep
from vp_exporter.reducers.diffrate import DiffRateStep
from vp_exporter.reducers.evit import EvitStep
from vp_exporter.reducers.gtp import GtpStep
from vp_exporter.reducers.pitome import PitomeStep
from vp_exporter.reducers.ppt import PptStep
from vp_exporter.reducers.static import StaticStep
from vp_exporter.reducers.tome import TomeStep
from vp_exporter.reducers.topk import TopKStep

__all__ = ["REDUCERS", "InnerStep", "StaticStep", "Step", "Tokens", "step_from_dict"]

_STEPS: tuple[type[Step], ...] = (
    StaticStep, BatStep, DiffRateStep, EvitStep, GtpStep, PitomeStep, PptStep, TomeStep, TopKStep,
)  # fmt: skip
REDUCERS: Mapping[str, type[Step]] = {step.reducer: step for step in _STEPS}


def step_from_dict(entry: Any) -> Step:
    """Read one entry of a plan's `steps`.

    Raises:
        PlanError: not a step, an unknown reducer, or wrong fields.
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
