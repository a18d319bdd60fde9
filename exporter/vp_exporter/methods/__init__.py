"""Build a plan from a method's name: schedules, published presets, MAC targets, static baselines."""

from __future__ import annotations

from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.methods.presets import PRESETS, Preset
from vp_exporter.methods.request import MethodRequest
from vp_exporter.methods.table import METHODS
from vp_exporter.methods.target import solve
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan

__all__ = ["METHODS", "PRESETS", "MethodRequest", "Preset", "build_plan"]


def build_plan(request: MethodRequest, description: ModelSpec) -> ReductionPlan:
    """Build the plan for a request and a model.

    Its `budget` is the request; its `provenance` names the preset and its paper, the seed, or the solution found for a
    MAC target.

    Raises:
        PlanError: if an amount does not fit the model (names the block and the limit), a preset is for another depth or
            number of patches, a MAC target is out of reach, or the model lacks something that the method needs.
    """
    method, settled = METHODS[request.method], request
    provenance: dict[str, Any] = {}
    if request.preset is not None:
        preset = PRESETS[request.preset]
        settled = preset.apply(request, description)
        provenance |= preset.provenance
    if method.name == "random":
        provenance["seed"] = request.seed or 0
    if settled.target_macs is not None:
        steps, found = solve(method.family(settled, description), description, settled.target_macs)
        provenance["solved"] = found
    else:
        steps = method.steps(settled, description)
    if not steps:
        raise PlanError(
            f"method {method.name} removes no token of {description.name}",
            expected="at least one step",
            fix="ask for more: a higher `r` or a lower `keep_rate`",
        )
    by_paper = any(getattr(step, "proportional", False) for step in steps)
    wanted = request.proportional_attention
    plan = ReductionPlan(
        model=PlanModel.of(description),
        steps=steps,
        method=method.name,
        proportional_attention=by_paper if wanted is None else wanted,
        budget=request.asked(),
        provenance=provenance,
    )
    plan.check_model(description)
    return plan
