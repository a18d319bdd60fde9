"""Benchmark every reducer on the flowers ViT-S/16, ONNX Runtime on the CPU, at about 0.65 and 0.5 of the dense MACs.

    python benchmarks/reducers.py --out docs/results/reducers.md

Needs the model and photographs in ../shared (see ../shared/data/README.md). With --cache FILE, measurements are stored
row by row, so an interrupted run can be continued; changing the settings or the code invalidates them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import timm
import torch
from common import (
    THREADS,
    VAL,
    Cache,
    command_line,
    load_flowers,
    machine,
    need_shared,
    preparation,
    prose,
    span,
    spread,
    table,
)
from ort_profile import MASK, added_work, kinds, profile, spent

import vp_engines
import vp_exporter
from vp_engines.backends import get_backend
from vp_engines.backends.base import Runner, RunOptions
from vp_engines.errors import VpError
from vp_exporter.data.image_folder import Batch, ImageFolder
from vp_exporter.lowering import lower_onnx, signature
from vp_exporter.methods import MethodRequest, build_plan
from vp_exporter.plan import ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.validation.accuracy import evaluate
from vp_exporter.validation.intervals import bootstrap_ratio_of_medians
from vp_exporter.validation.latency import compare

BATCHES = (8, 1)
BATCH = 32  # batch size for evaluating the photographs
PROFILED = {8: 12, 1: 40}  # batch size -> profiled runs, after a few for warm-up
NEAR_TIE = 1e-4  # a larger difference in logits is a near-tie that two correct engines break differently, or a fault
NUDGE = np.float32(1 + 2e-7)  # the effect of rounding: if PyTorch's own output jumps with it, the image has a near-tie
ABOUT_HALF_MORE = (1.4, 1.65)  # MAC ratios that the efficiency bars apply to
EFFICIENCY_BAR, ADDED_BAR = {8: 0.93, 1: 0.85}, 4.0
EVERY_SECOND, STAGES = (1, 3, 5, 7, 9, 11), (3, 6, 9)


@dataclass(frozen=True)
class Row:
    """A row of the tables: the method and its options besides the MAC target."""

    name: str
    label: str
    asked: Mapping[str, Any]


def _merging(method: str) -> tuple[Row, ...]:
    return (
        Row(method, f"{method}, every block", {"method": method}),
        Row(f"{method}-second", f"{method}, every second block", {"method": method, "blocks": EVERY_SECOND}),
        Row(f"{method}-stages", f"{method}, blocks 3/6/9", {"method": method, "blocks": STAGES}),
    )


ROWS = (
    Row("random", "random (static, seed 0)", {"method": "random"}),
    Row("grid", "grid (static)", {"method": "grid"}),
    Row("center", "center (static)", {"method": "center"}),
    Row("topk-class", "topk (class), blocks 3/6/9", {"method": "topk", "args": {"score": "class"}}),
    Row("topk-ats", "topk (ats), blocks 3/6/9", {"method": "topk", "args": {"score": "ats"}}),
    Row("evit", "evit, blocks 3/6/9", {"method": "evit"}),
    Row("ppt", "ppt (tau 7e-5: DeiT-S's, untuned here), blocks 3/6/9", {"method": "ppt", "tau": 7e-5}),
    Row("bat", "bat, blocks 3/6/9", {"method": "bat"}),
    Row("diffrate", "diffrate (DeiT-S rates, scaled), every block", {"method": "diffrate"}),
    Row("diffrate-second", "diffrate, every second block", {"method": "diffrate", "blocks": EVERY_SECOND}),
    Row("tome-increasing", "tome, increasing r", {"method": "tome", "schedule": "increasing"}),
    *_merging("tome"),
    *_merging("pitome"),
    *_merging("gtp"),
)


class Photographs:
    """The validation photographs, decoded once, in the form that `evaluate` takes."""

    labelled = True

    def __init__(self, prepare: Callable[[Path], np.ndarray], num_classes: int, limit: int | None) -> None:
        folder = ImageFolder(VAL, prepare, classes=None, num_classes=num_classes, limit=limit, strict=True)
        self.num_classes, self.skipped = num_classes, folder.skipped
        self._batches = list(folder.batches(BATCH))
        self.images = np.concatenate([batch.images for batch in self._batches])

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        assert batch_size == BATCH
        return iter(self._batches)


class Recorded:
    """Replays the dense engine's outputs for all photographs in order, so that it need not run for each row."""

    def __init__(self, logits: np.ndarray) -> None:
        self._rest = iter(logits)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"logits": np.stack(list(islice(self._rest, len(images))))}


