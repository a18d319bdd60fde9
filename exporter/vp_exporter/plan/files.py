"""Read a plan from a plan file, a mask file or an array."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from vp_exporter.errors import PlanError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan.masks import SUFFIXES, plan_from_mask, read_mask
from vp_exporter.plan.plan import PlanModel, ReductionPlan
from vp_exporter.utils.file_types import kind_of

_NO_PLANS = ("a PyTorch", "a pickle", "an ONNX", "a .pt2", "a zip", "the manifest", "a report")


def read_plan(path: Path) -> ReductionPlan:
    """Read a plan file; other known file types are named in the error.

    Raises:
        PlanError: if it is unreadable or not a valid plan.
    """
    if (path / "plan.json").is_file():
        raise PlanError(f"`plan` {path} is a bundle", expected="a plan", fix=f"its plan is {path / 'plan.json'}")
    kind = kind_of(path) if path.is_file() else ""
    if kind.startswith(_NO_PLANS):
        raise PlanError(f"`plan` {path} is {kind}", expected="a plan (.json)")
    return ReductionPlan.load(path)


def plan_of(source: Any, spec: ModelSpec) -> ReductionPlan:
    """Make a plan for a model.

    Args:
        source: A plan; the path of a plan file or of a mask (.npy, .npz, .safetensors); or a mask, [depth, patches].

    Raises:
        PlanError: if it is none of these, unreadable, inconsistent or for another model.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        source = read_mask(path) if path.suffix in SUFFIXES else read_plan(path)
    if not isinstance(source, ReductionPlan):
        if not hasattr(source, "__array__"):
            raise PlanError(
                f"`plan` is a {type(source).__name__}",
                expected="a ReductionPlan, the path of a plan or a mask, or a mask as an array [depth, patches]",
            )
        source = plan_from_mask(np.asarray(source), PlanModel.of(spec))
    source.check_model(spec)
    return source
