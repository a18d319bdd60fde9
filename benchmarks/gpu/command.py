"""GPU benchmarks and checks: correctness of the kernels, their speed, and the speed of reduced models.

    python -m benchmarks.gpu --dry-run                                    what it would run; checks it on a CPU
    python -m benchmarks.gpu --parts machine kernels-check --quick        correct at all?
    python -m benchmarks.gpu --parts kernels-time --out docs/results/gpu.md
    python -m benchmarks.gpu --parts plugins                              TensorRT plugins (after make plugins)

Needs torch, triton, timm and numpy; this project need not be installed. Results are stored in --cache row by row, so a
command that reaches its time limit (--minutes) or dies can be continued. Exit code: 0; 1 if a check failed or a row did
not run; 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.runs import GRACE, Child, Results, Row, run_rows, supervise
from benchmarks.gpu.setup import ROOT, bootstrap
from benchmarks.gpu.stages import Stage, rows_of, wanted

PARTS = ("machine", "kernels-check", "kernels-time", "tune", "plugins", "models")
NO_GPU = 3
WARM_SHARE = 0.55  # share of the remaining time for building ahead; anything else is built when it is timed
RESERVE = 5.0  # seconds for the report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["machine", "kernels-check", "kernels-time", "models"]
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, dtypes and batches; every operator and mode")
    parser.add_argument("--minutes", type=float, default=9.0, help="end by then; a device lease ends a command at 10")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu.json", help="results so far; gone on with")
    parser.add_argument("--json", type=Path, help="a copy of the results, written as often (e.g. $OUT/gpu.json)")
    parser.add_argument("--out", type=Path, help="write the page there, e.g. docs/results/gpu.md")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-work", help="compiled models and kernels")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)),
                        help="processes that compile or check side by side")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--dry-run", action="store_true", help="list all rows; try shapes, plans and models on a CPU")
    parser.add_argument("--report-only", action="store_true", help="write the page from --cache; needs no GPU")
    parser.add_argument("--note", default="", help="why nothing is measured, for a page without figures")
    for name in ("models", "dtypes", "reducers", "engines"):
        parser.add_argument(f"--{name}", nargs="+", metavar=name[:-1].upper())
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--ratios", nargs="+", type=float, help="of MACs, dense to reduced (default: 1.5 2)")
    parser.add_argument("--operators", nargs="+", help="kernels-check and kernels-time: these only")
    hidden = {"stage": str, "shard": str, "deadline": float, "into": Path}
    for name, kind in hidden.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child(args: argparse.Namespace) -> int:
    """Measure a share of a stage and write it to a file."""
    import torch

    from benchmarks.gpu import checks

    said = json.loads(args.stage)
    stage = Stage(said["part"], said["warm"], tuple(said["group"]) if said["group"] else None)
    number, count = map(int, args.shard.split("/"))
    known = Results(args.work / "built.json" if stage.warm else args.cache)
    rows = rows_of(stage, args, known)[number::count]
    rows = [row for row in rows if known.fresh(row, retry=args.retry) is None]
    results = Results(args.into)
    known.rows = _Both(known.rows, results.rows)  # reduced rows need their group's dense row, just measured
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    healthy = checks.healthy if args.device == "cuda" else lambda: True
    return run_rows(rows, results, deadline=args.deadline, current=args.into.with_name(args.into.name + ".current"),
                    healthy=healthy, say=lambda text: print(text, flush=True))  # fmt: skip


class _Both(dict):
    """Known rows plus those being added."""

    def __init__(self, old: dict[str, dict[str, object]], new: dict[str, dict[str, object]]) -> None:
        super().__init__(old)
        self._new = new

    def get(self, key: str, default: object = None) -> object:
        return self._new.get(key) or super().get(key, default)


def run_stage(stage: Stage, args: argparse.Namespace, results: Results, deadline: float) -> bool:
    """Run a stage in child processes until it is done or time is up.

    Returns:
        Whether all children succeeded.
    """
    into = Results(args.work / "built.json") if stage.warm else results
    rows = [row for row in rows_of(stage, args, results) if into.fresh(row, retry=args.retry) is None]
    count = min(args.workers, len(rows)) if stage.warm or stage.part == "kernels-check" else 1
    left = deadline - time.time()
    where = f" {' '.join(map(str, stage.group))}" if stage.group else ""
    what = f"{stage.part}{where}{', compiling' if stage.warm else ''}"
    if not rows or left < 20:
        print(f"== {what}: {'nothing left to do' if not rows else 'no time left'}", flush=True)
        return True
    print(f"== {what}: {len(rows)} rows in {count} processes, {left / 60:.1f} minutes left", flush=True)
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
        "TRITON_CACHE_DIR": str(args.work / "triton"),
        "PYTHONFAULTHANDLER": "1",  # shows where a process died
        **({"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"} if count > 1 else {}),
    }
    children, base = [], args.work / "shards"
    base.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shard = base / f"{os.getpid()}-{stage.part}-{number}.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            *sys.argv[1:],
            "--stage",
            json.dumps(asdict(stage)),
            "--shard",
            f"{number}/{count}",
        ]
        command += ["--deadline", repr(deadline), "--into", str(shard)]
        children.append(Child(command, shard, {row.name: row for row in rows}, environment))
    return supervise(children, into, deadline=deadline, late_is_failure=not stage.warm)


def run_parts(args: argparse.Namespace, results: Results) -> bool:
    """Run all parts in order; returns whether every process succeeded."""
    end = time.time() + 60 * args.minutes - RESERVE
    good = True

    def warm(stage: Stage) -> None:
        # Builds may take GRACE seconds longer than told, and must leave time for the measurements.
        run_stage(stage, args, results, time.time() + WARM_SHARE * (end - time.time()) - GRACE)

    for part in args.parts:
        if part == "models":
            for group in wanted(args).groups():
                warm(Stage(part, True, group))
                good &= run_stage(Stage(part, False, group), args, results, end)
        else:
            if part in ("kernels-time", "tune"):
                warm(Stage(part, True))
            good &= run_stage(Stage(part), args, results, end)
    return good


def report(args: argparse.Namespace, results: Results) -> int:
    """Write the page and print the state of the bars; returns the exit code."""
    from benchmarks.gpu.report import bars, render

    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(render(results.rows, note=args.note))
    for title, good, bad in bars(results.rows):
        if good or bad:
            print(f"{'met' if not bad else 'NOT MET':8}{title}: {len(good)} of {len(good) + len(bad)} rows")
    wrong = [row for row in results.rows.values() if row.get("failed") or "error" in row]
    for row in wrong[:20]:
        print(f"FAILED  {row['part']}: {row['key']}: {row.get('error') or row.get('say')}")
    counts = {part: len(results.of(part)) for part in PARTS}
    print(f"rows: {', '.join(f'{part} {count}' for part, count in counts.items())}; {len(wrong)} failed", flush=True)
    return 1 if wrong else 0


def no_gpu() -> str | None:
    """Why there is no usable GPU, in one line, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if torch.cuda.is_available():
        return None
    return (
        f"no CUDA device that torch {torch.__version__} can use was found: nothing is measured (--dry-run needs none)"
    )


