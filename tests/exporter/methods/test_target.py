"""MAC targets: reached within half a percent if integers allow it, else rejected with the reachable range."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairwise import pairwise
from vp_exporter.errors import PlanError
from vp_exporter.methods import METHODS, MethodRequest, build_plan
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.macs import count_macs

SHAPES = ("constant", "decreasing", "increasing", None)


def target(method: str, share: float, model: ModelSpec, **changes: Any) -> ReductionPlan:
    tau = {"tau": 7e-5} if method == "ppt" else {}
    return build_plan(MethodRequest(method, target_macs=share, **tau, **changes), model)


def share_of(plan: ReductionPlan, model: ModelSpec) -> float:
    return count_macs(model, plan).total / count_macs(model).total


@pytest.mark.parametrize(
    ("share", "method", "shape"),
    pairwise(
        [0.5, 0.65, 0.8, 0.97],
        METHODS,
        SHAPES,
        allowed=lambda share, method, shape: ("schedule" in METHODS[method].options) == (shape is not None),
    ),
)
def test_hits_the_target(method: str, shape: str | None, share: float, deit_s: ModelSpec) -> None:
    plan = target(method, share, deit_s, schedule=shape)
    found = share_of(plan, deit_s)
    assert found == pytest.approx(share, abs=0.005)
    assert plan.provenance["solved"]["macs_share"] == pytest.approx(found, abs=1e-6)
    assert plan.budget["target_macs"] == share
    assert ReductionPlan.loads(plan.dumps()) == plan


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.05, 0.99), method=st.sampled_from(["tome", "gtp", "evit", "bat", "diffrate", "grid"]),
       first=st.integers(0, 20))  # fmt: skip
def test_any_target_on_a_larger_model(vit_l: ModelSpec, share: float, method: str, first: int) -> None:
    """At other depths, patch counts and blocks: close to the target, or an error with the reachable range."""
    changes = {} if method == "grid" else {"blocks": tuple(range(first, 24, 2))}
    error = None
    try:
        found = share_of(target(method, share, vit_l, **changes), vit_l)
    except PlanError as raised:
        error = raised
    if error is None:
        assert found == pytest.approx(share, abs=0.005)
    else:
        assert "`target_macs=" in error.found
        low, high = (float(word) for word in error.expected.replace(" to ", " ").split()[:2])
        assert share < low or share > high
        assert "block" in error.expected


@pytest.mark.parametrize("share", [0.3, 0.5, 0.65, 0.9, 0.98])
def test_static_finds_the_nearest_count(share: float, deit_s: ModelSpec) -> None:
    """One token is half a percent here: compare with every possible count."""
    model = PlanModel.of(deit_s)
    step = type(build_plan(MethodRequest("grid", keep_rate=0.5), deit_s).steps[0])
    every = [ReductionPlan(model, (step(0, tuple(range(m))),)) for m in range(1, 196)]  # type: ignore[call-arg]
    nearest = min(abs(share_of(plan, deit_s) - share) for plan in every)
    assert abs(share_of(target("grid", share, deit_s), deit_s) - share) == pytest.approx(nearest)


def test_constant_r_may_be_a_fraction(deit_s: ModelSpec) -> None:
    """Between r = 10 and 11: blocks use either, and the result is closer than both."""
    plan = target("tome", 0.65, deit_s)
    counts = [step.fields()["r"] for step in plan.steps]
    assert set(counts) == {10, 11}
    for r in (10, 11):
        whole = build_plan(MethodRequest("tome", r=r), deit_s)
        assert abs(share_of(plan, deit_s) - 0.65) < abs(share_of(whole, deit_s) - 0.65)


def test_decreasing_keeps_its_shape(deit_s: ModelSpec) -> None:
    counts = [step.fields()["r"] for step in target("tome", 0.65, deit_s, schedule="decreasing").steps]
    assert counts[0] > counts[5] > counts[-1]
    assert sum(counts[:6]) > 2 * sum(counts[6:])


def test_only_the_named_blocks_act(deit_s: ModelSpec) -> None:
    for method in ("tome", "bat", "diffrate", "ppt"):
        plan = target(method, 0.8, deit_s, blocks=(2, 5, 8))
        assert [step.block for step in plan.steps] == [2, 5, 8]


def test_diffrate_at_the_published_macs_is_the_published_curve(deit_s: ModelSpec) -> None:
    preset = build_plan(MethodRequest("diffrate", preset="diffrate-deit-s-2.9g"), deit_s)
    plan = target("diffrate", share_of(preset, deit_s), deit_s)
    assert plan.steps == preset.steps
    assert plan.provenance["solved"]["power"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("method", "share", "changes", "message"),
    [
        ("ppt", 0.3, {}, r"`target_macs=0.3` is out of reach; expected 0.4963 to 0.9988 of the dense MACs: "
                         r"block 3 can lose at most 98 of its 196 patch tokens; choose a share in reach"),
        ("evit", 0.1, {}, r"expected 0.30\d\d to 0.99\d\d .*: block 3 is the first to reduce and keeps at least 1"),
        ("tome", 0.6, {"blocks": (11,)}, r"expected 0.97\d\d to 0.99\d\d .*: block 11 can lose at most 98"),
        ("grid", 0.001, {}, r"expected 0.0094 to 0.9945 .*: block 0 keeps at least 1 patch token"),
        ("bat", 0.999, {"blocks": (3,), "args": {"pairs": 30}},
         r"expected 0.4\d* to 0.88\d\d .*: the least that it removes is 30 tokens, at block 3 first"),
        ("bat", 0.6, {"args": {"pairs": 30}}, r"no plan of this method fits .*pairs of the bat step at block \d is 30"),
        ("diffrate", 0.6, {"blocks": (0,)}, r"the published rates remove nothing at `blocks=0`; expected a block"),
    ],
)  # fmt: skip
def test_out_of_reach(method: str, share: float, changes: Any, message: str, deit_s: ModelSpec) -> None:
    with pytest.raises(PlanError, match=message):
        target(method, share, deit_s, **changes)


def test_few_patches_get_the_nearest_plan(tiny: ModelSpec) -> None:
    """16 patches: half a percent is not possible with integers, which is no error."""
    plan = target("evit", 0.7, tiny)
    assert share_of(plan, tiny) == pytest.approx(0.7, abs=0.03)
