"""Encoding of a static mask as lifetimes: the number of blocks in which each patch is kept.

A dropped patch never returns, so a mask [depth, patches] is one number per patch. Exchanging the lifetimes of two
patches preserves the count in every block, and thus the cost; swaps within a block and across blocks are both
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
    """Convert lifetimes int [patches] to a mask bool [depth, patches]; row b: kept in block b."""
    return np.arange(depth)[:, None] < life[None, :]


def life_of(mask: np.ndarray) -> np.ndarray:
    """Convert a mask [depth, patches] (positive is kept) to lifetimes int64 [patches].

    Raises:
        SearchError: if a patch returns after being dropped.
    """
    alive = np.asarray(mask) > 0
    life = alive.sum(axis=0).astype(np.int64)
    if not np.array_equal(mask_of(life, len(alive)), alive):
        raise SearchError("the mask revives a patch", expected="a patch that has left to stay away")
    return life


def counts_of(life: np.ndarray, depth: int) -> tuple[int, ...]:
    """Number of patches in each block."""
    return tuple(int((life > block).sum()) for block in range(depth))


def last_is_free(description: ModelSpec) -> bool:
    """Whether patches can be dropped before the last MLP, because the head does not use them."""
    return description.pool == "token" and description.class_token


def same_until(first: np.ndarray, second: np.ndarray) -> int:
    """First block in which two masks differ; larger than any block if they are equal."""
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
    """Make a plan from lifetimes: static steps, and dropping patches that are not needed after the last attention.

    If the head uses prefix tokens only, dropping the patches before the last MLP does not change the output. The plan
    uses a step that keeps one patch (topk).

    Raises:
        PlanError: if a block would keep no patch.
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
