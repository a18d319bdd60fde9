"""Benchmark searched plans on the flowers ViT-S/16: every stage of vpruner, every schedule, and their baselines.

    python benchmarks/search.py --out docs/results/search.md

Needs the model and photographs in ../shared (see ../shared/data/README.md). Searches on train photographs and reports
on val only. With --cache FILE, measurements are stored row by row, so an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import timm
import torch
from common import SHARED, Cache, command_line, machine, need_shared, preparation, prose, span, table
from reducers import BATCH, Bench, Recorded, short_tokens, sources

from vp_exporter.plan import ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.reducers import StaticStep
from vp_exporter.searching.calibration import Calibration, load_calibration
from vp_exporter.searching.checkpoint import Checkpoint
from vp_exporter.searching.mask.baselines import PRIOR, baselines
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.pipeline import search
from vp_exporter.searching.scoring import Scorer
from vp_exporter.searching.settings import STATIC, SearchSettings, usual_images
from vp_exporter.validation.accuracy import evaluate
from vp_exporter.validation.latency import compare

TRAIN = SHARED / "data" / "flowers" / "train"
SHOWN = ("images", "dense_top1", "reduced_top1", "top1_difference", "agreement", "kl")
ALL = ", all blocks"  # a static mask as published: one set for every block
METHODS = (STATIC, "tome", "ppt", "evit", "topk", "bat", "diffrate", "static+diffrate", "tome+diffrate")


class SearchBench(Bench):
    """The reducers' bench, with train photographs to search on."""

    def __init__(self, work: Path, seconds: float, limit: int | None, images: int | None) -> None:
        super().__init__(work, seconds, limit)
        self.images = images
        self._calibration: tuple[int, Calibration] | None = None

    def calibration(self, images: int) -> Calibration:
        """Calibration images, loaded if a search is not in the cache."""
        if self._calibration is None or self._calibration[0] != images:
            self._calibration = None  # free the memory of the previous one first
            prepare = preparation(self.model)
            found = load_calibration(TRAIN, prepare, self.model.vit, self.description, limit=images, strict=True)
            self._calibration = images, found
        return self._calibration[1]

    def search(self, method: str, share: float, evaluations: int | None, kept: Path | None) -> dict[str, Any]:
        """Plans of all stages and baselines, and the duration of the search.

        Args:
            kept: Where an interrupted search leaves its checkpoint.
        """
        images = usual_images(method) if self.images is None else self.images
        calibration, start = self.calibration(images), time.perf_counter()
        settings = SearchSettings(method=method, target_macs=share, evaluations=evaluations)
        checkpoint = Checkpoint(kept, {"settings": settings.asked(), "images": images, "sources": sources("search")})
        scorer = Scorer(self.model.vit, self.description, calibration, memo=checkpoint.memo)
        result = search(scorer, settings, checkpoint)
        checkpoint.remove()
        plans = dict(result.plans)
        if method == STATIC:
            assert result.importance is not None
            plans = {f"{name}{ALL}": plan for name, plan in self.published(result.importance, share).items()}
            own = {row["stage"] for row in result.baselines}
            plans |= {name: plan for name, plan in result.plans.items() if name not in own}
        # Without provenance, so that the cache holds exactly what is run.
        bare = {name: dataclasses.replace(plan, provenance={}).to_dict() for name, plan in plans.items()}
        return {
            "plans": bare,
            "images": images,
            "seconds": time.perf_counter() - start,
            "stages": result.stages,
            "baselines": result.baselines,
        }

    def published(self, importance: np.ndarray, share: float) -> dict[str, ReductionPlan]:
        """Static masks with one set of patches in all blocks, as large as the budget allows."""
        model = self.description
        dense = count_macs(model).total

        def at(count: int) -> dict[str, ReductionPlan]:
            lives = baselines((count,) * model.depth, model, importance)
            found = {}
            for name, life in lives.items():
                plan = plan_of(life, model)
                steps = tuple(step for step in plan.steps if isinstance(step, StaticStep))
                found[name] = dataclasses.replace(plan, steps=steps)
            return found

        count = next(
            n for n in range(model.patches - 1, 0, -1)
            if count_macs(model, at(n)["center"]).total <= share * dense
        )  # fmt: skip
        return at(count)

    def answers(self, plan: ReductionPlan) -> dict[str, Any]:
        """Results in fp32 PyTorch, on all val photographs."""
        logits = np.concatenate([self.pytorch(plan, batch.images) for batch in self.photographs.batches(BATCH)])
        found = evaluate(Recorded(self.dense_logits), Recorded(logits), self.photographs, batch_size=BATCH).to_dict()
        return {
            key: found[key] for key in ("images", "dense_top1", "reduced_top1", "top1_difference", "agreement", "kl")
        }

    def timed(self, plan: ReductionPlan) -> dict[str, Any]:
        """Timing on ONNX Runtime, against the dense engine."""
        macs = count_macs(self.description).total, count_macs(self.description, plan).total
        with self.open(self.lower(plan, "searched")) as engine:
            (line,) = compare(
                self.dense, engine, image_shape=(3, *self.description.image_size), batches=(8,),
                min_seconds=self.seconds, macs_dense=macs[0], macs_reduced=macs[1],
            )  # fmt: skip
        return line.to_dict()


