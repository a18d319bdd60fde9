"""Bayesian optimisation of a schedule, with a Gaussian process as surrogate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.schedule.gaussian_process import GaussianProcess
from vp_exporter.searching.schedule.space import TAU, Extras, Space
from vp_exporter.searching.scoring import Scorer

FITTED = 256  # search images: a quarter of them, in rotation, for each candidate, all for the best ones
FINALISTS = 6  # number of schedules evaluated on all of these images
SIZES = (1, 2, 4, 8, 16, 32)  # tokens shifted by one move, at most a 12th of all
_PARENTS, _POOL = 6, 64  # proposals are neighbours of this many schedules; one of this many proposals is run
_PATIENCE = 40  # stop after this many candidates without a new best schedule
_SETTING = 0.4  # share of the proposals that change a setting, if there is one
# Settings to propose; for tau: always drop, always merge (variances of the scores are smaller), and the published
# value.
_OPTIONS = {
    "tau": (0.0, TAU, 1.0), "clusters": (0.0, 0.05, 0.15, 0.3, 0.6), "pairs": (0.0, 0.08, 0.25, 0.5),
    "dropped": (0.0, 0.25, 0.5, 0.75, 1.0), "merged": (0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A schedule that was run.

    Attributes:
        loss: Its mean over a part of the search images, normalised for the difficulty of the part: multiplied by the
            first start's loss on all images divided by that on the part.
    """

    removed: tuple[int, ...]
    extras: Extras
    plan: ReductionPlan
    loss: float
    start: bool


