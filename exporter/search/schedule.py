"""How many tokens leave where: schedules of data-dependent reducers that lose least at a MAC budget.

A schedule is `alive`, the patch tokens that leave each block. Starts are the papers' uniform schedule, rising ones, the
DiffRate curve and the optimum of a table of sensitivities; from the best of them a local search by evaluation moves
tokens between blocks and tries the reducers' own settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vp_exporter.methods.schedule import rounded
from vp_exporter.plan import ReductionPlan
from vp_exporter.search.allowance import Allowance, Trace
from vp_exporter.search.scoring import Scorer, merit
from vp_exporter.search.sensitivity import LEVELS, Sensitivity, allocate, measure
from vp_exporter.search.space import Extras, Space, add, uniform, usual_shapes

FITTED = 256  # search images that schedules are compared on: some that differ by much are ordered wrongly by 128
SIZES = (16, 8, 4, 2, 1)  # tokens that one move shifts, at most a 24th of all
_PATIENCE = 6  # moves in a row that do not help, before their estimates are measured again
_SETTLED = 5  # schedules that meet the held-out images, and as many other starts
_CLOSE = 0.1  # of the best loss: a start this much worse on some images is not run on the others
_TWEAKS = 12  # settings of single blocks that one round tries
_GRID, _COSTS = 24, 1200  # levels of a count and of the budget in the dynamic program
# Settings that a move tries; those of tau are 0 (always drop), 1 (always merge: shares vary less), and factors.
_OPTIONS = {
    "clusters": (0.0, 0.05, 0.15, 0.3, 0.6), "pairs": (0.0, 0.08, 0.25, 0.5), "dropped": (0.0, 0.25, 0.5, 0.75, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Scheduled:
    """What a search found.

    Attributes:
        plan: the winner; on the held-out images no worse than `uniform_plan`.
        kl, uniform_kl: mean KL on the held-out images, nats, temperature 1.
        rows: of the trace, as far as this search added them; losses are those of the search (roots, softened).
    """

    plan: ReductionPlan
    uniform_plan: ReductionPlan
    uniform_kl: float
    kl: float
    rows: list[dict[str, Any]] = field(default_factory=list)


class Local:
    """A local search in one space; `begin`, then `improve` as often as there is something to spend.

    Every decision hangs on losses and on a seed, so all processes decide alike. A candidate that is worse on the
    first part of the images is not run on the others.

    Attributes:
        removed, extras, loss: the best so far, its loss on the search images.
        past: the plans that were the best, one after another.
        starts: the others that the search could have started from, and their losses.
    """

    def __init__(
        self,
        scorer: Scorer,
        space: Space,
        allowance: Allowance,
        *,
        seed: int,
        temperature: float,
        trace: Trace,
        extras: Extras | None = None,
    ) -> None:
        self.scorer, self.space, self.allowance, self.temperature, self.trace = (
            scorer, space, allowance, temperature, trace,
        )  # fmt: skip
        self.removed, self.loss = space.fill(space.most), math.inf
        self.extras = extras or Extras.of(space.method, space.description.depth)
        self.past: list[ReductionPlan] = []
        self.starts: list[tuple[float, ReductionPlan]] = []
        self._rng = np.random.default_rng(seed)
        self._seen: set[str] = set()
        self._losses: list[Tensor] = []
        self._started = extras is not None  # settings found elsewhere are not searched widely again
        self._batches = scorer.calibration.first(FITTED)
        self._parts = doubling(self._batches)
        self._name = space.method if space.keep is None else f"static {space.start} + {space.method}"

    @property
    def plan(self) -> ReductionPlan:
        return self.space.plan(self.removed, self.extras)

    def begin(self, starts: Sequence[tuple[int, ...] | None], *, shapes: bool = True) -> None:
        """Take the best of some schedules and of the usual shapes; None stands for one that cannot meet the budget."""
        for removed in (*starts, *(usual_shapes(self.space) if shapes else ())):
            if removed is not None and (self.allowance.left or not self._losses):
                self._try(removed, self.extras, "start")
        if not self._losses:
            self._try(self.removed, self.extras, "start")

    def improve(self, until: int | None = None) -> None:
        """Search until nothing helps, the allowance is spent, or `until` of its evaluations are."""
        if not self._started:
            self._started = True
            self._tweak(self._wide(), until)
        while self._left(until):
            before = self.loss
            for size in [size for size in SIZES if size == 1 or 24 * size <= self.space.start]:
                while self._shift(size, until):
                    pass
                self._tweak(self._narrow(), until)
            if self.loss >= before:
                return

    def _left(self, until: int | None) -> bool:
        return self.allowance.left and (until is None or self.allowance.spent < until)

    def _try(self, removed: Sequence[int], extras: Extras, stage: str) -> bool:
        """Run a candidate and take it where its mean loss on the search images is lower."""
        plan = self.space.plan(removed, extras)
        name = plan.fingerprint()
        if name in self._seen:
            return False
        self._seen.add(name)
        self.allowance.spend()
        losses: list[Tensor] = []
        worse: Tensor | None = None
        for part in self._parts:
            losses.append(self.scorer.losses(plan, part, self.temperature))
            if self._losses:
                worse = torch.cat(losses) - torch.cat(self._losses[: len(losses)])
                # A start may be the best on other images: it is given up only where it is worse by much.
                if float(worse.mean()) >= (_CLOSE * self.loss if stage == "start" else 0):
                    break  # on the same images
        # What was seen of it, set against the same images of the best: the two sums are then of one scale.
        loss = float(torch.cat(losses).mean()) if worse is None else self.loss + float(worse.mean())
        taken = worse is None or (len(losses) == len(self._parts) and float(worse.mean()) < 0)
        if taken:
            self.removed, self.extras, self._losses = self.space.clip(removed), extras, losses
            self.past.append(plan)
            self.loss = float(torch.cat(losses).mean())
            if stage != "start":
                self.remember()
        elif stage == "start" and len(losses) == len(self._parts):
            self.starts.append((loss, plan))
        self.trace.add(f"{self._name}: {stage}", loss, self.loss)
        return taken

    def remember(self) -> None:
        """Keep what leaves each block under the best plan."""
        self.scorer.remember(self.plan, self._batches)

    def _shift(self, size: int, until: int | None) -> bool:
        """Estimate what a token more costs at each block, and move tokens from dear blocks to cheap ones."""
        base = float(self._losses[0].mean())
        macs, slopes = self.space.macs(self.removed), []
        for block in range(self.space.decided):
            more = self.space.clip(add(self.removed, block, size))
            saved = macs - self.space.macs(more)
            if saved <= 0:
                slopes.append(math.inf)
                continue
            if not self._left(until):
                return False
            self.allowance.spend()
            loss = self.scorer.loss(self.space.plan(more, self.extras), self._parts[0], self.temperature)
            slopes.append((loss - base) * macs / saved)
        order = sorted(range(len(slopes)), key=lambda block: slopes[block])
        cheap = [block for block in order if math.isfinite(slopes[block])]
        pairs = [
            (slopes[to] - slopes[back], back, to)
            for back in range(len(slopes))
            for to in range(len(slopes))
            if back != to and math.isfinite(slopes[to])
        ]
        failed, gained = 0, False
        for several in (3, 2):  # the dearest give to the cheapest at once, then two by two
            moved: tuple[int, ...] | None = self.removed
            for back, to in list(zip(reversed(order), cheap, strict=False))[:several]:
                if moved is not None and back != to and moved[back]:
                    moved = self.space.shifted(moved, back, to, size)
            if moved is not None and self._fresh(moved, self.extras) and self._left(until):
                gained |= self._try(moved, self.extras, f"shift {size}")
        for _, back, to in sorted(pairs):
            while self._left(until) and failed < _PATIENCE and self.removed[back]:
                moved = self.space.shifted(self.removed, back, to, size)
                if moved is None or not self._fresh(moved, self.extras):
                    break
                if not self._try(moved, self.extras, f"shift {size}"):
                    failed += 1
                    break
                failed, gained = 0, True  # what helped may help again
        return gained

    def _fresh(self, removed: Sequence[int], extras: Extras) -> bool:
        return self.space.plan(removed, extras).fingerprint() not in self._seen

    def _tweak(self, moves: Sequence[tuple[str, int, tuple[int, ...]]], until: int | None) -> None:
        """Try settings: (field, which of its options, blocks)."""
        for name, option, blocks in moves:
            values = list(getattr(self.extras, name))
            for block in blocks:
                if name == "tau":
                    values[block] = (0.0, 1.0, values[block] / 2, min(1.0, values[block] * 2))[option]
                else:
                    values[block] = _OPTIONS[name][option]
            extras = dataclasses.replace(self.extras, **{name: tuple(values)})
            if self._fresh(self.removed, extras):
                if not self._left(until):
                    return
                self._try(self.removed, extras, name)

    def _wide(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """Every setting for all blocks, and for each half of them."""
        depth = self.space.description.depth
        groups = tuple(range(depth)), tuple(range(depth // 2)), tuple(range(depth // 2, depth))
        return [(name, option, blocks) for blocks in groups for name, option in self._settings()]

    def _narrow(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """Some settings of single blocks that act, drawn by the seed."""
        acting = [block for block, count in enumerate(self.removed) if count]
        moves = [(name, option, (block,)) for block in acting for name, option in self._settings()]
        return [moves[i] for i in self._rng.permutation(len(moves))[:_TWEAKS]]

    def _settings(self) -> list[tuple[str, int]]:
        names = [entry.name for entry in dataclasses.fields(self.extras) if getattr(self.extras, entry.name)]
        return [(name, option) for name in names for option in range(len(_OPTIONS.get(name, range(4))))]


def doubling(batches: Sequence[int]) -> list[Sequence[int]]:
    """An eighth of the batches, another one, a quarter, the other half: what a candidate is run on, one by one."""
    cuts = sorted({0, *(-(-len(batches) * eighths // 8) for eighths in (1, 2, 4, 8))})
    return [batches[a:b] for a, b in pairwise(cuts)]


def sensitivity(
    scorer: Scorer, space: Space, allowance: Allowance, temperature: float, *, images: int = 32
) -> Sensitivity | None:
    """The table of a space without a static step, on the first batches that hold `images` images.

    At most a third of the evaluations go into it: it has fewer levels, or there is none, where they do not suffice.
    """
    counts = sorted({min(space.start - 1, max(space.least(space.start), rounded(share * space.start)))
                     for share in LEVELS} - {0}, reverse=True)  # fmt: skip
    if allowance.limit is not None:
        levels = (allowance.limit - allowance.spent) // 3 // max(1, space.decided)
        counts = counts[-1:] if levels == 1 else counts[: min(levels, len(counts))]
    if not counts:
        return None
    extras = Extras.of(space.method, space.description.depth)

    def plan_at(block: int, count: int) -> ReductionPlan:
        return space.plan_of([space.start] * block + [count] * (space.description.depth - block), extras)

    def left() -> bool:
        if not allowance.left:
            return False
        allowance.spend()
        return True

    return measure(
        scorer, plan_at, counts, range(space.decided), space.start, batches=scorer.calibration.first(images),
        temperature=temperature, left=left,
    )  # fmt: skip


def planned(space: Space, table: Sensitivity, power: float = 1.0) -> tuple[int, ...] | None:
    """The optimum of a table: losses add up where `power` is 1, their roots where it is 1/2.

    Counts lie on a grid, and every block's MACs are rounded up, so what is left is filled afterwards.
    """
    model, depth = space.description, space.description.depth
    counts = sorted({rounded(float(x)) for x in np.linspace(1, space.start, _GRID)}, reverse=True)
    losses = np.full((depth, len(counts), len(counts)), np.inf)
    costs = np.zeros(losses.shape, dtype=np.int64)
    unit = space.dense / _COSTS
    for block in range(depth):
        lost = [table.at(block, count / space.start) ** power for count in counts]
        for i, n in enumerate(counts):
            for o in range(i, len(counts)):
                m = counts[o]
                if block >= space.decided:
                    if i != o:
                        continue
                    m = space.least(n)
                elif m < space.least(n):
                    continue
                macs = sum(space.block_macs(block, n, m)) + (block == depth - 1) * model.head_macs[1] * m
                losses[block, i, o] = 0.0 if block >= space.decided else lost[o] - lost[i]
                costs[block, i, o] = math.ceil(macs / unit)
    fixed = space.start * model.patch_embed_macs + model.head_macs[0]
    fixed += model.head_macs[1] * model.prefix_tokens * model.pool_include_prefix
    budget = math.floor((space.budget - fixed) / unit)
    path = allocate(losses, costs, budget) if budget > 0 else None
    if path is None:
        return None
    return space.fill([a - b for a, b in pairwise([space.start, *(counts[o] for o in path[: space.decided])])])


def search_schedule(
    scorer: Scorer,
    method: str,
    target: float,
    *,
    evaluations: int | None = 300,
    seconds: float | None = None,
    seed: int = 0,
    temperature: float = 3.0,
    trace: Trace | None = None,
) -> Scheduled:
    """Search the counts and settings of a reducer; the papers' uniform schedule is what it must beat.

    Args:
        target: MACs as a share of the dense model's; the plan has at most that.
        evaluations, seconds: what it may spend (vp_exporter.search.allowance).
        temperature: of the losses that it searches on; held-out losses are plain.

    Raises:
        SearchError: an unknown method, or a budget out of reach.
        PlanError: the uniform schedule does not reach the budget, or the model lacks what the method needs.
    """
    trace = Trace() if trace is None else trace
    first = len(trace.rows)
    space = Space(method, scorer.description, target)
    even = uniform(method, scorer.description, target)
    local = Local(
        scorer, space, Allowance(evaluations, seconds, scorer.workers), seed=seed, temperature=temperature, trace=trace
    )
    begin(local, even, sensitivity(scorer, space, local.allowance, temperature))
    local.remember()
    local.improve()
    return settle(scorer, local, even, trace.rows[first:])


def begin(
    local: Local,
    even: ReductionPlan,
    table: Sensitivity | None,
    more: Sequence[tuple[int, ...] | None] = (),
    *,
    shapes: bool = True,
) -> None:
    """Start from the uniform schedule, from the optima of a table, from `more` and from the usual shapes."""
    space = local.space
    alive = [row.mlp - space.description.prefix_tokens for row in even.tokens()]
    weights = [a - b for a, b in pairwise((space.description.patches, *alive))]
    optima = [planned(space, table, power) for power in (1.0, 0.5)] if table else []
    local.begin([space.scaled(weights), *optima, *more], shapes=shapes)


def settle(scorer: Scorer, local: Local, even: ReductionPlan, rows: list[dict[str, Any]]) -> Scheduled:
    """The best of the last schedules, other starts and the uniform one on the held-out images; gives the memory back.

    What was best on the search images has been fitted to them, the usual shapes have not. Of those whose plain KL is
    not above the uniform schedule's the one of most merit (scoring.merit).
    """
    held = scorer.calibration.held
    uniform_kl = scorer.loss(even, held)
    best = dataclasses.replace(even, budget=local.plan.budget)
    kl, least = uniform_kl, merit(uniform_kl, scorer.loss(even, held, local.temperature))
    others = [plan for _, plan in sorted(local.starts, key=lambda start: start[0])]
    for plan in (*local.past[: -_SETTLED - 1 : -1], *others[:_SETTLED]):
        plan_kl = scorer.loss(plan, held)
        found = merit(plan_kl, scorer.loss(plan, held, local.temperature))
        if plan_kl <= uniform_kl and found < least:
            best, kl, least = plan, plan_kl, found
    scorer.forget()
    return Scheduled(best, even, uniform_kl, kl, rows)
