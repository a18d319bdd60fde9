"""Steps of a plan from a method's name and an amount."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vp_exporter.errors import PlanError
from vp_exporter.methods import METHODS, MethodRequest, build_plan
from vp_exporter.methods.stages import bat_split
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers import REDUCERS


def fields(plan: ReductionPlan, name: str) -> list[Any]:
    return [step.fields()[name] for step in plan.steps]


def blocks(plan: ReductionPlan) -> list[int]:
    return [step.block for step in plan.steps]


def left(plan: ReductionPlan) -> list[int]:
    return [row.mlp for row in plan.tokens()]


def test_every_reducer_can_be_asked_for_by_name() -> None:
    assert set(REDUCERS) - {"static"} <= set(METHODS)
    assert set(METHODS) - set(REDUCERS) == {"random", "grid", "center"}


# r methods


def test_constant_r(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("tome", r=13), deit_s)
    assert fields(plan, "r") == [13] * 12
    assert left(plan)[-1] == 41
    assert plan.method == "tome"
    assert plan.budget == {"r": 13}
    assert plan.proportional_attention


def test_sloped_r(deit_s: ModelSpec) -> None:
    down = build_plan(MethodRequest("tome", r=8, schedule="decreasing"), deit_s)
    up = build_plan(MethodRequest("tome", r=8, schedule="increasing"), deit_s)
    assert fields(down, "r")[0] == 16
    assert blocks(down) == list(range(11))  # the last block gets 0: no step
    assert blocks(up) == list(range(1, 12))
    assert sum(fields(down, "r")) == sum(fields(up, "r")) == 91  # each of 16, 14.5, 13.1 ... is truncated
    assert sorted(fields(down, "r"), reverse=True) == pytest.approx(fields(down, "r"), abs=1)


def test_listed_r(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("tome", r=(0, 6, 8, 10, 12)), deit_s)
    assert blocks(plan) == [1, 2, 3, 4]
    assert fields(plan, "r") == [6, 8, 10, 12]
    plan = build_plan(MethodRequest("tome", r=(6, 8), blocks=(3, 7, 9)), deit_s)
    assert list(zip(blocks(plan), fields(plan, "r"), strict=True)) == [(3, 6), (7, 8)]


def test_r_is_cut_to_half_behind_the_first_block(deit_s: ModelSpec) -> None:
    assert left(build_plan(MethodRequest("tome", r=16), deit_s))[-1] == 11
    assert left(build_plan(MethodRequest("pitome", r=98), deit_s))[:4] == [99, 50, 26, 14]
    assert left(build_plan(MethodRequest("gtp", r=98), deit_s))[:3] == [99, 2, 2]  # gtp may drop all but one
    # A slope that asks for too much at its first block is clipped there too, as in ToMe's code.
    assert left(build_plan(MethodRequest("tome", r=60, schedule="decreasing"), deit_s))[:3] == [99, 50, 26]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("tome", {"r": 99}, r"r of the tome step at block 0 is 99; expected 1 to 98: at most half.*196 patch tokens"),
        ("tome", {"r": 99, "blocks": (4,)}, r"r of the tome step at block 4 is 99; expected 1 to 98"),
        ("pitome", {"r": (90, 60)}, r"r of the pitome step at block 1 is 60; expected 1 to 53"),
        ("gtp", {"r": 196}, r"r of the gtp step at block 0 is 196; expected 1 to 195"),
        ("ppt", {"r": (50, 50, 50), "tau": 0.0}, r"r of the ppt step at block 9 is 50; expected 1 to 48"),
        ("ppt", {"keep_rate": 0.4, "tau": 0.0}, r"r of the ppt step at block 3 is 117; expected 1 to 98"),
        ("tome", {"r": tuple([1] * 13)}, r"`r` lists 13 values; expected at most 12, one for each of the blocks 0, 1"),
        ("tome", {"r": 5, "blocks": (3, 12)}, r"`blocks` names block 12; expected 0 to 11: deit_small.*; block num"),
        ("tome", {"r": (0, 0)}, r"method tome removes no token of deit_small.*; expected at least one step"),
        ("evit", {"args": {"tokens_out": [198, 100, 72]}},
         r"tokens_out of the evit step at block 3 is 198; expected 3 to 197"),
        ("topk", {"args": {"tokens_out": [100, 120, 72]}},
         r"tokens_out of the topk step at block 6 is 120; expected 2 to 100"),
        ("topk", {"args": {"tokens_out": [100, 80]}}, r"tokens_out` holds 2 values; expected 3, one for.* 3, 6, 9"),
        ("topk", {"args": {"tokens_out": "100"}}, r"method argument `tokens_out` is '100'; expected a list of whole"),
        ("topk", {"args": {"tokens_out": [10**400] * 3}}, r"expected a list of whole numbers"),
        ("topk", {"keep_rate": 0.7, "args": {"score": "best"}}, r"score of the topk step at block 3 is 'best'; exp"),
        ("evit", {"keep_rate": 0.7, "args": {"fuse": 1}}, r"fuse of the evit step at block 3 is 1; expected true or"),
        ("bat", {"keep_rate": 0.7, "args": {"pairs": 80}}, r"tokens_out of the bat step at block 3 is 139; expected"),
        ("bat", {"keep_rate": 0.7, "args": {"clusters": [1, 2]}}, r"clusters` holds 2 values; expected 3, one for"),
        ("pitome", {"r": 8, "args": {"matching": "halves"}},
         r"matching of the pitome step at block 0 is 'halves'; expected bipartite or protect"),
        ("pitome", {"r": 8, "args": {"matching": ["protect"]}},
         r"matching of the pitome step at block 0 is \['protect'\]"),
        ("gtp", {"r": 8, "args": {"alpha": -1}}, r"alpha of the gtp step at block 0 is -1; expected a finite number"),
        ("diffrate", {"args": {"prune_to": [190] * 12, "merge_to": [195] * 12}},
         r"merge_to of the diffrate step at block 0 is 195; expected 2 to 190"),
        ("diffrate", {"args": {"prune_to": [190], "merge_to": [190]}}, r"prune_to` holds 1 values; expected 12, one"),
    ],
)  # fmt: skip
def test_refused(method: str, changes: Any, message: str, deit_s: ModelSpec) -> None:
    with pytest.raises(PlanError, match=message):
        build_plan(MethodRequest(method, **changes), deit_s)


def test_pitomes_margin_falls_with_depth(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("pitome", r=8), deit_s)
    assert fields(plan, "margin") == pytest.approx([0.75 * (1 - block / 12) for block in range(12)])
    assert not plan.proportional_attention
    assert set(fields(build_plan(MethodRequest("pitome", r=8, args={"margin": 0.9}), deit_s), "margin")) == {0.9}


def test_pitome_matches_everybody_in_the_first_half_of_the_blocks(deit_s: ModelSpec) -> None:
    def matching(**args: str) -> list[str]:
        return fields(build_plan(MethodRequest("pitome", r=8, args=args), deit_s), "matching")

    first, second = ["bipartite"] * 6, ["protect"] * 6
    assert matching() == matching(matching="bipartite-first") == first + second
    assert matching(matching="protect-first") == second + first
    assert matching(matching="protect") == second * 2
    assert matching(matching="bipartite") == first * 2
    # by block index, not by count of acting blocks
    late = build_plan(MethodRequest("pitome", r=8, blocks=(5, 6)), deit_s)
    assert fields(late, "matching") == ["bipartite", "protect"]


def test_pitomes_keep_rate_is_its_ratio(deit_s: ModelSpec) -> None:
    """floor(n - 0.9125 n) of the n patch tokens leave each block: the authors' --ratio 0.9125."""
    assert fields(build_plan(MethodRequest("pitome", keep_rate=0.9125), deit_s), "r") == [
        17, 15, 14, 13, 11, 11, 10, 9, 8, 7, 7, 6,
    ]  # fmt: skip