def main() -> int:
    args = parse()
    for name in ("cache", "work", "json", "out"):  # children and compilers change the working directory
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).resolve())
    bootstrap()
    if args.stage:
        return child(args)
    if args.dry_run:
        from benchmarks.gpu import dry

        return dry.dry_run(args)
    if args.report_only:
        return report(args, Results(args.cache))
    if args.device == "cuda":
        why = no_gpu()
        if why is not None:
            print(why, file=sys.stderr)
            return NO_GPU
        os.environ.pop("TRITON_INTERPRET", None)
    wanted(args)  # reject unknown names before running anything
    results = Results(args.cache, args.json)
    for left in sorted((args.work / "shards").glob("*.json")):  # left by a killed command
        results.absorb(left)
        left.unlink()
    note_run(results, command_line(sys.argv[1:]))
    run_parts(args, results)
    return report(args, results)


def command_line(arguments: list[str]) -> str:
    """The command that reproduces these rows, without local paths."""
    given = re.sub(r" --(cache|json|work|out)[ =](\S+)", "", " ".join(["", *map(shlex.quote, arguments)]))
    return f"python -m benchmarks.gpu{given}"


def note_run(results: Results, command: str) -> None:
    """Record the command for the page."""
    results.put(Row("run", f"run {len(results.of('run')) + 1}", "", 0.0, dict), {"command": command}, 0.0)
