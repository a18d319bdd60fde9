"""The model oracle against timm: dense, under static masks, and with merges of equal tokens (which change nothing)."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.exporter.reducers.oracle_model import run
from tests.exporter.rewrite.test_reduced_vit import images_for, masked_dense
from tests.exporter.tiny import KINDS, random_mask, tiny_vit
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.masks import plan_from_mask
from vp_exporter.reducers import step_from_dict


def assert_agree(mine: tuple, theirs: tuple) -> None:
    """Tokens of every block and the output; `theirs` has a batch of one."""
    for block, (a, b) in enumerate(zip(mine[0], theirs[0], strict=True)):
        torch.testing.assert_close(
            a.float(), b[0].float(), atol=1e-5, rtol=1e-5, msg=lambda m, b=block: f"block {b}: {m}"
        )
    torch.testing.assert_close(mine[1].float(), theirs[1][0].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_steps_it_is_timm(kind: str) -> None:
    vit, description = tiny_vit(kind)
    images = images_for(description, batch=1)
    plan = ReductionPlan(PlanModel.of(description))
    with torch.no_grad():
        theirs = vit(images)
    mine = run(vit, description, plan, images[0])[1].float()
    torch.testing.assert_close(mine, theirs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_static_masks(kind: str) -> None:
    vit, description = tiny_vit(kind)
    model = PlanModel.of(description)
    mask = random_mask(model, scales=True)
    images = images_for(description, batch=1)
    margins: list[float] = []
    assert_agree(
        run(vit, description, plan_from_mask(mask, model), images[0], margins), masked_dense(vit, mask, images)
    )
    assert margins == []  # a static plan makes no decisions


@pytest.mark.parametrize("kind", ["class-token", "average-pool", "average-pool-fc-norm-class-token", "map-pool", "eva"])
def test_merging_equal_tokens_under_proportional_attention_changes_nothing(kind: str) -> None:
    """Two equal tokens and one of size 2 are equivalent in every later softmax and average: an exact property of ToMe.

    Patches 2i and 2i + 1 are equal, and so are their positions, which makes the tokens equal except for their parity.
    """
    vit, description = tiny_vit(kind)
    vit = copy.deepcopy(vit)
    side = description.patch_size[0]
    image = images_for(description, batch=1)[0]
    with torch.no_grad():
        cells = image.reshape(3, description.grid[0], side, description.grid[1], side)
        cells[:, :, :, 1::2] = cells[:, :, :, 0::2]
        vit.pos_embed.zero_()
    # Not every pair: without prefix tokens, sizes that are all 2 would cancel in the softmax.
    merged, dense = description.patches // 4, ReductionPlan(PlanModel.of(description))
    plan = ReductionPlan(
        PlanModel.of(description),
        (step_from_dict({"block": 1, "reducer": "tome", "r": merged}),),
        proportional_attention=True,
    )
    expected, logits = run(vit, description, dense, image)
    margins: list[float] = []
    tokens, mine = run(vit, description, plan, image, margins)
    assert [len(row) for row in tokens] == [len(expected[0]), *[len(expected[0]) - merged] * 3]
    torch.testing.assert_close(mine, logits, atol=1e-9, rtol=1e-9)
    assert margins
    # Without log sizes the same merge is not exact: the check above is able to fail.
    plain = ReductionPlan(plan.model, plan.steps)
    assert (run(vit, description, plain, image)[1] - logits).abs().max() > 1e-6