class Bench:
    """The dense engine and the photographs, and measurements against them."""

    def __init__(self, work: Path, seconds: float, limit: int | None) -> None:
        torch.set_num_threads(THREADS)
        self.work, self.seconds, self.backend = work, seconds, get_backend("ort")
        self.model = load_flowers()
        self.description = self.model.description
        self.photographs = Photographs(preparation(self.model), self.description.num_classes, limit)
        self.shown = self.photographs.images[spread(len(self.photographs))]
        path = self.lower(None, "dense")
        self.dense = self.open(path)
        self.dense_logits = np.concatenate(
            [self.dense.run(b.images)["logits"] for b in self.photographs.batches(BATCH)]
        )
        self.dense_kinds = kinds(profile([path], self.shown, {1: 1})[0][1][0])

    def reduced(self, plan: ReductionPlan | None) -> ReducedViT:
        return ReducedViT(self.model.vit, self.description, plan)

    def pytorch(self, plan: ReductionPlan, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = self.reduced(plan)(torch.from_numpy(images)).numpy()
        return logits

    def lower(self, plan: ReductionPlan | None, name: str) -> Path:
        """Lower as vp-export does for this engine."""
        assert self.backend.opset is not None
        ready = self.reduced(plan).for_export("fp32", self.backend.attention_form)
        return lower_onnx(ready, self.work / f"{name}.onnx", opset=self.backend.opset)

    def open(self, path: Path) -> Runner:
        inputs, outputs = signature(self.reduced(None))
        files = {path.name: path.read_bytes()}
        return self.backend.open(path.name, files, inputs, outputs, {}, RunOptions("cpu", THREADS))

    def measure(self, row: Row, target: float) -> dict[str, Any]:
        """Measure one row, as JSON values; {"refused": why} if there is no such plan."""
        try:
            plan = build_plan(MethodRequest(target_macs=target, **row.asked), self.description)
        except VpError as error:
            return {"refused": str(error)}
        dense_macs, macs = count_macs(self.description).total, count_macs(self.description, plan).total
        path = self.lower(plan, "reduced")
        with self.open(path) as engine:
            timed = compare(
                self.dense, engine, image_shape=(3, *self.description.image_size), batches=BATCHES,
                min_seconds=self.seconds, macs_dense=dense_macs, macs_reduced=macs,
            )  # fmt: skip
            found = evaluate(Recorded(self.dense_logits), engine, self.photographs, batch_size=BATCH)
            expected = self.pytorch(plan, self.shown)
            apart = np.abs(engine.run(self.shown)["logits"] - expected).max(axis=1)
        ties = int((apart > NEAR_TIE).sum())
        itself = np.abs(self.pytorch(plan, self.shown * NUDGE) - expected).max(axis=1) if ties else apart
        (runs,) = profile([path], self.shown, PROFILED)
        extra = kinds(runs[1][0]) - self.dense_kinds
        shown = ("images", "dense_top1", "reduced_top1", "agreement", "kl")
        return {
            "tokens": short_tokens(plan),
            "macs": macs / dense_macs,
            "mac_ratio": dense_macs / macs,
            "latency": {str(line.batch): line.to_dict() for line in timed},
            "accuracy": {key: found.to_dict()[key] for key in shown},
            "error": [float(apart.max()), ties, int((itself > NEAR_TIE).sum()), len(apart)],
            "added": {str(batch): added_work(runs[batch]) for batch in PROFILED},
            "unplaced": [f"{count} {op} ({name})" for (name, op), count in sorted(extra.items())],
        }

    def measure_mask(self, target: float) -> dict[str, Any]:
        """Cost of the mask of proportional attention: the same tokens (tome's) with and without it."""
        paths = []
        for wanted in (True, False):
            request = MethodRequest("tome", target_macs=target, proportional_attention=wanted)
            paths.append(self.lower(build_plan(request, self.description), f"mask-{wanted}"))
        masked, plain = profile(paths, self.shown, PROFILED)
        found = {}
        for batch in PROFILED:
            times = [spent(masked[batch], op="MultiHeadAttention"), spent(plain[batch], op="MultiHeadAttention")]
            ratio = bootstrap_ratio_of_medians(*times)
            medians = [float(np.median(values)) for values in (*times, spent(masked[batch], name=MASK))]
            found[str(batch)] = {"ms": medians, "ratio": asdict(ratio)}
        return found


def short_tokens(plan: ReductionPlan) -> str:
    """Tokens after each block that changes their number, abbreviated if there are many."""
    left, changes = plan.model.prefix_tokens + plan.model.patches, []
    for block, row in enumerate(plan.tokens()):
        if row.mlp != left:
            changes.append(f"{row.mlp} @{block}")
            left = row.mlp
    return ", ".join(changes) if len(changes) <= 3 else f"{changes[0]} to {changes[-1]}"


def sources(*more: str) -> str:
    """sha256 over the code that determines a figure, to invalidate the cache.

    Args:
        more: Further relevant folders of the exporter.
    """
    exporter, engines = Path(vp_exporter.__file__).parent, Path(vp_engines.__file__).parent
    files = [engines / "backends" / "ort.py", *sorted(Path(__file__).parent.glob("*.py"))]
    rooms = ("lowering", "methods", "reducers", "rewrite", *more)
    files += [path for name in rooms for path in sorted((exporter / name).rglob("*.py"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def main_cells(label: str, target: float, row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return [label, f"{target:g}", f"not reached: {row['refused']}", *[""] * 11]
    cells = [label, f"{row['macs']:.3f}", row["tokens"], f"{row['mac_ratio']:.3f}"]
    for batch in BATCHES:
        line = row["latency"][str(batch)]
        milliseconds = f"{line['dense']['median_ms']:.1f} / {line['reduced']['median_ms']:.1f}"
        cells += [milliseconds, span(line["speedup"], 2), f"**{line['efficiency']:.3f}**"]
    found, (error, ties, itself, images) = row["accuracy"], row["error"]
    kl = "not finite" if found["kl"] is None else span(found["kl"], 4)
    wide = f" ({ties} of {images}; PyTorch itself {itself})" if ties else ""
    cells += [f"{found['reduced_top1']:.2f}%", f"{found['agreement']['value']:.2f}%", kl, f"{error:.1e}{wide}"]
    return cells


def added_cells(label: str, row: dict[str, Any]) -> list[str]:
    eight, one = (row["added"][str(batch)] for batch in BATCHES)
    costliest = ", ".join(f"{op} {ms:.2f}" for op, ms in eight["costliest"]) or "none"
    times = [f"{eight['ms']:.2f}", f"**{eight['share']:.2f}%**", f"{one['ms']:.2f}", f"{one['share']:.2f}%"]
    return [label, f"{row['macs']:.3f}", *times, str(eight["nodes"]), costliest]


TIMED_HEAD = [(f"batch {batch}: dense / reduced ms", "speed-up (95%)", "efficiency") for batch in BATCHES]
ANSWERS_HEAD = ["method", "MACs", "tokens @block", "MAC ratio", *TIMED_HEAD[0], *TIMED_HEAD[1]]
ANSWERS_HEAD += ["top-1", "agreement", "KL (95%)", "logit error"]
ADDED_HEAD = ["method", "MACs", "batch 8: ms", "share", "batch 1: ms", "share", "nodes", "costliest at batch 8, ms"]
MASK_HEAD = ["plan", "batch", "Attention with it, ms", "without, ms", "making the mask, ms", "with / without (95%)"]


def bar(title: str, judged: Sequence[tuple[str, bool, str]]) -> str:
    """One line: rows that meet a bar and rows that miss it, and by how much."""
    met = [name for name, good, _ in judged if good]
    missed = [f"{name} {figure}" for name, good, figure in judged if not good]
    by = f", missed by {len(missed)}: {'; '.join(missed)}" if missed else ", missed by none"
    return f"- **{title}**: met by {len(met)} of {len(judged)}{by}." + (f" Met by: {', '.join(met)}." if met else "")


def bars(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Every bar, judged by the point estimates of `rows`, with intervals for misses."""
    low, high = ABOUT_HALF_MORE
    lines = []
    for batch, least in EFFICIENCY_BAR.items():
        judged = []
        for name, row in rows.items():
            if low <= row["mac_ratio"] <= high:
                line, scale = row["latency"][str(batch)], 1 / row["mac_ratio"]
                judged.append((name, line["efficiency"] >= least, span(line["speedup"], 3, scale)))
        lines.append(bar(f"efficiency at least {least} at batch {batch}, MAC ratio {low} to {high}", judged))
    ones = {name: row["latency"]["1"]["speedup"] for name, row in rows.items()}
    slower = [(name, found["value"] >= 1, span(found, 2)) for name, found in ones.items()]
    lines.append(bar("never slower than dense at batch 1", slower))
    shares = {name: row["added"]["8"]["share"] for name, row in rows.items()}
    title = f"added work at most {ADDED_BAR:g}% of the reduced model's time at batch 8"
    lines.append(bar(title, [(name, share <= ADDED_BAR, f"{share:.2f}%") for name, share in shares.items()]))
    return lines


def render(
    chosen: Sequence[Row], targets: Sequence[float], rows: Mapping[str, dict[str, Any]], masks: dict[str, Any]
) -> str:
    order = [(row.label, target, rows[f"{row.name} {target:g}"]) for target in targets for row in chosen]
    sound = {name: row for name, row in rows.items() if "refused" not in row}
    dates = sorted({row["date"] for row in (*rows.values(), *masks.values())})
    dense = next((row["accuracy"] for row in sound.values()), None)
    answers = f"Dense: top-1 {dense['dense_top1']:.2f}% on {dense['images']} photographs. " if dense else ""
    unplaced = [f"- `{name}`: {', '.join(row['unplaced'])}" for name, row in sound.items() if row["unplaced"]]
    mask_rows = [
        [key, batch, *(f"{ms:.2f}" for ms in found["ms"]), span(found["ratio"], 3)]
        for key, both in masks.items()
        for batch, found in both.items()
        if batch != "date"
    ]
    lines = [
        "# The reducers on the flowers ViT-S/16, ONNX Runtime on the CPU",
        "",
        f"Command: `{command_line('reducers')}`",
        "",
        machine(" to ".join(sorted({dates[0], dates[-1]}))),
        f"Versions: onnxruntime {ort.__version__}, torch {torch.__version__}, timm {timm.__version__}. fp32.",
        "",
        prose(
            "The dense engine is lowered by the same code. Both run interleaved over the same inputs, in an order "
            "drawn for each round; times are medians, brackets hold 95% intervals. Efficiency = speed-up / MAC ratio. "
            "Every plan is solved to its share of the dense MACs (`--target-macs`); nothing is tuned or searched on "
            "this model. Static masks are the baselines that a method must beat."
        ),
        "",
        "## Bars",
        "",
        *bars(sound),
        "",
        "## Speed and answers",
        "",
        prose(
            f"{answers}Agreement: same top-1 as dense. KL: of dense to reduced, in nats, mean over the photographs. "
            "Logit error: largest absolute difference between engine and PyTorch on 16 photographs; those above "
            f"{NEAR_TIE:g} are counted (a near-tie that the two break differently), beside those that PyTorch itself "
            "moves so far when its input is multiplied by 1 + 2e-7. Tokens: behind the block named, class token too."
        ),
        "",
        *table(ANSWERS_HEAD, [main_cells(*entry) for entry in order]),
        "## Added work",
        "",
        prose(
            "From ONNX Runtime's own profile: every node of `blocks.N.statistics` and `blocks.N.reduce`, the Unsqueeze "
            "and Expand that make Attention's mask, and the gather of a static mask. Percent of the time of all "
            "kernels of the same run (what passes between kernels is in the speed-ups, not here); medians over "
            f"{PROFILED[8]} runs at batch 8 and {PROFILED[1]} at batch 1."
        ),
        "",
        *table(ADDED_HEAD, [added_cells(label, row) for label, _, row in order if "refused" not in row]),
    ]
    if unplaced:
        lines += ["Neither in the dense graph nor a reducer's by name, and not counted:", "", *unplaced, ""]
    if mask_rows:
        lines += [
            "## Attention under the mask of proportional attention",
            "",
            prose(
                "tome at every block, the same tokens with the mask and without. Making the mask (log of the sizes, "
                "Unsqueeze, Expand) is part of the added work above; what the mask costs Attention itself is not."
            ),
            "",
            *table(MASK_HEAD, mask_rows),
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    parser.add_argument("--cache", type=Path, help="keep what is measured there (JSON), and go on from it")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed work per batch size (at least 20 rounds)")
    parser.add_argument("--limit", type=int, help="validate on this many photographs (default: all 736)")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", help="these rows")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.65, 0.5], help="shares of the dense MACs")
    args = parser.parse_args()
    need_shared()
    versions = [ort.__version__, torch.__version__, timm.__version__]
    settings = {"seconds": args.seconds, "limit": args.limit, "sources": sources(), "versions": versions}
    chosen = [row for row in ROWS if args.only is None or row.name in args.only]
    cache = Cache(args.cache, settings)
    rows: dict[str, dict[str, Any]] = {}
    masks: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:

        @functools.cache
        def bench() -> Bench:  # built once, and only if something is not cached
            return Bench(Path(scratch), args.seconds, args.limit)

        def measured(row: Row, target: float) -> dict[str, Any]:
            return cache.get(f"{row.name} {target:g}", lambda: bench().measure(row, target))

        def masked(target: float) -> dict[str, Any]:
            return cache.get(f"mask {target:g}", lambda: bench().measure_mask(target))

        for target in args.targets:
            rows |= {f"{row.name} {target:g}": measured(row, target) for row in chosen}
            if any(row.name == "tome" for row in chosen):
                masks[f"tome {target:g}"] = masked(target)
    text = render(chosen, args.targets, rows, masks)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
