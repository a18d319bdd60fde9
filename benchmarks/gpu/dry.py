"""Dry run: list everything that would run and for how long, and try what is possible on a CPU."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import checks, jobs, kernels, models, tune
from benchmarks.gpu.cases import cases
from benchmarks.gpu.runs import Results, Row
from benchmarks.gpu.setup import first_line
from benchmarks.gpu.stages import Stage, rows_of, wanted

MAC_TOLERANCE = 0.02
TINY = {"embed_dim": 96, "num_heads": 3, "num_classes": 10}  # heads of 32 channels, 12 blocks, 197 tokens
TINY_MODEL = "deit_tiny_patch16_224"


def dry_run(args: argparse.Namespace) -> int:
    """List all rows and try them on a CPU as far as possible; returns 0, or 1 if something is wrong."""
    torch.set_num_threads(1)
    total, nothing = 0.0, Results(None)
    for part in args.parts:
        if part == "models":
            total += _list_models(wanted(args), args.workers, args.work)
            continue
        rows = rows_of(Stage(part), args, nothing)
        seconds = sum(row.seconds for row in rows)
        minutes = seconds / 60 / (args.workers if part == "kernels-check" else 1)
        if part in ("kernels-time", "tune"):
            minutes += sum(row.seconds for row in rows_of(Stage(part, True), args, nothing)) / 60 / args.workers
        _list(part, rows, minutes)
        total += minutes
    print(f"all together about {total:.0f} minutes with {args.workers} workers, at {args.minutes:g} a command\n")
    wrong: list[str] = []
    for part, check in CHECKS.items():
        if part in args.parts:
            start = time.perf_counter()
            found = check(args)
            wrong += found
            print(f"{part}: {'good' if not found else f'{len(found)} WRONG'} [{time.perf_counter() - start:.0f} s]")
    for text in wrong:
        print(f"WRONG  {text}")
    return 1 if wrong else 0


def _list(part: str, rows: list[Row], minutes: float) -> None:
    counts = Counter(row.group or row.part for row in rows)
    print(f"== {part}: {len(rows)} rows ({', '.join(f'{n} {name}' for name, n in counts.items())}), {minutes:.1f} min")
    for row in rows:
        print(f"   {row.key}")


def _list_models(wanted: jobs.Wanted, workers: int, work: Path) -> float:
    """List every group with its rows, in order; packages shared by groups are built once."""
    built: set[str] = set()
    total = 0.0
    for group in wanted.groups():
        rows = models.rows(wanted, group, work, Results(None), Results(None))
        warm = [row for row in models.warm_rows(wanted, group, work) if row.key not in built]
        built |= {row.key for row in warm}
        # Time per row once everything is built: loading a package, or compiling with a warm cache.
        timing = 60 + sum(15 if " compile" in row.key else 6 for row in rows[1:])
        minutes = timing / 60 + sum(row.seconds for row in warm) / 60 / workers
        total += minutes
        print(f"== models {' '.join(map(str, group))}: {len(rows)} rows, {len(warm)} builds, {minutes:.1f} min")
        for row in rows:
            print(f"   {row.key}")
    return total


def try_checks(args: argparse.Namespace) -> list[str]:
    """One case of each operator and dtype at 17 tokens.

    On a CPU the public functions run their torch implementations; with TRITON_INTERPRET=1 the launchers run the
    kernels.
    """
    wrong, seen = [], set()
    for case in cases((17,), quick=True):
        kind = (case.operator, case.settings.get("dtype"))
        if kind in seen or (args.operators is not None and case.operator not in args.operators):
            continue
        seen.add(kind)
        wrong += _try(case.key, lambda case=case: _checked(case))  # type: ignore[misc]
    return wrong


def _checked(case: checks.Case) -> None:
    found = checks.check(case, "cpu", (1, 3))
    if found["failed"]:
        raise AssertionError(found["say"])


def try_times(args: argparse.Namespace) -> list[str]:
    """Run every variant once, at batch 2, to check that arguments are accepted and output shapes agree."""
    wrong = []
    for row in kernels.timed(small=True):
        if row.shape.get("dtype", "bf16") != "bf16" or (args.operators and row.operator not in args.operators):
            continue
        wrong += _try(row.key, lambda row=row: _timed(row))  # type: ignore[misc]
    return wrong


def _timed(row: kernels.Timed) -> None:
    found = kernels.measure(row, device="cpu")
    # A CPU only has flash, possibly without masks: ignore errors of torch's own backends.
    refused = {name: why for name, why in found["refused"].items() if not name.startswith("sdpa")}
    if refused:
        raise AssertionError("; ".join(f"{name}: {why}" for name, why in refused.items()))


def try_tuning(args: argparse.Namespace) -> list[str]:
    """Check that there are candidates, if the kernel can run here (in the interpreter)."""
    import os

    if os.environ.get("TRITON_INTERPRET") != "1":
        return []
    rows = {row.operator: row for row in kernels.timed(small=True) if row.operator in tune.OPERATORS}
    return [text for row in rows.values() for text in _try(row.key, lambda row=row: tune.check_on_cpu(row))]  # type: ignore[misc]


def try_models(args: argparse.Namespace) -> list[str]:
    """Check all plans, and a tiny model under each reducer's plan in each available form."""
    asked, wrong = wanted(args), []
    for model in asked.models:
        for reducer in asked.reducers:
            for ratio in asked.ratios:
                wrong += _try(f"{model} {reducer} {ratio:g}", lambda m=model, r=reducer, q=ratio: plan_right(m, r, q))  # type: ignore[misc]
    for reducer in asked.reducers:
        for form in ("portable", "vp"):
            wrong += _try(f"tiny model, {reducer} {form}", lambda r=reducer, f=form: _forward(r, f))  # type: ignore[misc]
    return wrong


def plan_right(model: str, reducer: str, ratio: float) -> float:
    """MAC ratio of a row's plan.

    Raises:
        AssertionError: if it is not within `MAC_TOLERANCE` of the request.
    """
    found = jobs.mac_ratio(model, jobs.plan_for(model, reducer, ratio))
    if abs(found / ratio - 1) > MAC_TOLERANCE:
        raise AssertionError(f"the MAC ratio is {found:.3f}, asked {ratio:g}")
    return found


@torch.no_grad()
def _forward(reducer: str, form: str) -> None:
    from vp_exporter.methods import MethodRequest, build_plan
    from vp_exporter.model.describe import describe

    vit = models.create(TINY_MODEL, **TINY)
    description = describe(vit, TINY_MODEL)
    plan = build_plan(MethodRequest(target_macs=0.5, **jobs.REDUCERS[reducer]), description)
    job = jobs.Job(TINY_MODEL, "bf16", 2, "eager", form, reducer, 2.0)
    images = torch.randn(2, 3, *description.image_size, generator=torch.Generator().manual_seed(1))
    found = models.module_of(job, vit, description, plan)(images)
    if found.shape != (2, TINY["num_classes"]) or found.dtype != torch.float32 or not bool(found.isfinite().all()):
        raise AssertionError(f"the logits are {found.dtype} {list(found.shape)} {found.flatten()[:3].tolist()}")


def _try(what: str, run: Callable[[], object]) -> list[str]:
    try:
        run()
    except Exception as error:  # continue with the list, whatever the error
        return [f"{what}: {first_line(error)}"]
    return []


CHECKS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "kernels-check": try_checks,
    "kernels-time": try_times,
    "tune": try_tuning,
    "models": try_models,
}
