"""A static mask as lifetimes: how many blocks each patch is alive in.

A patch that has left never comes back, so a mask [depth, patches] is one number a patch. Exchanging the lifetimes of
two patches keeps the count of every block, and with it the cost: swaps within a block and across blocks are both
exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep, Step
from vp_exporter.reducers.topk import TopKStep


def mask_of(life: np.ndarray, depth: int) -> np.ndarray:
    """Lifetimes int [patches] -> bool [depth, patches], row b: alive in block b."""
    return np.arange(depth)[:, None] < life[None, :]


def life_of(mask: np.ndarray) -> np.ndarray:
    """Mask [depth, patches] (positive is alive) -> lifetimes int64 [patches].

    Raises:
        SearchError: a patch comes back.
    """
    alive = np.asarray(mask) > 0
    life = alive.sum(axis=0).astype(np.int64)
    if not np.array_equal(mask_of(life, len(alive)), alive):
        raise SearchError("the mask revives a patch", expected="a patch that has left to stay away")
    return life


def counts_of(life: np.ndarray, depth: int) -> tuple[int, ...]:
    """Patches alive in each block."""
    return tuple(int((life > block).sum()) for block in range(depth))


def last_is_free(description: ModelSpec) -> bool:
    """Whether nobody reads the patches that leave the last block: they need no MLP there."""
    return description.pool == "token" and description.class_token


def same_until(first: np.ndarray, second: np.ndarray) -> int:
    """The first block in which two masks differ; a number above every block where they are equal."""
    differing = first != second
    return int(np.minimum(first, second)[differing].min()) if differing.any() else int(first.max(initial=0)) + 1


def plan_of(
    life: np.ndarray,
    description: ModelSpec,
    method: str = "vpruner",
    *,
    budget: Any = None,
    provenance: Mapping[str, Any] | None = None,
) -> ReductionPlan:
    """The plan that lifetimes make: static steps, and behind the last attention all patches leave that may.

    Where the head reads prefix tokens only, what leaves the last block is not read: dropping the patches before its MLP
    changes no answer. The plan language has a step for it that keeps one patch (topk).

    Raises:
        PlanError: a block would keep no patch.
    """
    mask, before = mask_of(life, description.depth), np.ones(description.patches, dtype=bool)
    steps: list[Step] = []
    for block, row in enumerate(mask):
        if not np.array_equal(row, before):
            steps.append(StaticStep(block, tuple(np.flatnonzero(row).tolist())))
        before = row
    if last_is_free(description) and before.sum() > 1:
        steps.append(TopKStep(description.depth - 1, tokens_out=description.prefix_tokens + 1))
    return ReductionPlan(
        PlanModel.of(description), tuple(steps), method=method, budget=budget, provenance=dict(provenance or {})
    )
