"""Shared by the tests of vp::density_merge: plans, inputs, and whether an image's decisions are robust to noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.support import seeded
from vp_kernels.density_merge import reference


@dataclass(frozen=True)
class Plan:
    """Arguments of the operator for N tokens."""

    tokens: int
    prefix: int
    tokens_out: int
    clusters: int
    pairs: int
    weights: str = "attention"

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.tokens_out, self.clusters, self.pairs, self.prefix

    @property
    def arguments(self) -> tuple[int, int, int, int, str]:
        return *self.counts, self.weights

    def __str__(self) -> str:
        return f"N{self.tokens}P{self.prefix}-{self.tokens_out}out-{self.clusters}K-{self.pairs}p-{self.weights}"


def usual(tokens: int, prefix: int, keep: float = 0.6, weights: str = "attention") -> Plan:
    """Split of `keep` of the patch tokens as in a schedule: 15 % clusters, 8 % of the attentive in pairs."""
    m = max(1, round(keep * (tokens - prefix)))
    clusters = max(1, round(0.15 * m)) if m < tokens - prefix else 0
    pairs = min(round(0.09 * (m - clusters)), tokens - prefix - m)
    return Plan(tokens, prefix, prefix + m, clusters, pairs, weights)


def inputs(plan: Plan, batch: int, width: int, dtype: torch.dtype, sizes: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x with a common mean, scores like a softmax, sizes 1 .. 3."""
    x = seeded(batch, plan.tokens, width) + 2.0 * seeded(width, seed=1)
    scores = seeded(batch, plan.tokens, seed=2).softmax(dim=1)
    size = seeded(batch, plan.tokens, seed=3).abs().floor() + 1.0 if sizes else None
    return x.to(dtype), scores, size


def decided(x: Tensor, scores: Tensor, plan: Plan) -> list[int]:
    """Images whose decisions do not change if every value is off by about 1e-5."""
    found = []
    for image in range(x.shape[0]):
        rows, c = x[image].double(), scores[image].double()
        made = reference.groups(rows, c, *plan.counts)
        moved = [rows * (1.0 + 1e-5 * seeded(*rows.shape, dtype=torch.float64, seed=s)) for s in (7, 8)]
        if all(reference.groups(each, c, *plan.counts) == made for each in moved):
            found.append(image)
    return found
