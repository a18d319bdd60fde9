"""Stages of the benchmark and their rows. The parts import torch, so they are imported on demand."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.gpu.runs import Results, Row

if TYPE_CHECKING:  # it imports torch
    from benchmarks.gpu.jobs import Wanted


@dataclass(frozen=True)
class Stage:
    """The next task of the child processes.

    Attributes:
        warm: Compile only, in parallel; timing is done by a single process.
        group: Of models: (model, dtype, batch).
    """

    part: str
    warm: bool = False
    group: tuple[str, str, int] | None = None


def wanted(args: argparse.Namespace) -> Wanted:
    """Parse and check the selection for the models part.

    Raises:
        SystemExit: for an unknown name; lists the known ones.
    """
    from benchmarks.gpu import jobs

    known = {"models": None, "dtypes": jobs.DTYPES, "reducers": tuple(jobs.REDUCERS), "engines": jobs.ENGINES,
             "batches": jobs.BATCHES}  # fmt: skip
    given = {name: tuple(value) for name in (*known, "ratios") if (value := getattr(args, name)) is not None}
    for name, values in given.items():
        allowed = known.get(name)
        strange = [value for value in values if allowed is not None and value not in allowed]
        if strange:
            raise SystemExit(f"--{name} {strange[0]}: expected one of {', '.join(map(str, allowed or ()))}")
    if args.quick:
        quick = {"models": jobs.MODELS[:1], "dtypes": ("bf16",), "batches": (256, 1), "ratios": (1.5,)}
        given = {**quick, **given}
    return jobs.Wanted(**given)


def rows_of(stage: Stage, args: argparse.Namespace, known: Results) -> list[Row]:
    """Rows of a stage, most important first; equal in the parent and its children."""
    if stage.part == "machine":
        from benchmarks.gpu import machine

        return machine.rows()
    if stage.part == "models":
        from benchmarks.gpu import models

        assert stage.group is not None
        if stage.warm:
            return models.warm_rows(wanted(args), stage.group, args.work)
        built = Results(args.work / "built.json")
        return models.rows(wanted(args), stage.group, args.work, known, built)
    if stage.part == "kernels-check":
        from benchmarks.gpu import checks

        sizes, batches = ((17,), (1,)) if args.tiny else (checks.TOKENS, checks.BATCHES)
        found = checks.rows(quick=args.quick or args.tiny, device=args.device, sizes=sizes, batches=batches)
    elif stage.part == "plugins":
        from benchmarks.gpu import plugins

        return plugins.rows()
    elif stage.part == "tune":
        from benchmarks.gpu import tune

        found = tune.rows(warm=stage.warm)
    else:
        from benchmarks.gpu import kernels

        found = kernels.rows(quick=args.quick, warm=stage.warm)
    if args.tiny:  # one case of each operator, for tests
        found = list({row.group: row for row in reversed(found)}.values())
    return [row for row in found if args.operators is None or row.group in args.operators]