def held_out(found: dict[str, Any]) -> dict[str, float]:
    """KL on the held-out photographs, of every stage, baseline and strategy in a search."""
    rows = [row for row in [*found["baselines"], *found["stages"]] if "kl" in row]
    held = {row["stage"]: row["kl"] for row in rows}
    for row in rows:
        ended = row.get("rows", ()) if row["stage"] == "rearrangement" else ()
        held |= {f"rearrangement, {end['strategy']}": end["held_kl"] for end in ended}
    return held


def row_cells(
    name: str,
    plan: ReductionPlan,
    found: dict[str, Any],
    held: float | None,
    timing: dict[str, Any] | None,
    share: float,
) -> list[str]:
    return [
        name,
        f"{share:.3f}",
        short_tokens(plan),
        f"{found['reduced_top1']:.2f}%",
        span(found["top1_difference"], 2),
        f"{found['agreement']['value']:.2f}%",
        span(found["kl"], 4),
        "" if held is None else f"{held:.4f}",
        *([span(timing["speedup"], 2), f"{timing['efficiency']:.3f}"] if timing else ["", ""]),
    ]


HEAD = [
    "plan",
    "MACs",
    "tokens @block",
    "top-1",
    "difference (95%)",
    "agreement",
    "KL (95%)",
    "KL held out",
    "speed-up, batch 8 (95%)",
]
HEAD += ["efficiency"]


def bars(share: float, kl: dict[str, float], agreement: dict[str, float], ends: Sequence[str]) -> list[str]:
    """Bars of one budget, met or not, by point estimates."""
    lines = []
    rivals = {name[len(STATIC) + 2 : -len(ALL)]: value for name, value in kl.items() if name.endswith(ALL)}
    randoms = [value for name, value in rivals.items() if name.startswith("random")]
    if randoms:
        others = {name: value for name, value in rivals.items() if not name.startswith("random")}
        others["random (mean of five)"] = float(np.mean(randoms))
        best = min(others, key=lambda name: others[name])
        ours = next(kl[end] for end in ends if end.startswith(f"{STATIC}: "))
        met = "met" if ours <= 0.85 * others[best] else "missed"
        lines.append(
            f"- {share:g}: vpruner's KL {ours:.4f} against {others[best]:.4f} of the best static baseline ({best}), "
            f"at most 0.85 of it: **{met}** ({ours / others[best]:.2f})"
        )
    for method in ("tome", "ppt", "evit", "bat"):
        if f"{method}: uniform" in kl:
            ours, uniform = kl[f"{method}: schedule"], kl[f"{method}: uniform"]
            met = "met" if ours <= 0.5 * uniform else "missed"
            lines.append(
                f"- {share:g}: {method}'s schedule {ours:.4f} against uniform {uniform:.4f}, at most 0.5 of it: "
                f"**{met}** ({ours / uniform:.2f})"
            )
    limits = {0.65: (0.005, 99.3), 0.5: (0.02, 98.3)}
    if share in limits and ends:
        most, least = limits[share]
        best = min(ends, key=lambda name: kl[name])
        met = "met" if kl[best] <= most and agreement[best] >= least else "missed"
        lines.append(
            f"- {share:g}: best plan of any kind ({best}): KL {kl[best]:.4f} (at most {most:g}), agreement "
            f"{agreement[best]:.2f}% (at least {least:g}%): **{met}**"
        )
    return lines


def of_uniform(ratios: dict[str, dict[float, tuple[str, str]]], budgets: Sequence[float]) -> list[str]:
    """KL relative to the uniform schedule's, on both sets of photographs, one row per search; no lines without any."""
    if not ratios:
        return []
    head = ["search", *(f"{share:g}, {where}" for share in budgets for where in ("held out", "val"))]
    rows = [[method, *(cell for share in budgets for cell in at.get(share, ("", "")))] for method, at in ratios.items()]
    about = (
        "A searched schedule's KL as a share of its uniform schedule's (of diffrate's for static+diffrate and "
        "tome+diffrate): on the train photographs held out of the search, half of them with a rectangle of another, "
        "and on those of val, where a few photographs decide. 1.00: nothing found was better, so the uniform one was "
        "kept."
    )
    return [prose(about), "", *table(head, rows)]


