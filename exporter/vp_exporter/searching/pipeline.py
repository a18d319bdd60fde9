"""The complete search: stages of a method in order, each kept only if it does not make the plan worse."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs, mac_ratio
from vp_exporter.searching.checkpoint import Checkpoint
from vp_exporter.searching.limits import Trace
from vp_exporter.searching.mask.baselines import PRIOR, baselines, farthest_point_order
from vp_exporter.searching.mask.budget import Costs, macs_costs, search_lifetimes
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.mask.fisher import dead_from, gate_gradients, importance
from vp_exporter.searching.mask.rearrangement import rearrange
from vp_exporter.searching.mask.starting_masks import starting_masks
from vp_exporter.searching.mask.tuning import tune
from vp_exporter.searching.report.comparison import SearchVerdict, judge_search
from vp_exporter.searching.schedule.bayesian_optimisation import FITTED
from vp_exporter.searching.schedule.mixed import search_mixed
from vp_exporter.searching.schedule.search import search_schedule
from vp_exporter.searching.scoring import COMPARED, Scorer
from vp_exporter.searching.settings import MIXED, STATIC, SearchSettings
from vp_exporter.utils.progress import SILENT, Progress


@dataclass
class SearchResult:
    """Result of a search.

    Attributes:
        plan: The winner, with provenance.
        stages: One row per stage: name, held-out KL and agreement, share of the dense MACs, seconds, note.
        baselines: Rows of the same form: plans to beat at the same counts.
        importance: float64 [depth, patches], if a Fisher pass was made.
        life: int64 [patches], of a static plan.
        trace: Loss of every candidate.
        plans: Plans of all stages, strategies and baselines by name.
        winner: Stage that the plan comes from.
        mac_ratio: Dense MACs divided by the MACs under the plan.
        verdict: The plan against the best baseline; None without baselines.
    """

    plan: ReductionPlan
    stages: list[dict[str, Any]] = field(default_factory=list)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    importance: np.ndarray | None = None
    life: np.ndarray | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    plans: dict[str, ReductionPlan] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    winner: str = ""
    mac_ratio: float = 1.0
    verdict: SearchVerdict | None = None


def search(
    scorer: Scorer,
    settings: SearchSettings,
    checkpoint: Checkpoint,
    *,
    costs: Costs | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Search for a plan.

    Args:
        scorer: The model and its calibration images.
        checkpoint: Stores what has been computed.
        costs: Of a latency budget; None for MACs.
        facts: For the plan's provenance: versions, seeds, source of the images.

    Raises:
        SearchError: if the budget is out of reach, or losses are not finite.
        PlanError: if the model lacks something that a reducer needs.
    """
    if settings.method != STATIC:
        # A schedule has few parameters and is fitted to few images; use all others to decide.
        scorer = scorer.holding_out(FITTED)
    run = _Run(scorer, settings, checkpoint, progress)
    if settings.method == STATIC:
        result = run.static(costs or macs_costs(scorer.description))
    elif settings.method in MIXED:
        result = run.mixed()
    else:
        result = run.scheduled()
    _judge(result, scorer)
    checkpoint.flush()
    provenance = {
        **(facts or {}),
        "search": {
            "stages": result.stages,
            "baselines": result.baselines,
            "evaluations": scorer.evaluations,
            "images_run": scorer.images_seen,
            "calibration_images": scorer.calibration.count(scorer.calibration.search),
            "held_out_images": scorer.calibration.count(scorer.calibration.held),
            "data_fingerprint": scorer.calibration.fingerprint,
            "skipped_images": len(scorer.calibration.skipped),
            "seed": settings.seed,
            "winner": result.winner,
            "verdict": result.verdict.to_dict() if result.verdict is not None else None,
        },
    }
    result.mac_ratio = mac_ratio(scorer.description, result.plan)
    result.plan = replace(result.plan, method=settings.method, budget=settings.asked(), provenance=provenance)
    return result


