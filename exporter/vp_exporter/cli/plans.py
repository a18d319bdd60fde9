"""Where a command's plan comes from: a plan file, a bare mask, or a method by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vp_engines.errors import VpError
from vp_exporter.cli import options
from vp_exporter.plan import PlanModel

if TYPE_CHECKING:
    from vp_exporter.methods import MethodRequest
    from vp_exporter.model.spec import ModelSpec
    from vp_exporter.plan import ReductionPlan


def check_one_source(plan: Path | None, masks: Path | None, method: str | None) -> None:
    """Refuse no plan and more than one.

    Raises:
        VpError: naming what is given.
    """
    given = [name for name, value in (("--plan", plan), ("--masks", masks), ("--method", method)) if value is not None]
    if len(given) == 1:
        return
    found = f"{', '.join(given[:-1])} and {given[-1]} are given together" if given else "no plan is named"
    raise VpError(found, expected="one of --plan FILE.json, --masks FILE.npy or --method NAME")


def read_method(
    method: str | None,
    *,
    preset: str | None,
    r: str | None,
    schedule: str | None,
    blocks: str | None,
    keep_rate: float | None,
    tau: float | None,
    target_macs: float | None,
    seed: int | None,
    proportional_attention: bool | None,
    method_arg: list[str] | None,
) -> MethodRequest | None:
    """The method that the options name, checked as far as it can be without a model; None without --method.

    Raises:
        VpError: options of a method without --method, text that does not parse, or what MethodRequest refuses.
    """
    if method is None:
        given = {name: value for name, value in locals().items() if name != "method" and value not in (None, [])}
        if given:
            raise VpError(
                f"--{next(iter(given)).replace('_', '-')} is given without --method",
                expected="--method NAME, such as --method tome",
                fix="name the method, or leave the option out",
            )
        return None
    from vp_exporter.methods import MethodRequest

    counts = None if r is None else options.parse_whole_numbers(r, "--r", "13 or 0,6,8,10")
    return MethodRequest(
        method=method,
        preset=preset,
        r=counts[0] if counts is not None and len(counts) == 1 else counts,
        schedule=schedule,
        blocks=None if blocks is None else options.parse_whole_numbers(blocks, "--blocks", "3,6,9"),
        keep_rate=keep_rate,
        tau=tau,
        target_macs=target_macs,
        seed=seed,
        proportional_attention=proportional_attention,
        args=options.parse_pairs(method_arg, "--method-arg", "fuse=false"),
    )


def _check_kind(path: Path) -> None:
    """Raise where the file of --plan can be told to be something else."""
    from vp_exporter.errors import PlanError
    from vp_exporter.plan.masks import SUFFIXES
    from vp_exporter.utils.file_types import kind_of

    if (path / "plan.json").is_file():
        raise PlanError(f"--plan {path} is a bundle", expected="a plan", fix=f"its plan is {path / 'plan.json'}")
    if path.suffix in SUFFIXES:
        found = f"--plan {path} ends in {path.suffix!r}"
        raise PlanError(found, expected="a plan (.json)", fix="give masks to --masks")
    kind = kind_of(path) if path.is_file() else ""
    if kind.startswith(("a PyTorch", "a pickle", "an ONNX", "a .pt2", "a zip", "the manifest", "a report")):
        raise PlanError(f"--plan {path} is {kind}", expected="a plan (.json)")


def read_plan(
    plan: Path | None, masks: Path | None, request: MethodRequest | None, description: ModelSpec
) -> ReductionPlan:
    """The plan file, the mask as a plan for this model, or the method's plan for it.

    Raises:
        PlanError: unreadable, inconsistent or for another model; or an amount that does not fit the model.
    """
    from vp_exporter.methods import build_plan
    from vp_exporter.plan import ReductionPlan
    from vp_exporter.plan.masks import plan_from_mask, read_mask

    if plan is not None:
        _check_kind(plan)
        found = ReductionPlan.load(plan)
        found.check_model(description)
        return found
    if masks is not None:
        return plan_from_mask(read_mask(masks), PlanModel.of(description))
    assert request is not None  # check_one_source has refused the other case
    return build_plan(request, description)
