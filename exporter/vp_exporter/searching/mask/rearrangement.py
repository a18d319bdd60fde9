"""Stage 2, rearrangement: change which patches leave when, keeping the counts found by stage 1."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vp_exporter.errors import SearchError
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.mask.baselines import PRIOR
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.mask.exchange import block_fisher_swap, local_search
from vp_exporter.searching.mask.ppo import ppo_search
from vp_exporter.searching.scoring import COMPARED, Scorer, settled

SWAP = "block fisher swap"
START = "start"
STRATEGIES = ("greedy", "ppo")


@dataclass(frozen=True)
class Rearranged:
    """Result of the rearrangement: the best mask on held-out images.

    Attributes:
        life: int64 [patches].
        strategy: "greedy", "ppo", "block fisher swap", or "start" (no start was improved).
        start: Name of the start that it came from.
        prior_kl, kl: Mean KL(dense || reduced) of the Fisher prior and of `life` on the held-out batches, nats.
        rows: One per candidate: {strategy, start, search_loss, held_kl, held_loss, evaluations, seconds}; losses are
            those used by the search (Scorer.losses).
        lives: Final lifetimes of each strategy, whether kept or not.
    """

    life: np.ndarray
    strategy: str
    start: str
    prior_kl: float
    kl: float
    rows: tuple[dict[str, Any], ...]
    lives: Mapping[str, np.ndarray]

    @property
    def gain(self) -> float:
        """Reduction of the held-out KL against the Fisher prior, in nats; 0 if the prior was kept."""
        return self.prior_kl - self.kl

    def __str__(self) -> str:
        if self.strategy == START and self.start == PRIOR:
            return f"the Fisher prior stays: nothing beat its held-out KL of {self.prior_kl:.4f}"
        name = self.start if self.strategy == START else f"{self.strategy} from {self.start}"
        share = 100 * self.gain / self.prior_kl if self.prior_kl else 0.0
        return f"{name}: held-out KL {self.kl:.4f}, {share:.1f} % below the Fisher prior's {self.prior_kl:.4f}"


def rearrange(
    scorer: Scorer,
    starts: Mapping[str, np.ndarray],
    effects: np.ndarray,
    importance: np.ndarray,
    *,
    evaluations: int | None,
    seconds: float | None,
    seed: int,
    temperature: float = 3.0,
    strategies: Sequence[str] = STRATEGIES,
    trace: Trace,
) -> Rearranged:
    """Improve the best of several masks by exchanges.

    Compares the best start on the search batches with what `block_fisher_swap` makes of it; each strategy continues
    from the better one, with the same limits. All of them, starts included, are then evaluated on the held-out images.
    Among those whose plain KL is not above the Fisher prior's, the one of least merit (scoring.settled) is kept; on
    ties, the prior.

    Args:
        starts: Lifetimes int [patches] by name, including "fisher prior". A strategy keeps the counts of its start.
        effects: float [images, depth, patches]; importance: float [depth, patches]. See `exchange`.
        evaluations, seconds: Limits of each strategy; None for no limit.
        seed: Seed of the strategies.
        temperature: Temperature of the loss used by the search.
        strategies: Of "greedy" and "ppo".
        trace: Receives a row per candidate.

    Raises:
        SearchError: if the Fisher prior is missing, a strategy is unknown, arrays do not fit the model, or losses are
            not finite.
    """
    _check(scorer, starts, effects, importance, strategies)
    batches, workers = scorer.calibration.first(COMPARED), scorer.workers
    found: list[tuple[str, str, np.ndarray, float]] = []  # strategy, start, life, search loss
    rows: list[dict[str, Any]] = []
    clock = time.perf_counter()

    def add(strategy: str, start: str, life: np.ndarray, loss: float, spent: int) -> None:
        nonlocal clock
        life = np.array(life, dtype=np.int64)
        found.append((strategy, start, life, loss))
        rows.append(
            {"strategy": strategy, "start": start, "search_loss": loss, "held_kl": float("nan"),
             "held_loss": float("nan"), "evaluations": spent,
             "seconds": time.perf_counter() - clock}
        )  # fmt: skip
        clock = time.perf_counter()

    def measure(strategy: str, start: str, life: np.ndarray) -> None:
        loss = scorer.loss(plan_of(life, scorer.description), batches, temperature)
        add(strategy, start, life, loss, 1)
        trace.add(START, loss, min(entry[3] for entry in found))

    measure(START, PRIOR, starts[PRIOR])  # first, so that it wins ties
    for name, life in starts.items():
        if name != PRIOR:
            measure(START, name, life)
    _, start, life, _ = min(found, key=lambda entry: entry[3])
    # On one process: the last bit of a matrix product could lead to another decision on another machine.
    measure(SWAP, start, workers.from_leader(lambda: block_fisher_swap(effects, life)))
    life, loss = min(((entry[2], entry[3]) for entry in found), key=lambda entry: entry[1])
    for strategy in strategies:
        limits = Limits(evaluations, seconds, workers)
        if strategy == "greedy":
            better, loss = local_search(
                scorer, life, limits, trace,
                batches=batches, importance=importance, seed=seed, temperature=temperature,
            )  # fmt: skip
        else:
            better, loss = ppo_search(
                scorer, life, effects, importance, limits, trace,
                batches=batches, seed=seed, temperature=temperature,
            )  # fmt: skip
        add(strategy, start, better, loss, limits.spent)
    for row, (_, _, life, _) in zip(rows, found, strict=True):
        plan = plan_of(life, scorer.description)
        row["held_kl"] = scorer.loss(plan, scorer.calibration.held)
        row["held_loss"] = scorer.loss(plan, scorer.calibration.held, temperature)
    best = settled([(row["held_kl"], row["held_loss"]) for row in rows])
    lives = {strategy: life for strategy, _, life, _ in found if strategy in strategies}
    strategy, start, life, _ = found[best]
    return Rearranged(life, strategy, start, rows[0]["held_kl"], rows[best]["held_kl"], tuple(rows), lives)


def _check(
    scorer: Scorer,
    starts: Mapping[str, np.ndarray],
    effects: np.ndarray,
    importance: np.ndarray,
    strategies: Sequence[str],
) -> None:
    depth, patches = scorer.description.depth, scorer.description.patches
    if PRIOR not in starts:
        raise SearchError(f"no {PRIOR!r} among the starts ({', '.join(starts)})", expected="the mask of stage 1")
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise SearchError(f"unknown strategy {strategy!r}", expected=" or ".join(STRATEGIES))
    for name, life in starts.items():
        if life.shape != (patches,) or life.min() < 0 or life.max() > depth:
            raise SearchError(
                f"start {name!r} has shape {life.shape}, lifetimes {life.min()} to {life.max()}",
                expected=f"({patches},), 0 to {depth}",
            )
    if effects.ndim != 3 or effects.shape[1:] != (depth, patches) or importance.shape != (depth, patches):
        raise SearchError(
            f"effects {effects.shape}, importance {importance.shape}",
            expected=f"(images, {depth}, {patches}) and ({depth}, {patches})",
        )
