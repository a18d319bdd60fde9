"""Presets against the figures in their papers."""

from __future__ import annotations

import re

import pytest

from vp_exporter.errors import PlanError
from vp_exporter.methods import METHODS, PRESETS, MethodRequest, Preset, build_plan
from vp_exporter.model.loading import describe_by_name
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import ReductionPlan
from vp_exporter.plan.macs import count_macs

# preset, backbone, {block: tokens that leave it, class token included}, 10^9 MACs: copied from the sources a second
# time, to catch errors in the table. PPT: README, and the re-measurement in its fork. ToMe: README and issue 11. EViT:
# README (two digits) and PPT's table 1. BAT: logs (tokens solved from the MACs). DiffRate: README and rates.
TABLE = [
    ("ppt-deit-s", "deit_small_patch16_224", {2: 197, 3: 147, 6: 97, 9: 49, 11: 49}, 2.944),
    ("ppt-deit-s", "deit_base_patch16_224", {9: 49}, 11.26),
    ("ppt-deit-s", "deit_tiny_patch16_224", {9: 49}, 0.80),
    ("tome-r13", "deit_small_patch16_224", {0: 184, 1: 171, 11: 41}, 2.70),
    ("evit-0.7", "deit_small_patch16_224", {3: 140, 6: 100, 9: 72}, 3.0),
    ("evit-0.7", "deit_base_patch16_224", {3: 140, 6: 100, 9: 72}, 11.6),
    ("bat-0.7", "deit_small_patch16_224", {3: 139, 6: 98, 9: 69}, 3.0048),
    ("bat-0.6", "deit_small_patch16_224", {3: 117, 6: 70, 9: 42}, 2.5832),
    ("bat-0.5", "deit_small_patch16_224", {3: 103, 6: 54, 9: 28}, 2.3444),
    ("bat-0.4", "deit_small_patch16_224", {3: 84, 6: 36, 9: 16}, 2.0830),
    ("bat-0.3", "deit_small_patch16_224", {3: 62, 6: 20, 9: 7}, 1.8233),
    ("bat-0.2", "deit_small_patch16_224", {3: 43, 6: 10, 9: 3}, 1.6451),
    ("diffrate-deit-s-2.9g", "deit_small_patch16_224",
     dict(enumerate([197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3])), 2.905),
]  # fmt: skip


def made(name: str, model: ModelSpec, **changes: object) -> ReductionPlan:
    return build_plan(MethodRequest(PRESETS[name].method, preset=name, **changes), model)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "backbone", "tokens", "gmacs"), TABLE)
def test_tokens_are_published_ones_and_macs_within_a_percent(
    name: str, backbone: str, tokens: dict[int, int], gmacs: float
) -> None:
    model = describe_by_name(backbone, {})
    plan = made(name, model)
    rows = plan.tokens()
    assert {block: rows[block].mlp for block in tokens} == tokens
    assert count_macs(model, plan).total / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert plan.provenance == {"preset": name, "source": PRESETS[name].paper}
    assert plan.budget == {"preset": name}
    assert ReductionPlan.loads(plan.dumps()) == plan


def test_the_table_of_the_code_is_the_one_held() -> None:
    held = {(name, backbone, gmacs) for name, backbone, _, gmacs in TABLE}
    assert held == {(p.name, row.model, row.gmacs) for p in PRESETS.values() for row in p.published}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_table_is_sound(preset: Preset, deit_s: ModelSpec) -> None:
    rows = made(preset.name, deit_s).tokens()
    assert {block: rows[block].mlp for block in preset.tokens} == dict(preset.tokens)
    assert preset.method in METHODS
    assert re.search(r"\d{4}", preset.paper)
    assert all(row.source for row in preset.published)


def test_ppts_macs_tell_49_from_47() -> None:
    """Three times 50 of 196 would leave 47 tokens including the class token.

    The MACs of the fork's r sweep (2.45 at r = 80) only fit if each block removes at most half, as matching must;
    otherwise they would be 2.20.
    """
    model = describe_by_name("deit_small_patch16_224", {})
    plan = build_plan(MethodRequest("ppt", r=80, tau=7e-5), model)
    assert [plan.tokens()[block].mlp for block in (3, 6, 9)] == [117, 59, 30]
    assert count_macs(model, plan).total / 1e9 == pytest.approx(2.45, abs=0.01)


def test_diffrate_preset_has_the_published_rates(deit_s: ModelSpec) -> None:
    steps = made("diffrate-deit-s-2.9g", deit_s).steps
    assert [step.block for step in steps] == list(range(1, 12))  # block 0 removes nothing
    assert steps[0].fields() == {"prune_to": 196, "merge_to": 194, "weights": "equal"}
    assert steps[-1].fields() == {"prune_to": 3, "merge_to": 3, "weights": "equal"}


def test_ppt_preset_has_its_tau_and_lets_it_be_changed(deit_s: ModelSpec) -> None:
    assert {step.fields()["tau"] for step in made("ppt-deit-s", deit_s).steps} == {7e-5}
    plan = made("ppt-deit-s", deit_s, tau=6e-5)
    assert {step.fields()["tau"] for step in plan.steps} == {6e-5}
    assert plan.budget == {"preset": "ppt-deit-s", "tau": 6e-5}


@pytest.mark.parametrize("name", ["bat-0.5", "diffrate-deit-s-2.9g", "tome-r13", "evit-0.7", "ppt-deit-s"])
def test_a_distillation_token_comes_on_top(name: str, deit_s: ModelSpec, distilled: ModelSpec) -> None:
    plain, more = (made(name, model).tokens() for model in (deit_s, distilled))
    assert [row.mlp + 1 for row in plain] == [row.mlp for row in more]


def test_another_depth_or_size_is_refused(vit_l: ModelSpec) -> None:
    with pytest.raises(PlanError, match=r"preset tome-r13 is given for vit_large_patch16_384 with 24 blocks and 576 "
                       r"patches; expected 12 blocks and 196 patches.*; say how much goes"):  # fmt: skip
        made("tome-r13", vit_l)
