"""Search space of schedules: tokens that leave each block, reducer settings, and the resulting plans at a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from vp_exporter.errors import SearchError
from vp_exporter.methods import MethodRequest, build_plan
from vp_exporter.methods.base import Steps, stage_blocks
from vp_exporter.methods.diffrate import share_alive, share_dropped
from vp_exporter.methods.schedule import rounded
from vp_exporter.methods.stages import CLUSTER_SHARE, PAIR_SHARE, bat_split
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.reducers import REDUCERS, StaticStep
from vp_exporter.searching.mask.encoding import last_is_free

METHODS = ("tome", "ppt", "evit", "bat", "topk", "diffrate")
MERGED = "tome+"  # prefix of a method's name: ToMe is used in some of the blocks, initially the first half
CASCADES = tuple(f"{MERGED}{name}" for name in METHODS if name not in ("tome", "ppt"))  # PPT includes merging
SCHEDULED = (*METHODS, *CASCADES)
HALVING = ("tome", "ppt")  # bipartite matching merges at most half
TAU = 7e-5  # PPT's value for DeiT-S at 197 tokens


@dataclass(frozen=True)
class Extras:
    """Settings of a reducer besides the counts, one per block; empty for the default.

    Attributes:
        tau: Of ppt.
        clusters: Of bat, as a share of the patch tokens that leave.
        pairs: Of bat, as a share of the attentive tokens.
        dropped: Of diffrate: share of the removed tokens that is dropped rather than merged.
        merged: Of "tome+NAME": 1 if ToMe is used in a block, 0 if NAME is.
    """

    tau: tuple[float, ...] = ()
    clusters: tuple[float, ...] = ()
    pairs: tuple[float, ...] = ()
    dropped: tuple[float, ...] = ()
    merged: tuple[float, ...] = ()

    @classmethod
    def of(cls, method: str, depth: int) -> Extras:
        """Published settings, and methods.stages for BAT's unpublished split.

        A cascade merges in the first half of the blocks, where class attention is not informative.
        """
        if method.startswith(MERGED):
            merged = tuple(float(block < depth // 2) for block in range(depth))
            return replace(cls.of(method.removeprefix(MERGED), depth), merged=merged)
        if method == "ppt":
            return cls(tau=(TAU,) * depth)
        if method == "bat":
            return cls(clusters=(CLUSTER_SHARE,) * depth, pairs=(PAIR_SHARE,) * depth)
        if method == "diffrate":
            return cls(dropped=tuple(share_dropped(place) for place in places_of(depth)))
        return cls()


def steps_of(
    method: str,
    alive: Sequence[int],
    description: ModelSpec,
    extras: Extras | None = None,
    *,
    patches: int | None = None,
) -> Steps:
    """Steps of a schedule; blocks without a reduction have none.

    EViT's fused token counts as alive; if 1 is alive, it is the best patch without fusing (the reducer keeps one). In a
    cascade, blocks that remove more than half use the other reducer, since ToMe merges at most half.

    Args:
        alive: Patch tokens that leave each block.
        patches: Patch tokens that enter the first block; by default all.

    Raises:
        SearchError: if the schedule has another depth, increases, or removes everything.
    """
    depth, prefix = description.depth, description.prefix_tokens
    said, usual = extras or Extras(), Extras.of(method, depth)
    merged = said.merged or usual.merged
    counts = (description.patches if patches is None else patches, *alive)
    if len(alive) != depth or any(b > a or b < 1 for a, b in pairwise(counts)):
        raise SearchError(f"the schedule {list(alive)}", expected=f"{depth} counts that never rise, down to 1 or more")
    steps = []
    for block, (n, m) in enumerate(pairwise(counts)):
        if n == m:
            continue
        merges = bool(merged and merged[block]) and n - m <= n // 2
        name = "tome" if merges else method.removeprefix(MERGED)
        values: dict[str, Any] = {"tokens_out": prefix + m}
        if name in HALVING:
            values = {"r": n - m}
        if name == "ppt":
            values["tau"] = (said.tau or usual.tau)[block]
        elif name == "evit":
            values["fuse"] = m >= 2
        elif name == "bat":
            centres = min(m, max(1, rounded((said.clusters or usual.clusters)[block] * m)))
            pairs = (said.pairs or usual.pairs)[block]
            values["clusters"], values["pairs"] = bat_split(n, m, centres, pairs)
        elif name == "diffrate":
            dropped = rounded((n - m) * (said.dropped or usual.dropped)[block])
            values = {"prune_to": prefix + n - dropped, "merge_to": prefix + m}
        steps.append(REDUCERS[name].new(block, values, description))
    return tuple(steps)


@dataclass(frozen=True)
class Space:
    """Schedules of one method at one budget, searched in terms of `removed`: tokens removed at each block.

    Attributes:
        target: MACs as a share of the dense model's.
        keep: Patches kept by a static step at block 0; None for all, without such a step.

    Raises:
        SearchError: if the method is unknown, or the budget is out of reach.
    """

    method: str
    description: ModelSpec
    target: float
    keep: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in SCHEDULED:
            raise SearchError(f"method {self.method!r} has no schedule", expected=f"one of {', '.join(SCHEDULED)}")
        least = self.macs(self.most) / self.dense
        if not least <= self.target < 1:
            raise SearchError(
                f"`target_macs={self.target:g}` is out of reach for {self.method}",
                expected=f"{least:.4f} to 1 (excluded) of the dense MACs, which schedules of {self.method} reach",
                fix="choose a share in reach",
            )

    @cached_property
    def dense(self) -> int:
        return count_macs(self.description).total

    @property
    def budget(self) -> float:
        return self.target * self.dense

    @property
    def start(self) -> int:
        """Patch tokens that enter the first block's attention."""
        return self.description.patches if self.keep is None else len(self.keep)

    @property
    def decided(self) -> int:
        """Number of blocks to decide about.

        If the head only reads the class token, tokens after the last block are not used: it removes as many as the
        reducer allows, which does not change the output.
        """
        return self.description.depth - last_is_free(self.description)

    def least(self, entering: int) -> int:
        """Minimum number of patch tokens after a block."""
        return entering - entering // 2 if self.method in HALVING else 1

    @property
    def most(self) -> tuple[int, ...]:
        """Schedule that removes everything as early as possible."""
        return self.clip([self.start] * self.decided)

    def clip(self, removed: Sequence[int]) -> tuple[int, ...]:
        """Limit the counts to what can be removed."""
        n, done = self.start, []
        for count in removed:
            done.append(min(max(0, count), n - self.least(n)))
            n -= done[-1]
        return tuple(done)

    def alive(self, removed: Sequence[int]) -> tuple[int, ...]:
        """Patch tokens that leave each block; `removed` is clipped."""
        counts = [self.start]
        for count in self.clip(removed):
            counts.append(counts[-1] - count)
        if self.decided < self.description.depth:
            counts.append(self.least(counts[-1]))
        return tuple(counts[1:])

    def macs(self, removed: Sequence[int]) -> int:
        """MACs as counted by count_macs for the plan, without building it."""
        model, alive = self.description, self.alive(removed)
        fixed, per_token = model.head_macs
        total = self.start * model.patch_embed_macs + fixed
        total += per_token * (alive[-1] + model.prefix_tokens * model.pool_include_prefix)
        for block, (n, m) in enumerate(pairwise((self.start, *alive))):
            total += sum(self.block_macs(block, n, m))
        return total

    def block_macs(self, block: int, entering: int, leaving: int) -> tuple[int, int]:
        """MACs of attention and MLP of one block."""
        one, prefix = self.description.blocks[block], self.description.prefix_tokens
        n, m = prefix + entering, prefix + leaving
        return n * one.attention_linear + 2 * n * n * one.attention_width, m * one.mlp_linear

    def plan(self, removed: Sequence[int], extras: Extras) -> ReductionPlan:
        """Plan of a schedule."""
        return self.plan_of(self.alive(removed), extras)

    def plan_of(self, alive: Sequence[int], extras: Extras) -> ReductionPlan:
        """Plan of a schedule given as `alive`."""
        front: Steps = () if self.keep is None else (StaticStep(0, self.keep),)
        steps = front + steps_of(self.method, alive, self.description, extras, patches=self.start)
        return ReductionPlan(
            model=PlanModel.of(self.description),
            steps=steps,
            method=self.method,
            proportional_attention=any(getattr(step, "proportional", False) for step in steps),
            budget={"target_macs": self.target, "searched": True},
        )

    def fill(self, removed: Sequence[int]) -> tuple[int, ...]:
        """Reduce the removed counts as far as the budget allows: repeatedly the largest change that fits."""
        now = self.clip(removed)
        while True:
            room = [
                (macs, block, back)
                for block, count in enumerate(now)
                if count and (macs := self.macs(back := add(now, block, -1))) <= self.budget
            ]
            if not room:
                return now
            now = self.clip(max(room)[2])

    def solve(self, shape: Callable[[float], Sequence[int]], high: float) -> tuple[int, ...] | None:
        """Schedule at the least u from 0 to `high` that meets the budget, filled; None if there is none."""
        if self.macs(shape(high)) > self.budget:
            return None
        low = 0.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.macs(shape(middle)) > self.budget else (low, middle)
        return self.fill(shape(high))

    def scaled(self, weights: Sequence[float]) -> tuple[int, ...] | None:
        """Remove tokens in these proportions."""
        return self.solve(lambda u: [rounded(u * weight) for weight in weights[: self.decided]], 4.0 * self.start)

    def shifted(self, removed: Sequence[int], back: int, to: int, size: int) -> tuple[int, ...] | None:
        """Remove `size` fewer tokens at block `back`, and as many more at block `to` as the budget requires."""
        base = add(removed, back, -min(size, removed[back]))
        low, high = 0, self.start
        if self.macs(add(base, to, high)) > self.budget:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.macs(add(base, to, middle)) <= self.budget else (middle + 1, high)
        return self.fill(add(base, to, low))