def _judge(result: SearchResult, scorer: Scorer) -> None:
    """Determine the winning stage, and whether its plan beats the best baseline; all answers are in the memo."""
    held, own = scorer.calibration.held, result.plan.fingerprint()
    same = [row["stage"] for row in result.stages if "kl" in row and result.plans[row["stage"]].fingerprint() == own]
    result.winner = same[-1] if same else ""
    # The Fisher ranking alone is the start of the search, and also a baseline.
    prior = [row for row in result.stages if row["stage"] == PRIOR != result.winner]
    if rivals := [*result.baselines, *prior]:
        best = min(rivals, key=lambda row: float(row["kl"]))["stage"]
        losses = [scorer.losses(plan, held).numpy() for plan in (result.plan, result.plans[best])]
        result.verdict = judge_search(best, *losses)


class _Run:
    """One search, with a method per stage."""

    def __init__(self, scorer: Scorer, settings: SearchSettings, checkpoint: Checkpoint, progress: Progress) -> None:
        self.scorer, self.settings, self.checkpoint, self.progress = scorer, settings, checkpoint, progress
        self.calibration, self.description = scorer.calibration, scorer.description
        self.dense_macs = count_macs(self.description).total
        self.trace, self.result = Trace(tell=progress.note), SearchResult(ReductionPlan(PlanModel.of(self.description)))

    def static(self, costs: Costs) -> SearchResult:
        """V-Pruner: Fisher, mask search, rearrangement, tuning."""
        settings, result = self.settings, self.result
        gradients = self.fisher()
        weights = importance(gradients)
        result.importance = weights
        start = time.perf_counter()
        with self.progress.stage("token mask search"):
            found = [
                search_lifetimes(
                    weights, costs, settings.share * costs.dense, min_tokens=settings.min_tokens,
                    multiple=settings.multiple, first_block_only=first,
                )
                for first in (False, True)
            ]  # fmt: skip
            # The diagonal prediction ignores interactions, which determine where tokens can be dropped: run the model.
            plans = [plan_of(each.life, self.description) for each in found]
            losses = [self.scorer.loss(plan, self.calibration.first(COMPARED), settings.temperature) for plan in plans]
        best = int(np.argmin(losses))
        prior = found[best]
        self.row(PRIOR, plans[best], start, note=f"counts {'free' if best == 0 else 'equal'} over the blocks")
        if settings.multiple > 1:
            self.note_multiple(weights, costs, settings.share * costs.dense, prior.predicted_loss, first=best == 1)
        starts = baselines(prior.counts, self.description, weights)
        starts[PRIOR] = prior.life
        for name, life in self.progress.track(starts.items(), total=len(starts), description="baselines"):
            if name != PRIOR:
                began = time.perf_counter()
                self.row(name, plan_of(life, self.description), began, baseline=True)
        life, plan = prior.life, plans[best]
        if settings.strategies:
            starts |= starting_masks(prior.counts, self.description.grid, weights[0], settings.seed)
            start = time.perf_counter()
            with self.progress.stage("token mask rearrangement"):
                moved = rearrange(
                    self.scorer, starts, dead_from(gradients).numpy(), weights, evaluations=settings.evaluations,
                    seconds=settings.seconds, seed=settings.seed, temperature=settings.temperature,
                    strategies=settings.strategies, trace=self.trace,
                )  # fmt: skip
            for strategy, ended in moved.lives.items():
                result.plans[f"rearrangement, {strategy}"] = plan_of(ended, self.description)
            life, plan = moved.life, plan_of(moved.life, self.description)
            self.row("rearrangement", plan, start, rows=list(moved.rows), note=str(moved))
        result.life = life
        return self.tuned(plan)

    def scheduled(self) -> SearchResult:
        """Counts per block of a reducer that chooses per image."""
        settings = self.settings
        start = time.perf_counter()
        assert settings.target_macs is not None
        with self.progress.stage(f"schedule of {settings.method}"):
            found = search_schedule(
                self.scorer, settings.method, settings.target_macs, evaluations=settings.evaluations,
                seconds=settings.seconds, seed=settings.seed, temperature=settings.temperature, trace=self.trace,
            )  # fmt: skip
        self.row("uniform", found.uniform_plan, start, baseline=True)
        self.row("schedule", found.plan, start, rows=found.rows)
        return self.finished(found.plan)

    def mixed(self) -> SearchResult:
        """A static drop at block 0 followed by a schedule, under one budget."""
        settings = self.settings
        assert settings.target_macs is not None
        gradients = self.fisher()
        weights = importance(gradients)
        self.result.importance = weights
        start, order = time.perf_counter(), farthest_point_order(weights[0], self.description.grid)
        with self.progress.stage(f"{settings.method}: static drop and schedule together"):
            found = search_mixed(
                self.scorer, order, settings.reducer, settings.target_macs,
                evaluations=settings.evaluations, seconds=settings.seconds, seed=settings.seed,
                temperature=settings.temperature, trace=self.trace,
            )  # fmt: skip
        self.row("uniform", found.uniform_plan, start, baseline=True)
        self.row("mixed", found.plan, start, rows=found.rows)
        return self.finished(found.plan)

    def fisher(self) -> torch.Tensor:
        """Gate gradients float32 [n, depth, patches]."""
        start = time.perf_counter()
        settings = self.settings

        def make() -> np.ndarray:
            found: np.ndarray = gate_gradients(
                self.scorer, self.calibration.search, targets=settings.targets, seed=settings.seed
            ).numpy()
            return found

        with self.progress.stage("Fisher information of the token gates"):
            gradients = torch.from_numpy(np.asarray(self.checkpoint.array(f"fisher-{settings.targets}", make)))
        self.result.stages.append({"stage": "fisher", "seconds": round(time.perf_counter() - start, 2)})
        return gradients

    def tuned(self, plan: ReductionPlan) -> SearchResult:
        """Token Mask Tuning."""
        settings = self.settings
        if settings.tuning:
            start = time.perf_counter()
            with self.progress.stage("token mask tuning"):
                found = tune(
                    self.scorer, plan, steps=settings.tune_steps, seed=settings.seed,
                    temperature=settings.temperature, methods=settings.tuning,
                )  # fmt: skip
            plan = found.plan
            self.row("tuning", plan, start, rows=found.rows)
        return self.finished(plan)

    def finished(self, plan: ReductionPlan) -> SearchResult:
        self.result.plan, self.result.trace = plan, self.trace.rows
        return self.result

    def row(
        self,
        name: str,
        plan: ReductionPlan,
        start: float,
        *,
        baseline: bool = False,
        rows: list[dict[str, Any]] | None = None,
        note: str = "",
    ) -> None:
        """Score a stage on the held-out images and record it."""
        score = self.scorer.score(plan, self.calibration.held)
        entry: dict[str, Any] = {
            "stage": name,
            "macs_share": round(count_macs(self.description, plan).total / self.dense_macs, 6),
            **score.to_dict(),
            "seconds": round(time.perf_counter() - start, 2),
        }
        if note:
            entry["note"] = note
        if rows:
            entry["rows"] = rows
        (self.result.baselines if baseline else self.result.stages).append(entry)
        self.result.plans[name] = plan
        self.progress.note(
            f"{name}: held-out KL {score.kl:.5f}, agreement {score.agreement:.2f}%" + (f" ({note})" if note else "")
        )
        self.checkpoint.flush()

    def note_multiple(self, weights: np.ndarray, costs: Costs, budget: float, predicted: float, *, first: bool) -> None:
        """Note the cost of restricting counts to multiples, by the Fisher prediction."""
        free = search_lifetimes(
            weights, costs, budget, min_tokens=self.settings.min_tokens, multiple=1, first_block_only=first
        )
        change = 100 * (predicted / free.predicted_loss - 1) if free.predicted_loss > 0 else 0.0
        self.result.warnings.append(
            f"counts are multiples of {self.settings.multiple}: predicted loss {change:+.1f}% against any counts"
        )
