"""MACs in closed form against torch's counter, which observes the operators that run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.exporter.tiny import DEPTH, KINDS, random_plan, tiny_vit
from vp_exporter.model.loading import describe_by_name
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs, mac_ratio
from vp_exporter.plan.masks import plan_from_mask
from vp_exporter.rewrite.reduced_vit import ReducedViT


def watched_macs(vit: torch.nn.Module, description: ModelSpec, plan: ReductionPlan | None, batch: int = 1) -> int:
    """MACs counted by torch while the model runs."""
    model = ReducedViT(vit, description, plan).for_export("fp32", "explicit")
    images = torch.zeros(batch, description.in_chans, *description.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_counter(kind: str) -> None:
    vit, description = tiny_vit(kind)
    assert count_macs(description).total == watched_macs(vit, description, None)
    for first in (True, False):  # with and without patches that are never embedded
        plan = random_plan(PlanModel.of(description), first=first, scales=True)
        assert count_macs(description, plan).total == watched_macs(vit, description, plan)
        assert count_macs(description, plan).total < count_macs(description).total


def test_a_block_by_hand() -> None:
    """4 n d^2 + 2 n^2 d + 8 n d^2 with d = 64; 17 tokens (class and 4 x 4) and, after a plan, 5."""
    _, description = tiny_vit()
    dense = count_macs(description)
    assert dense.blocks == (12 * 17 * 64**2 + 2 * 17**2 * 64,) * DEPTH
    assert dense.patch_embed == 16 * (3 * 16 * 16) * 64
    assert dense.head == 64 * 7
    assert dense.total == dense.patch_embed + sum(dense.blocks) + dense.head
    mask = np.ones((DEPTH, 16))
    mask[2:, 4:] = 0
    reduced = count_macs(description, plan_from_mask(mask, PlanModel.of(description)))
    assert reduced.blocks == (*dense.blocks[:2], *((12 * 5 * 64**2 + 2 * 5**2 * 64,) * 2))
    assert (reduced.patch_embed, reduced.head) == (dense.patch_embed, dense.head)


def test_patches_that_leave_first_are_not_embedded() -> None:
    _, description = tiny_vit()
    mask = np.ones((DEPTH, 16))
    mask[:, :6] = 0
    assert count_macs(description, plan_from_mask(mask, PlanModel.of(description))).patch_embed == 10 * 768 * 64


def test_deit_small_is_4_6_gmacs() -> None:
    """As stated in the DeiT paper (Touvron et al. 2021, table 5: 4.6 B)."""
    description = describe_by_name("deit_small_patch16_224", {})
    assert count_macs(description).total == pytest.approx(4.6e9, rel=0.01)


def test_ratio() -> None:
    _, description = tiny_vit()
    plan = random_plan(PlanModel.of(description))
    assert mac_ratio(description, ReductionPlan(PlanModel.of(description))) == 1.0
    assert mac_ratio(description, plan) == count_macs(description).total / count_macs(description, plan).total > 1


@pytest.fixture(scope="module", params=["class-token", "map-pool", "registers-swiglu"])
def description(request: pytest.FixtureRequest) -> ModelSpec:
    return tiny_vit(request.param)[1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dropping_more_never_costs_more(description: ModelSpec, data: st.DataObject) -> None:
    model = PlanModel.of(description)
    stays = data.draw(st.integers(0, model.patches - 1))
    leaves = st.lists(st.integers(0, DEPTH), min_size=model.patches, max_size=model.patches)
    later = np.array(data.draw(leaves))
    earlier = np.minimum(later, data.draw(leaves))
    later[stays] = earlier[stays] = DEPTH
    blocks = np.arange(DEPTH)[:, None]
    more, less = (count_macs(description, plan_from_mask(blocks < row, model)) for row in (later, earlier))
    assert less.total <= more.total <= count_macs(description).total
    assert all(a <= b for a, b in zip(less.blocks, more.blocks, strict=True))
    if (earlier < later).any():
        assert less.total < more.total