def test_gtp(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("gtp", r=8), deit_s)
    assert plan.steps[0].fields() == {
        "r": 8, "alpha": 0.1, "score": "graph", "graph": "mixed", "neighbours": 8, "graph_from": "patches",
        "theta": 1.0,
    }  # fmt: skip
    plan = build_plan(MethodRequest("gtp", r=8, args={"score": "class", "graph_from": "keys", "theta": 0.6}), deit_s)
    ours = plan.steps[0].fields()
    assert (ours["score"], ours["graph_from"], ours["theta"]) == ("class", "keys", 0.6)
    assert left(plan)[-1] == 197 - 96


def test_tomes_tokens_are_left_by_similarity_without_a_class_token(
    deit_s: ModelSpec, without_class_token: ModelSpec
) -> None:
    assert build_plan(MethodRequest("tome", r=2), deit_s).steps[0].fields() == {"r": 2}
    plan = build_plan(MethodRequest("tome", r=2), without_class_token)
    assert plan.steps[0].fields() == {"r": 2, "order": "similarity"}
    ours = build_plan(MethodRequest("tome", r=2, args={"order": "position"}), without_class_token)
    assert ours.steps[0].fields() == {"r": 2}


# stages


def test_evit_counts_the_fused_token(deit_s: ModelSpec) -> None:
    fused = build_plan(MethodRequest("evit", keep_rate=0.7), deit_s)
    plain = build_plan(MethodRequest("evit", keep_rate=0.7, args={"fuse": False}), deit_s)
    # n = 196: 138 + 1; 139: ceil(97.3) + 1; 99: ceil(69.3) + 1; and the class token
    assert fields(fused, "tokens_out") == [140, 100, 72]
    assert fields(plain, "tokens_out") == [139, 98, 69]
    assert blocks(fused) == blocks(plain) == [3, 6, 9]
    assert not fused.proportional_attention