def uniform(method: str, description: ModelSpec, target: float) -> ReductionPlan:
    """The paper's schedule, with MACs as close below `target` as possible.

    ToMe removes the same number at every block; PPT, EViT, Top-K and BAT act after each quarter at an even rate (PPT
    with tau 7e-5); DiffRate's published curve is scaled. For a cascade, that of the second reducer.

    Raises:
        PlanError: if it is out of reach, or a required class token is missing.
    """
    dense, asked, method = count_macs(description).total, target, method.removeprefix(MERGED)
    while True:
        plan = build_plan(MethodRequest(method, target_macs=asked, tau=TAU if method == "ppt" else None), description)
        if count_macs(description, plan).total <= target * dense:
            return plan
        asked -= 0.0005  # the closest plan may be above the target


def add(removed: Sequence[int], block: int, count: int) -> tuple[int, ...]:
    """Add `count` at one block."""
    return (*removed[:block], removed[block] + count, *removed[block + 1 :])


def places_of(depth: int) -> list[float]:
    """End of each block as a share of the depth."""
    return [(block + 1) / depth for block in range(depth)]


def usual_shapes(space: Space) -> list[tuple[int, ...] | None]:
    """Schedules with few parameters that meet the budget; None for each that cannot.

    A constant or increasing count from each block of the first half on, an even rate per quarter, DiffRate's curve. The
    start of the reduction and whether it increases matter most.
    """
    depth = space.description.depth
    curve = [share_alive(place) for place in places_of(depth)]
    stages = stage_blocks(depth)

    def published(u: float) -> tuple[int, ...]:
        return left([share ** (u / (1 - u)) for share in curve[: space.decided]])

    def staged(u: float) -> tuple[int, ...]:
        return left([(1 - u) ** sum(stage <= block for stage in stages) for block in range(space.decided)])

    def left(shares: Sequence[float]) -> tuple[int, ...]:
        alive = [max(1, rounded(space.start * share)) for share in shares]
        return tuple(a - b for a, b in pairwise((space.start, *alive)))

    rising = [
        space.scaled([(block - first + 1) ** power if block >= first else 0 for block in range(depth)])
        for power in (0.0, 1.0)
        for first in range(depth // 2 + 1)
    ]
    return [*rising, space.solve(published, 1 - 1e-6), space.solve(staged, 1 - 1e-6)]
