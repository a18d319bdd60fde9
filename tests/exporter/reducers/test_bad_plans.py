"""Invalid plans: one-line errors that name the reducer, the block and the limit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.exporter.reducers.cases import (
    NEED_NONE,
    VARIANTS,
    WITHOUT_CLASS_TOKEN,
    make_plan,
    middle,
    model_of,
    own_files,
)
from tests.pairwise import thinned
from vp_exporter.errors import PlanError
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import REDUCERS
from vp_exporter.rewrite.reduced_vit import ReducedViT

# 4 blocks; a class token and 16 patches enter the first.
MODEL = PlanModel("vit_tiny_patch16_224", (64, 64), (16, 16), prefix_tokens=1, depth=4, patches=16)
ENTER = r"\(1 prefix and {} patch tokens enter it\); reduce less here, or earlier blocks less$"
ALL = ENTER.format(16)


def step(block: int, reducer: str, **fields: Any) -> dict[str, Any]:
    return {"block": block, "reducer": reducer, **fields}


def bat(tokens_out: int, clusters: int, pairs: int, **more: Any) -> dict[str, Any]:
    return step(2, "bat", tokens_out=tokens_out, clusters=clusters, pairs=pairs, **more)


TOME = step(1, "tome", r=6)  # leaves 10 patch tokens
ONE_STAYS = "at least 1 patch token stays"

BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    # more tokens than there are, or none left
    "tome-beyond-half": ([step(2, "tome", r=9)],
        rf"^r of the tome step at block 2 is 9; expected 1 to 8: at most half of the patch tokens can merge {ALL}"),
    "tome-beyond-half-of-what-is-left": ([TOME, step(3, "tome", r=6)],
        rf"^r of the tome step at block 3 is 6; expected 1 to 5: .* {ENTER.format(10)}"),
    "ppt-beyond-half": ([step(0, "ppt", r=9, tau=0)], rf"^r of the ppt step at block 0 is 9; expected 1 to 8: .*{ALL}"),
    "pitome-beyond-half": ([TOME, step(3, "pitome", r=6, margin=0.5)],
        rf"^r of the pitome step at block 3 is 6; expected 1 to 5: r tokens merge into r others {ENTER.format(10)}"),
    "gtp-drops-all": ([step(2, "gtp", r=16, alpha=0.1)],
        rf"^r of the gtp step at block 2 is 16; expected 1 to 15: {ONE_STAYS} {ALL}"),
    "evit-too-many": ([TOME, step(2, "evit", tokens_out=12, fuse=True)],
        rf"^tokens_out of the evit step at block 2 is 12; expected 3 to 11: {ONE_STAYS} and the fused one replaces 1 "
        rf"or more {ENTER.format(10)}"),
    "evit-too-few": ([step(2, "evit", tokens_out=1, fuse=False)],
        rf"^tokens_out of the evit step at block 2 is 1; expected 2 to 17: {ONE_STAYS} {ALL}"),
    "evit-too-few-to-fuse": ([step(2, "evit", tokens_out=2, fuse=True)],
        r"^tokens_out of the evit step at block 2 is 2; expected 3 to 17: "),
    "topk-too-many": ([TOME, step(2, "topk", tokens_out=12)],
        rf"^tokens_out of the topk step at block 2 is 12; expected 2 to 11: {ONE_STAYS} {ENTER.format(10)}"),
    "nothing-left-to-merge": ([step(0, "topk", tokens_out=2), step(1, "tome", r=1)],
        rf"^r of the tome step at block 1 is 1; expected more tokens: at most half .* {ENTER.format(1)}"),
    # diffrate: P < merge_to <= prune_to <= N
    "prune-to-too-many": ([step(2, "diffrate", prune_to=18, merge_to=9)],
        rf"^prune_to of the diffrate step at block 2 is 18; expected 2 to 17: {ONE_STAYS} {ALL}"),
    "merge-to-above-prune-to": ([step(2, "diffrate", prune_to=9, merge_to=10)],
        rf"^merge_to of the diffrate step at block 2 is 10; expected 2 to 9: {ONE_STAYS}, and prune_to is 9 {ALL}"),
    "merge-to-of-the-prefix": ([step(2, "diffrate", prune_to=9, merge_to=1)],
        r"^merge_to of the diffrate step at block 2 is 1; expected 2 to 9: "),
    # bat: n_a = tokens_out - P - clusters + pairs attentive tokens
    "bat-too-many": ([bat(17, 1, 1)], r"^tokens_out of the bat step at block 2 is 17; expected 2 to 16: 1 patch token "
        rf"or more, after 1 pairs {ALL}"),
    "bat-only-prefix": ([bat(1, 0, 0)], r"^tokens_out of the bat step at block 2 is 1; expected 2 to 17: "),
    "bat-pairs-beyond-half": ([bat(6, 4, 2)],
        rf"^pairs of the bat step at block 2 is 2; expected 0 to 1: 3 attentive tokens are matched {ALL}"),
    "bat-no-place-for-the-rest": ([bat(9, 0, 2)],
        rf"^clusters of the bat step at block 2 is 0; expected 1 to 6: 6 inattentive tokens are clustered {ALL}"),
    "bat-more-clusters-than-leave": ([bat(3, 5, 0)],
        rf"^clusters of the bat step at block 2 is 5; expected 0 to 2: tokens_out leaves room for 2 patch .*{ALL}"),
    # fields that are missing, unknown, or of the wrong type
    "tau-missing": ([step(2, "ppt", r=2)],
        r"^the ppt step at block 2 lacks tau; expected only the fields order, r, tau$"),
    "margin-missing": ([step(2, "pitome", r=2)],
        r"^the pitome step at block 2 lacks margin; expected only the fields margin, matching, r$"),
    "alpha-missing": ([step(2, "gtp", r=2)],
        r"^the gtp step at block 2 lacks alpha; expected only the fields alpha, graph, graph_from, neighbours, r, sc"),
    "fuse-missing": ([step(2, "evit", tokens_out=9)], r"^the evit step at block 2 lacks fuse; expected exactly"),
    "two-missing": ([step(2, "bat", clusters=1)], r"^the bat step at block 2 lacks pairs, tokens_out; expected only"),
    "unknown-field": ([step(2, "tome", r=2, tau=0.1)],
        r"^the tome step at block 2 has the unknown field tau; expected only the fields order, r$"),
    "r-is-zero": ([step(2, "tome", r=0)], r"^r of the tome step at block 2 is 0; expected a whole number, at least 1$"),
    "r-is-a-fraction": ([step(2, "tome", r=1.5)], r"^r of the tome step at block 2 is 1.5; expected a whole number"),
    "r-is-true": ([step(2, "ppt", r=True, tau=0)], r"^r of the ppt step at block 2 is True; expected a whole number"),
    "tokens-out-is-text": ([step(2, "topk", tokens_out="9")], r"^tokens_out of the topk step at block 2 is '9'; exp"),
    "tau-is-negative": ([step(2, "ppt", r=2, tau=-1)],
        r"^tau of the ppt step at block 2 is -1; expected a finite number, at least 0$"),
    "tau-is-infinite": ([step(2, "ppt", r=2, tau=float("inf"))], r"^tau of the ppt step at block 2 is inf; expected"),
    "margin-is-nan": ([step(2, "pitome", r=2, margin=float("nan"))], r"^margin of the pitome step at block 2 is nan"),
    "margin-is-huge": ([step(2, "pitome", r=2, margin=10**400)], r"^margin of the pitome step at block 2 is 10+; exp"),
    "alpha-is-text": ([step(2, "gtp", r=2, alpha="1")], r"^alpha of the gtp step at block 2 is '1'; expected a finite"),
    "theta-is-zero": ([step(2, "gtp", r=2, alpha=0.1, theta=0)],
        r"^theta of the gtp step at block 2 is 0; expected a share above 0, at most 1$"),
    "theta-is-two": ([step(2, "gtp", r=2, alpha=0.1, theta=2)], r"^theta of the gtp step at block 2 is 2; expected a"),
    "graph-from-unknown": ([step(2, "gtp", r=2, alpha=0.1, graph_from="values")],
        r"^graph_from of the gtp step at block 2 is 'values'; expected patches or keys$"),
    "neighbours-is-zero": ([step(2, "gtp", r=2, alpha=0.1, neighbours=0)],
        r"^neighbours of the gtp step at block 2 is 0; expected a whole number, at least 1$"),
    "fuse-is-1": ([step(2, "evit", tokens_out=9, fuse=1)],
        r"^fuse of the evit step at block 2 is 1; expected true or false$"),
    "score-unknown": ([step(2, "topk", tokens_out=9, score="values")],
        r"^score of the topk step at block 2 is 'values'; expected class or ats$"),
    "score-is-a-list": ([step(2, "topk", tokens_out=9, score=["ats"])], r"^score of the topk step at block 2 is \['at"),
    "matching-unknown": ([step(2, "pitome", r=2, margin=0.5, matching="halves")],
        r"^matching of the pitome step at block 2 is 'halves'; expected bipartite or protect$"),
    "order-unknown": ([step(2, "ppt", r=2, tau=0, order=1)],
        r"^order of the ppt step at block 2 is 1; expected score or"),
    "diffrate-weights-unknown": ([step(2, "diffrate", prune_to=9, merge_to=8, weights="size")],
        r"^weights of the diffrate step at block 2 is 'size'; expected equal or similarity$"),
    "graph-unknown": ([step(2, "gtp", r=2, alpha=0.1, graph="temporal")],
        r"^graph of the gtp step at block 2 is 'temporal'; expected mixed or spatial or semantic$"),
    "weights-unknown": ([bat(9, 2, 2, weights="none")],
        r"^weights of the bat step at block 2 is 'none'; expected attention or size$"),
    "unknown-reducer": ([step(2, "atc", r=2)], r"^the step at block 2 has the reducer 'atc'; expected one of static"),
    "unhashable-reducer": ([step(2, ["tome"], r=2)], r"^the step at block 2 has the reducer \['tome'\]; expected"),
    # conflicting steps
    "two-at-one-block": ([step(2, "tome", r=2), step(2, "evit", tokens_out=8, fuse=True)],
        r"^block 2 has two steps in the same place; expected one; join them$"),
    "static-after-a-choice": ([TOME, step(2, "static", keep=[0, 1])],
        r"^the static step at block 2 comes after a reducer that chooses by image; expected static steps before"),
    "out-of-order": ([step(3, "tome", r=2), step(2, "tome", r=2)],
        r"^the tome step at block 2 follows a step at block 3; expected steps ordered by block$"),
    "outside": ([step(4, "tome", r=2)],
        r"^the tome step at block 4 is outside the model; expected a block from 0 to 3; block numbers are 0-based$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    steps, message = BAD[case]
    data = {**ReductionPlan(MODEL).to_dict(), "steps": steps}
    with pytest.raises(PlanError, match=message) as caught:
        ReductionPlan.from_dict(data)
    assert "\n" not in str(caught.value)


def test_every_reducer_is_in_the_table() -> None:
    named = {entry["reducer"] for steps, _ in BAD.values() for entry in steps if isinstance(entry["reducer"], str)}
    assert set(REDUCERS) - own_files() <= named


@pytest.mark.parametrize(
    ("variant", "kind"),
    thinned(
        itertools.product([v for v in VARIANTS if v not in NEED_NONE], WITHOUT_CLASS_TOKEN),
        lambda variant, kind: {variant, (VARIANTS[variant][0], kind)},
    ),
)
def test_class_token_missing(kind: str, variant: str) -> None:
    """The plan is valid by itself; it is rejected for this model."""
    vit, description = model_of(kind)
    plan = make_plan(description, {2: variant}, middle)
    reducer = VARIANTS[variant][0]
    message = (
        rf"^the {reducer} step at block 2 scores patches by the class token's attention, and {description.name} has no "
        r"class token; expected a model with a class token; use a reducer that needs none: tome, pitome, gtp with score"
    )
    with pytest.raises(PlanError, match=message):
        plan.check_model(description)
    with pytest.raises(PlanError, match=message):
        ReducedViT(vit, description, plan)