def test_topk(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("topk", keep_rate=0.5, blocks=(2, 8), args={"score": "ats"}), deit_s)
    assert [(step.block, step.fields()) for step in plan.steps] == [
        (2, {"tokens_out": 99, "score": "ats"}),
        (8, {"tokens_out": 50, "score": "ats"}),
    ]


def test_stages_scale_with_depth(vit_l: ModelSpec, tiny: ModelSpec) -> None:
    assert blocks(build_plan(MethodRequest("topk", keep_rate=0.7), vit_l)) == [6, 12, 18]
    assert blocks(build_plan(MethodRequest("topk", keep_rate=0.7), tiny)) == [1, 2, 3]


def test_a_stage_that_keeps_everything_has_no_step(tiny: ModelSpec) -> None:
    """16 patches at 0.9: ceil(14.4), ceil(13.5), ceil(12.6); at 0.95: 16 again."""
    assert fields(build_plan(MethodRequest("topk", keep_rate=0.9), tiny), "tokens_out") == [16, 15, 14]
    with pytest.raises(PlanError, match="removes no token"):
        build_plan(MethodRequest("evit", keep_rate=0.95), tiny)


def test_listed_tokens(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("bat", args={"tokens_out": [103, 103, 28]}), deit_s)
    assert blocks(plan) == [3, 9]  # nothing leaves at 6
    assert fields(plan, "tokens_out") == [103, 28]


def test_bat_counts_everything_that_survives(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("bat", keep_rate=0.7, blocks=(3, 6, 9)), deit_s)
    assert fields(plan, "tokens_out") == [139, 98, 69]
    # m = 138: 0.15 m = 20.7 clusters; 117 attentive leave, of 127 with 10 pairs (8% of 127 is 10.2)
    assert plan.steps[0].fields() == {"tokens_out": 139, "clusters": 21, "pairs": 10, "weights": "attention"}


