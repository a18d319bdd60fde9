"""Plan sources of a command: a plan file, a bare mask, or a named method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vp_engines.errors import VpError
from vp_exporter.cli import options
from vp_exporter.errors import PlanError

if TYPE_CHECKING:
    from vp_exporter.methods import MethodRequest


def check_one_source(plan: Path | None, masks: Path | None, method: str | None) -> None:
    """Check that exactly one plan source is given.

    Raises:
        VpError: if not; names those that are given.
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
    """Create the method request from options, checked as far as possible without a model; None without --method.

    Raises:
        VpError: if method options are given without --method, do not parse, or are rejected by MethodRequest.
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


def source(plan: Path | None, masks: Path | None, method: str | None, **method_options: Any) -> Path | MethodRequest:
    """Return the plan file, mask file or method request, checked as far as possible without opening a file.

    Args:
        method_options: Options of `read_method`.

    Raises:
        VpError: if there is no source or more than one, options conflict, or the file is missing or of the wrong type.
    """
    check_one_source(plan, masks, method)
    request = read_method(method, **method_options)
    if request is not None:
        return request
    from vp_exporter.plan.masks import SUFFIXES, check_suffix

    if masks is not None:
        check_suffix(masks)
        if not masks.is_file():
            raise PlanError(f"there is no mask file {masks}", expected="a file", fix="check --masks")
        return masks
    assert plan is not None  # checked by check_one_source
    if plan.suffix in SUFFIXES:
        found = f"--plan {plan} ends in {plan.suffix!r}"
        raise PlanError(found, expected="a plan (.json)", fix="give masks to --masks")
    return plan
