"""Token Mask Tuning: a scale for every remaining token, as an additive attention logit log s (a plan's key_bias).

Tokens dropped by a static step are missing in each softmax, which gives the remaining ones too much weight, most of all
the class token. A bias for every key in each block that has lost patches restores the balance, at the cost of one
constant row per block.

Blocks that still have every patch are left alone: before anything is dropped, they equal the dense model. So are blocks
after a step that chooses per image, since a bias belongs to a grid position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vp_exporter.errors import SearchError
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers.stream import Stream
from vp_exporter.rewrite.block import ReducedBlock
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.mask.least_squares import (
    answers,
    attended,
    normal_equations,
    row_weights,
    sample_rows,
    solve,
    through_mlp,
    why_not_linear,
)
from vp_exporter.searching.scoring import COMPARED, Scorer, embed, frozen, kl

METHODS = ("shared", "least-squares", "adam")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of log(patches / alive)
FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # of the least-squares step
LIMIT = 10.0  # nats: a bias of -10 practically removes a token
SMOOTH = 1e-4  # nats: below it the root of the KL has too steep a slope
DIGITS = 6  # of a bias in the plan: far below fp16 resolution


@dataclass(frozen=True)
class Tuned:
    """A tuned plan.

    Attributes:
        plan: The given plan if nothing helped.
        kl_before, kl_after: Mean KL(dense || reduced) on the held-out batches, nats; after <= before.
        rows: {"stage", "held_kl" and "held_loss" (of the stage's result, None without one), "accepted", "seconds",
            "note"}; the loss is that used by the search (Scorer.losses).
    """

    plan: ReductionPlan
    kl_before: float
    kl_after: float
    rows: list[dict[str, Any]]


def tune(
    scorer: Scorer,
    plan: ReductionPlan,
    *,
    steps: int = 32,
    seed: int = 0,
    temperature: float = 3.0,
    lr: float = 0.03,
    methods: Sequence[str] = METHODS,
) -> Tuned:
    """Run the stages in order: Adam on all search batches, others on COMPARED images of them.

    A stage is kept only if it lowers both the plain KL and the loss used by the search on the held-out images.

    Args:
        steps, seed, temperature, lr: As for `adam`; the seed is also used for the queries of `least_squares`.
        methods: Of METHODS, in execution order.

    Raises:
        SearchError: if a method is unknown, or a value is out of range.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise SearchError(f"the tuning method {unknown[0]!r}", expected=f"of {', '.join(METHODS)}")
    search, held = scorer.calibration.search, scorer.calibration.held
    some = scorer.calibration.first(COMPARED)
    stages: dict[str, Callable[[ReductionPlan], ReductionPlan]] = {
        "shared": lambda now: shared_bias(scorer, now, some, temperature=temperature),
        "least-squares": lambda now: least_squares(scorer, now, some, seed=seed),
        "adam": lambda now: adam(scorer, now, search, steps=steps, lr=lr, temperature=temperature, seed=seed),
    }
    before = best = scorer.loss(plan, held)
    best_loss = scorer.loss(plan, held, temperature)
    rows: list[dict[str, Any]] = []
    for method in methods:
        start = time.perf_counter()
        reason = why_not_linear(scorer.vit) if method == "least-squares" else None
        candidate = plan if reason else stages[method](plan)
        changed = candidate.fingerprint() != plan.fingerprint()
        held_kl = held_loss = None
        accepted, note = False, reason or "nothing to change"
        if changed:
            held_kl, held_loss, note = scorer.loss(candidate, held), scorer.loss(candidate, held, temperature), ""
            accepted = held_kl < best and held_loss < best_loss
            if accepted:
                plan, best, best_loss = candidate, held_kl, held_loss
        seconds = time.perf_counter() - start
        rows.append(
            {"stage": method, "held_kl": held_kl, "held_loss": held_loss, "accepted": accepted,
             "seconds": seconds, "note": note}
        )  # fmt: skip
    return Tuned(plan, before, best, rows)


def tunable(plan: ReductionPlan) -> tuple[int, ...]:
    """Blocks that have lost patches, and whose tokens have fixed grid positions."""
    return tuple(
        number
        for number, row in enumerate(plan.tokens())
        if row.positions is not None and len(row.positions) < plan.model.patches
    )


def shared_bias(
    scorer: Scorer,
    plan: ReductionPlan,
    batches: Sequence[int],
    *,
    shares: Sequence[float] = SHARES,
    temperature: float = 3.0,
) -> ReductionPlan:
    """Raise all patches equally against the prefix tokens, by the share of log(patches / alive) with the lowest loss.

    With share 1 each remaining patch counts as much as patches / alive patches of the dense model. Added to existing
    biases.

    Args:
        batches: Used to measure the loss, softened by `temperature`.
        shares: Candidates; ties go to the first.
    """
    prefix = plan.model.prefix_tokens
    blocks, tokens = tunable(plan), plan.tokens()
    if not prefix or not blocks:  # a bias common to all tokens has no effect
        return plan
    now = biases(plan, blocks)

    def at(share: float) -> ReductionPlan:
        if share == 0:
            return plan
        raised = {}
        for block in blocks:
            row = now[block].copy()
            row[prefix:] += share * math.log(plan.model.patches / (tokens[block].attention - prefix))
            raised[block] = row
        return with_biases(plan, raised)

    return min((at(share) for share in shares), key=lambda one: scorer.loss(one, batches, temperature))


@torch.no_grad()
def least_squares(
    scorer: Scorer,
    plan: ReductionPlan,
    batches: Sequence[int],
    *,
    ridge: float = 0.1,
    bound: float = 10.0,
    class_weight: float = 1.0,
    queries: int | None = 16,
    seed: int = 0,
) -> ReductionPlan:
    """Fit each block's scales such that the remaining tokens after attention match those of the dense model.

    Proceeds block by block, running the reduced model with the scales found so far. The target is the stream after
    attention, residual included (as in Kwon et al.), so a block also compensates errors of earlier ones. Scales are
    relative to the plan's own biases, around which the model is linearised (vp_exporter.searching.mask.least_squares).
    The step is scaled by the one of FRACTIONS with the lowest true error on other queries.

    Args:
        batches: Used for fitting.
        ridge: Regularisation towards no change, relative to the mean squared column.
        bound: Scales are limited to 1/bound..bound, and a block with a solution |s - 1| > bound keeps its biases (Kwon
            et al. stop there, and leave all later blocks).
        class_weight: Total weight of the tokens that the head reads, relative to all others.
        queries: Number of query tokens per batch and block, drawn at random, to sum the equations over in addition to
            those that the head reads; None for all. Each costs N^2 D multiplications per image.
        seed: Seed of their choice.

    Returns:
        The plan with biases, equal on every process.

    Raises:
        SearchError: if attention outputs are normalised or gated (use `adam` alone), or a value is out of range.
    """
    reason = why_not_linear(scorer.vit)
    if reason:
        raise SearchError(
            reason, expected="attention whose output is projected linearly", fix="tune by Adam alone: methods=('adam',)"
        )
    if not (ridge > 0 and bound > 1 and class_weight >= 0 and (queries is None or queries >= 1)):
        raise SearchError(
            f"ridge {ridge}, bound {bound}, class_weight {class_weight}, queries {queries}",
            expected="ridge above 0, bound above 1, class_weight not below 0, queries 1 or more",
        )
    blocks, tokens, prefix = tunable(plan), plan.tokens(), plan.model.prefix_tokens
    if not blocks:
        return plan
    student, dense = _model(scorer, plan), _model(scorer, None)
    start, found = biases(plan, blocks), {}
    mine = [batch for batch in batches if scorer.workers.owns(batch)]
    streams = {batch: embed(student, scorer.calibration.images(batch)) for batch in mine}
    teachers = {batch: embed(dense, scorer.calibration.images(batch)).x for batch in mine}
    for number in range(blocks[-1] + 1):
        block, whole = student.blocks[number], dense.blocks[number]
        assert isinstance(block, ReducedBlock)
        assert isinstance(whole, ReducedBlock)
        for batch in mine:
            teachers[batch] = attended(whole, teachers[batch], None)
        if number in blocks:
            positions = tokens[number].positions
            assert positions is not None
            kept = torch.tensor([*range(prefix), *(prefix + place for place in positions)])
            last = number == plan.model.depth - 1
            weights = row_weights(scorer.description, len(kept), last=last, class_weight=class_weight)
            fit = _Fit(block, kept, weights, queries, (seed, number), streams, teachers)
            bias = fit.run(scorer, batches, torch.from_numpy(start[number]), ridge, bound)
            if bias is not None:
                found[number] = bias.numpy()
                block.key_bias = bias.float().to(_device(scorer))[None]
        for batch in mine if number != blocks[-1] else ():
            streams[batch] = block(streams[batch])
            teachers[batch] = through_mlp(whole, teachers[batch])
    return with_biases(plan, found)


@dataclass(frozen=True)
class _Fit:
    """One block of `least_squares`: its input in the reduced model, and the dense model's stream after attention."""

    block: ReducedBlock
    kept: Tensor
    weights: np.ndarray
    queries: int | None
    seed: tuple[int, ...]
    streams: Mapping[int, Stream]
    teachers: Mapping[int, Tensor]

    def run(self, scorer: Scorer, batches: Sequence[int], start: Tensor, ridge: float, bound: float) -> Tensor | None:
        """Biases float64 [N], on the CPU; None to leave them unchanged."""
        parts = scorer.workers.map(lambda batch: self.equations(batch, start), batches)
        change = solve(torch.stack(parts).sum(dim=0), ridge)
        if change is None or float(change.abs().max()) > bound:
            return None
        trials = [start + (1 + f * change).clamp(1 / bound, bound).log() if f else start for f in FRACTIONS]
        errors = torch.stack(scorer.workers.map(lambda batch: self.errors(batch, trials), batches)).sum(dim=0)
        best = int(errors.argmin())
        return trials[best] if best else None

    def entering(self, batch: int) -> Tensor:
        x = self.streams[batch].x
        return x if self.block.index is None else x.index_select(1, self.block.index)

    def target(self, batch: int) -> Tensor:
        full = self.teachers[batch]
        return full.index_select(1, self.kept.to(full.device))

    def equations(self, batch: int, start: Tensor) -> Tensor:
        x = self.entering(batch)
        rows, weights = (part.to(x.device) for part in sample_rows(self.weights, self.queries, (*self.seed, batch)))
        bias = start.to(x.device, torch.float32)
        if not len(rows):
            return x.new_zeros(x.shape[1], x.shape[1] + 1, dtype=torch.float64)
        return normal_equations(self.block, x, bias, self.target(batch), rows, weights)

    def errors(self, batch: int, trials: Sequence[Tensor]) -> Tensor:
        """float64 [trials], weighted squared error at queries that were not used for fitting."""
        x = self.entering(batch)
        rows, weights = (part.to(x.device) for part in sample_rows(self.weights, self.queries, (*self.seed, batch, 1)))
        wanted = self.target(batch).index_select(1, rows)
        outs = answers(self.block, x, [trial.to(x.device, torch.float32) for trial in trials], rows)
        return torch.stack([((out - wanted).double().square().sum(dim=(0, 2)) * weights).sum() for out in outs])


def adam(
    scorer: Scorer,
    plan: ReductionPlan,
    batches: Sequence[int],
    *,
    steps: int = 32,
    lr: float = 0.03,
    temperature: float = 3.0,
    seed: int = 0,
    decay: float = 1e-3,
    parts: int = 4,
) -> ReductionPlan:
    """Optimise all biases with Adam on the root of the softened KL; the learning rate falls linearly to 0.

    The KL is dominated by a handful of images, its root is not (Scorer.losses).

    Args:
        batches: Used for fitting. A step takes 1/parts of the images from each of `parts` batches: as many images as
            one batch has, shared by up to `parts` processes. The split, and thus the result, does not depend on their
            number.
        lr: Initial learning rate, in nats per step.
        temperature: Of both sides' softmax.
        seed: Seed of the batch order.
        decay: Weight of half the squared distance to the initial biases.

    Returns:
        The plan with biases, equal on every process; they are within LIMIT.

    Raises:
        SearchError: if a value is out of range, or a gradient is not finite.
    """
    if not (steps >= 0 and lr > 0 and temperature > 0 and decay >= 0 and parts >= 1):
        raise SearchError(
            f"steps {steps}, lr {lr}, temperature {temperature}, decay {decay}, parts {parts}",
            expected="steps and decay not below 0, lr and temperature above 0, parts 1 or more",
        )
    blocks = tunable(plan)
    if not blocks or not steps or not batches:
        return plan
    start = biases(plan, blocks)
    cuts = np.cumsum([len(start[block]) for block in blocks])[:-1].tolist()
    origin = torch.from_numpy(np.concatenate([start[block] for block in blocks]))
    now = origin.clone().requires_grad_()
    optimiser = torch.optim.Adam([now], lr=lr)  # on the CPU in float64: the same arithmetic on every process
    model = _model(scorer, plan)
    for block in model.blocks:
        # Plain matrix products: on a GPU, the gradient of fused attention is summed in varying order.
        block.attention_form = "explicit"

    def gradient(batch: int, part: int) -> Tensor:
        """float64 [biases + 1]: gradient summed over the part's images, and their number."""
        images, dense = (
            of[part * len(of) // parts : (part + 1) * len(of) // parts]
            for of in (scorer.calibration.images(batch), scorer.calibration.dense(batch))
        )
        if not len(images):
            return origin.new_zeros(len(origin) + 1)
        leaf = now.detach().to(images.device, torch.float32).requires_grad_()
        for block, row in zip(blocks, leaf.tensor_split(cuts), strict=True):
            model.blocks[block].key_bias = row[None]
        loss = (kl(dense.to(images.device), model(images), temperature) + SMOOTH).sqrt().sum()
        (slope,) = torch.autograd.grad(loss, leaf)
        return torch.cat([slope.cpu().double(), origin.new_tensor([len(images)])])

    with frozen(scorer.vit), torch.enable_grad():
        order = _groups(batches, parts, seed)
        for step in range(steps):
            group, part = next(order)
            total = torch.stack(scorer.workers.map(lambda batch, part=part: gradient(batch, part), group)).sum(dim=0)  # type: ignore[misc]
            if not torch.isfinite(total).all():
                raise SearchError(
                    f"step {step} of tuning has a gradient that is not finite", expected="finite gradients",
                    fix="check the weights; run the search in fp32",
                )  # fmt: skip
            if total[-1] == 0:
                continue
            now.grad = total[:-1] / total[-1] + decay * (now.detach() - origin)
            optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimiser.step()
            with torch.no_grad():
                now.clamp_(-LIMIT, LIMIT)
    return with_biases(plan, dict(zip(blocks, np.split(now.detach().numpy(), cuts), strict=True)))


def _groups(batches: Sequence[int], parts: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless groups of at most `parts` batches and the part of each to take; every image once per epoch."""
    rng = np.random.default_rng(seed)
    while True:
        for part in range(parts):
            order = [batches[i] for i in rng.permutation(len(batches))]
            for first in range(0, len(order), parts):
                yield order[first : first + parts], part


def _device(scorer: Scorer) -> torch.device:
    found: torch.device = scorer.vit.patch_embed.proj.weight.device
    return found


def _model(scorer: Scorer, plan: ReductionPlan | None) -> ReducedViT:
    # Positions in a plan are created on the CPU.
    return ReducedViT(scorer.vit, scorer.description, plan).to(_device(scorer))


def biases(plan: ReductionPlan, blocks: Sequence[int]) -> dict[int, np.ndarray]:
    """float64 [N] of each block; zeros if the plan has none."""
    tokens = plan.tokens()
    return {block: np.array(plan.key_bias.get(block, (0.0,) * tokens[block].attention)) for block in blocks}


def with_biases(plan: ReductionPlan, rows: Mapping[int, np.ndarray]) -> ReductionPlan:
    """Replace the biases of these blocks in the plan; rows of zeros are left out, as they have no effect."""
    merged = {block: row for block, row in plan.key_bias.items() if block not in rows}
    for block, row in rows.items():
        rounded = tuple(round(float(value), DIGITS) + 0.0 for value in row)
        if any(rounded):
            merged[block] = rounded
    return replace(plan, key_bias=dict(sorted(merged.items())))