class BayesianOptimisation:
    """Bayesian optimisation in one space: call `begin`, then `improve` while the budget lasts, then `finalists`.

    Candidates are run on different parts of the search images in rotation: a trend common to neighbours on different
    images generalises, while a search on one part would overfit to it. The surrogate, fitted to all candidates, selects
    the best and the next one to run. The leader decides for all processes, since the last bit of a sum may differ.

    Args:
        extras: Initial settings; by default the published ones.

    Attributes:
        found: Every candidate that was run.
        best: Best candidate by the surrogate.
        expected: Log of its loss by the surrogate.
    """

    def __init__(
        self,
        scorer: Scorer,
        space: Space,
        limits: Limits,
        *,
        seed: int,
        temperature: float,
        trace: Trace,
        extras: Extras | None = None,
    ) -> None:
        self.scorer, self.space, self.limits, self.temperature, self.trace = (
            scorer, space, limits, temperature, trace,
        )  # fmt: skip
        self.extras = extras or Extras.of(space.method, space.description.depth)
        self.found: list[Candidate] = []
        self._rng = np.random.default_rng(seed)
        self._seen: set[str] = set()
        self._batches = scorer.calibration.first(FITTED)
        size = -(-len(self._batches) // 4)
        self._parts = [self._batches[i : i + size] for i in range(0, len(self._batches), size)]
        # of each part: the first start's loss on all images divided by that on the part
        self._difficulty: list[float] = []
        self._order: list[int] = []
        self._expected: list[float] = []
        self._name = space.method if space.keep is None else f"static {space.start} + {space.method}"

    @property
    def best(self) -> Candidate:
        return self.found[self._order[0]]

    @property
    def expected(self) -> float:
        return self._expected[self._order[0]]

    def begin(self, starts: Sequence[tuple[int, ...] | None]) -> None:
        """Run at least one schedule; None stands for a schedule that cannot meet the budget."""
        for removed in starts:
            if removed is not None and (self.limits.left or not self.found):
                self._try(removed, self.extras, "start")
        if not self.found:
            self._try(self.space.fill(self.space.most), self.extras, "start")
        self._rank()

    def improve(self, until: int | None = None) -> None:
        """Search until nothing helps, a limit is reached, or `until` evaluations are spent."""
        same = 0
        while same < _PATIENCE and self.limits.left and (until is None or self.limits.spent < until):
            proposed = self.scorer.workers.from_leader(self._propose)
            if proposed is None:
                return
            before = self.best
            self._try(*proposed, "guided")
            self._rank()
            same = same + 1 if self.best is before else 0

    def finalists(self, count: int) -> list[ReductionPlan]:
        """Of the best FINALISTS, those with the lowest loss on all search images, followed by as many other starts."""
        chosen = [self.found[i].plan for i in self._order[:FINALISTS]]
        losses = [self.scorer.loss(plan, self._batches, self.temperature) for plan in chosen]
        best = [chosen[i] for i in sorted(range(len(chosen)), key=lambda i: losses[i])[:count]]
        starts = [self.found[i].plan for i in self._order if self.found[i].start]
        return [*best, *[plan for plan in starts if plan not in best][:count]]

    def _try(self, removed: Sequence[int], extras: Extras, stage: str) -> None:
        """Run a candidate, unless it has been run."""
        plan = self.space.plan(removed, extras)
        name = plan.fingerprint()
        if name in self._seen:
            return
        self._seen.add(name)
        self.limits.spend()
        if not self._difficulty:
            losses = [self.scorer.losses(plan, part, self.temperature) for part in self._parts]
            whole = float(torch.cat(losses).mean())
            self._difficulty = [whole / max(float(part.mean()), 1e-12) for part in losses]
            loss = whole
        else:
            turn = len(self.found) % len(self._parts)
            loss = self._difficulty[turn] * self.scorer.loss(plan, self._parts[turn], self.temperature)
        self.found.append(Candidate(self.space.clip(removed), extras, plan, loss, stage == "start"))
        self.trace.add(f"{self._name}: {stage}", loss, min(one.loss for one in self.found))

    def _rank(self) -> None:
        """Sort candidates by the surrogate's expectation."""
        self._expected = self.scorer.workers.from_leader(self._fit)
        self._order = sorted(range(len(self.found)), key=lambda i: self._expected[i])

    def _fit(self) -> list[float]:
        """Fit the surrogate (on the leader only) and return its expectation for each candidate."""
        points = self._points(self.found)
        self._process = GaussianProcess.fit(*points, np.log([max(one.loss, 1e-9) for one in self.found]))
        expected: list[float] = self._process.predict(*points)[0].tolist()
        return expected

    def _points(self, candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of candidates for the surrogate: shares float64 [n, d], settings float64 [n, e]."""
        shares, settings = zip(*(self._point(one.removed, one.extras) for one in candidates), strict=True)
        return np.stack(shares), np.stack(settings)

    def _point(self, removed: Sequence[int], extras: Extras) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of a schedule: roots of the shares that leave each block, and active settings scaled to 0..1."""
        shares = np.sqrt(np.array(self.space.alive(removed)[: self.space.decided]) / self.space.start)
        settings = []
        for field in dataclasses.fields(extras):
            values = getattr(extras, field.name)
            options = _OPTIONS[field.name]
            for value, count in zip(values[: self.space.decided], removed, strict=False):
                rank = float(np.interp(value, options, np.linspace(0, 1, len(options))))
                settings.append(rank if count else 0.5)
        return shares, np.array(settings)

    def _propose(self) -> tuple[tuple[int, ...], Extras] | None:
        """Neighbour of the best schedules with the least lower bound (mean - deviation); None if all were run."""
        parents = [self.found[i] for i in self._order[:_PARENTS]]
        pool: dict[str, Candidate] = {}
        for _ in range(4 * _POOL):
            removed, extras = self._neighbour(parents)
            plan = self.space.plan(removed, extras)
            name = plan.fingerprint()
            if name not in self._seen:
                pool[name] = Candidate(removed, extras, plan, 0.0, False)
            if len(pool) == _POOL:
                break
        if not pool:
            return None
        candidates = list(pool.values())
        mean, deviation = self._process.predict(*self._points(candidates))
        chosen = candidates[int((mean - deviation).argmin())]
        return chosen.removed, chosen.extras

    def _neighbour(self, parents: Sequence[Candidate]) -> tuple[tuple[int, ...], Extras]:
        """One to three shifts, or the midpoint of two parents; or a new setting for one, half or all of the blocks."""
        rng = self._rng
        parent = parents[int(rng.integers(len(parents)))]
        removed, extras = parent.removed, parent.extras
        names = [entry.name for entry in dataclasses.fields(extras) if getattr(extras, entry.name)]
        if names and rng.random() < _SETTING:
            extras = self._other_setting(extras, names[int(rng.integers(len(names)))])
            if rng.random() < 0.5:
                return removed, extras
        if rng.random() < 0.2:
            other = parents[int(rng.integers(len(parents)))]
            middle = self.space.scaled([a + b for a, b in zip(removed, other.removed, strict=True)])
            return (removed if middle is None else middle), extras
        sizes = [size for size in SIZES if size == 1 or 12 * size <= self.space.start]
        for _ in range(rng.integers(1, 4)):
            giving = [block for block, count in enumerate(removed) if count]
            if not giving or self.space.decided < 2:
                break
            back = giving[int(rng.integers(len(giving)))]
            to = (back + rng.integers(1, self.space.decided)) % self.space.decided
            moved = self.space.shifted(removed, back, int(to), int(sizes[rng.integers(len(sizes))]))
            removed = removed if moved is None else moved
        return removed, extras

    def _other_setting(self, extras: Extras, name: str) -> Extras:
        depth, rng = self.space.description.depth, self._rng
        groups = [range(depth), range(depth // 2), range(depth // 2, depth), (int(rng.integers(depth)),)]
        blocks = groups[int(rng.integers(len(groups)))]
        option = _OPTIONS[name][rng.integers(len(_OPTIONS[name]))]
        values = [option if i in blocks else value for i, value in enumerate(getattr(extras, name))]
        return dataclasses.replace(extras, **{name: tuple(values)})