def measured(cache: Cache, method: str, share: float) -> bool:
    """Whether the cache holds the search and the results of all its plans."""
    found = cache.rows.get(f"search {method} {share:g}")
    plans = found["plans"].values() if found else ()
    return bool(plans) and all(f"answers {ReductionPlan.from_dict(plan).fingerprint()}" in cache.rows for plan in plans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    parser.add_argument("--cache", type=Path, help="keep what is measured there")
    parser.add_argument("--plans", type=Path, help="write every searched plan there, too")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.65, 0.5, 0.8])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, help="train photographs to search on (default: vp-search's)")
    parser.add_argument("--evaluations", type=int, help="candidates of each strategy (default: vp-search's)")
    parser.add_argument("--limit", type=int, help="report on this many val photographs (default: all 736)")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed work of a plan; 0: no times")
    parser.add_argument("--measured", action="store_true", help="measure nothing: write what the cache holds")
    args = parser.parse_args()
    if args.measured and args.cache is None:
        parser.error("--measured writes what the cache holds: name it with --cache FILE")
    need_shared()
    settings = {"images": args.images, "evaluations": args.evaluations, "limit": args.limit}
    settings |= {"sources": sources("search"), "onnxruntime": ort.__version__, "torch": torch.__version__}
    cache, lines, verdicts, took, missing = Cache(args.cache, settings), [], [], [], []
    ratios: dict[str, dict[float, tuple[str, str]]] = {}

    def kept(method: str, share: float) -> Path | None:
        return args.cache.with_name(f"{args.cache.name}-{method}-{share:g}.search") if args.cache else None

    with tempfile.TemporaryDirectory() as scratch:
        bench = SearchBench(Path(scratch), args.seconds, args.limit, args.images)
        for share in args.budgets:
            rows, kl, agreement, ends = [], {}, {}, []
            for method in args.methods:
                if args.measured and not measured(cache, method, share):
                    missing.append(f"{method} at {share:g}")
                    continue
                found = cache.get(
                    f"search {method} {share:g}",
                    lambda m=method, s=share: bench.search(m, s, args.evaluations, kept(m, s)),
                )
                held = held_out(found)
                took.append([f"{method} {share:g}", str(found["images"]), f"{found['seconds'] / 60:.1f}"])
                for name, data in found["plans"].items():
                    plan = ReductionPlan.from_dict(data)
                    key = plan.fingerprint()
                    answers = cache.get(f"answers {key}", lambda p=plan: bench.answers(p))
                    # Masks with equal counts take equally long: time one of them.
                    last = name == list(found["plans"])[-1]
                    timed = args.seconds and (last or name in ("uniform", PRIOR, f"grid{ALL}"))
                    row = f"time {args.seconds:g} {key}"
                    if args.measured:
                        timing = cache.rows.get(row)
                    else:
                        timing = cache.get(row, lambda p=plan: bench.timed(p)) if timed else None
                    macs = count_macs(bench.description, plan).total / count_macs(bench.description).total
                    title = f"{method}: {name}"
                    kl[title], agreement[title] = answers["kl"]["value"], answers["agreement"]["value"]
                    rows.append(row_cells(title, plan, answers, held.get(name), timing, macs))
                    dense = answers
                ends.append(title)
                if (uniform := f"{method}: uniform") in kl:
                    left = held[name] / held["uniform"], kl[title] / kl[uniform]
                    ratios.setdefault(method, {})[share] = f"{left[0]:.2f}", f"{left[1]:.2f}"
                if args.plans is not None:
                    args.plans.mkdir(parents=True, exist_ok=True)
                    plan.save(args.plans / f"{method}-{share:g}.json")
            if rows:
                lines += [f"## {share:g} of the dense MACs", "", *table(HEAD, rows)]
                verdicts += bars(share, kl, agreement, ends)
    if missing:
        verdicts.append(f"- Not measured yet: {', '.join(missing)}.")
    if not lines:
        parser.error(f"{args.cache} holds none of these searches: run without --measured first")
    text = "\n".join(
        [
            "# Searched plans on the flowers ViT-S/16",
            "",
            f"Command: `{command_line('search')}`",
            "",
            machine(),
            f"Versions: onnxruntime {ort.__version__}, torch {torch.__version__}, timm {timm.__version__}. fp32.",
            "",
            prose(
                "Searched on train photographs (a part of them held out; how many: at the end), reported on "
                f"{dense['images']} val photographs; dense top-1 {dense['dense_top1']:.2f}%. KL of dense to reduced in "
                "nats; difference of top-1 in points, paired. KL held out: of the train photographs that nothing was "
                "fitted to, by which the search decided; half of them with a rectangle of another (docs/search.md). "
                "Rows stand in the order of the search: baselines, then stages, each from the one before. Nothing is "
                'retrained. Masks "all blocks" are static masks as published, as many patches as the budget allows; '
                "vpruner's own, from the Fisher prior on, also drop the patches behind the last attention, which "
                "changes no answer and pays for some more of them."
            ),
            "",
            *of_uniform(ratios, args.budgets),
            "## Bars",
            "",
            *verdicts,
            "",
            *lines,
            "## Search time",
            "",
            *table(["search", "photographs", "minutes"], took),
        ]
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