def test_bats_split_can_be_said(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("bat", keep_rate=0.7, args={"clusters": [30, 20, 10], "pairs": 2}), deit_s)
    assert fields(plan, "clusters") == [30, 20, 10]
    assert fields(plan, "pairs") == [2, 2, 2]


@settings(deadline=None)
@given(st.integers(2, 800), st.data())
def test_bats_split_always_fits(n: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, n - 1))
    clusters, pairs = bat_split(n, m)
    attentive = m - clusters + pairs
    assert attentive >= 0
    assert 0 <= pairs <= attentive // 2 or pairs == 0
    assert 1 <= clusters <= n - attentive


@settings(deadline=None, max_examples=60)
@given(method=st.sampled_from(["evit", "topk", "bat", "ppt"]), rate=st.floats(0.5, 0.98))
def test_any_keep_rate_makes_a_plan(deit_s: ModelSpec, method: str, rate: float) -> None:
    tau = {"tau": 7e-5} if method == "ppt" else {}
    plan = build_plan(MethodRequest(method, keep_rate=rate, **tau), deit_s)  # type: ignore[arg-type]
    tokens = left(plan)
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[2] == 197 > tokens[-1]


def test_ppt(deit_s: ModelSpec) -> None:
    plan = build_plan(MethodRequest("ppt", r=50, tau=7e-5), deit_s)
    assert [step.fields() for step in plan.steps] == [
        {"r": r, "tau": 7e-5, "order": "score"} for r in (50, 50, 48)
    ]  # half of 96
    assert blocks(plan) == [3, 6, 9]
    assert plan.proportional_attention
    assert left(build_plan(MethodRequest("ppt", keep_rate=0.7, tau=0.0), deit_s))[-1] == 69
    ours = build_plan(MethodRequest("ppt", r=50, tau=7e-5, args={"order": "position"}), deit_s)
    assert set(fields(ours, "order")) == {"position"}


def test_diffrate_lists(deit_s: ModelSpec) -> None:
    lists = {"prune_to": [197, 150, 120], "merge_to": [197, 140, 100]}
    plan = build_plan(MethodRequest("diffrate", blocks=(1, 4, 8), args=lists), deit_s)
    assert [(s.block, *s.fields().values()) for s in plan.steps] == [(4, 150, 140, "equal"), (8, 120, 100, "equal")]
    for request in (
        MethodRequest("diffrate", blocks=(1, 4, 8), args={**lists, "weights": "similarity"}),
        MethodRequest("diffrate", target_macs=0.65, args={"weights": "similarity"}),
    ):
        assert set(fields(build_plan(request, deit_s), "weights")) == {"similarity"}


# whatever the method


def test_proportional_attention_can_be_said(deit_s: ModelSpec) -> None:
    assert not build_plan(MethodRequest("tome", r=8, proportional_attention=False), deit_s).proportional_attention
    plan = build_plan(MethodRequest("evit", keep_rate=0.7, proportional_attention=True), deit_s)
    assert plan.proportional_attention
    assert plan.budget == {"keep_rate": 0.7, "proportional_attention": True}


@pytest.mark.parametrize("method", ["evit", "topk", "bat", "ppt", "diffrate"])
def test_a_model_without_class_token_is_refused(method: str, without_class_token: ModelSpec) -> None:
    tau = {"tau": 7e-5} if method == "ppt" else {}
    with pytest.raises(PlanError, match=rf"the {method} step at block \d .*vit_medium\w* has no class token; expected"):
        build_plan(MethodRequest(method, target_macs=0.7, **tau), without_class_token)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["tome", "pitome", "gtp", "random", "grid", "center"])
def test_a_model_without_class_token_will_do(method: str, without_class_token: ModelSpec) -> None:
    assert build_plan(MethodRequest(method, target_macs=0.7), without_class_token).reduces
    with pytest.raises(PlanError, match=r"the gtp step at block 0 .* has no class token"):
        build_plan(MethodRequest("gtp", r=2, args={"score": "class"}), without_class_token)
