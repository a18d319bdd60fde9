"""Plans are read back as written, and inconsistent ones are rejected with a suggestion."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vp_exporter.errors import PlanError
from vp_exporter.model.spec import BlockMacs, ModelSpec
from vp_exporter.plan import BlockTokens, PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep

MODEL = PlanModel("vit_toy", (32, 48), (16, 16), prefix_tokens=1, depth=4, patches=6)


def as_json(**changes: Any) -> dict[str, Any]:
    """A valid plan of two steps and one bias, written by hand, with fields replaced."""
    plan: dict[str, Any] = {
        "format": "vp-plan",
        "version": 1,
        "model": {
            "name": "vit_toy",
            "image_size": [32, 48],
            "patch_size": [16, 16],
            "prefix_tokens": 1,
            "depth": 4,
            "patches": 6,
            "weights_sha256": None,
        },
        "method": "by hand",
        "steps": [
            {"block": 1, "reducer": "static", "keep": [0, 2, 3, 5]},
            {"block": 3, "reducer": "static", "keep": [2, 5]},
        ],
        "key_bias": {"3": [0.0, -0.5, 0.25]},
        "proportional_attention": False,
        "budget": {"macs": 0.6},
        "provenance": {"seed": 3},
    }
    return {**plan, **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in as_json().items() if name != key}


def with_model(**changes: Any) -> dict[str, Any]:
    return as_json(model={**as_json()["model"], **changes}, steps=[], key_bias={})


def with_keep(*keeps: tuple[int, Any]) -> dict[str, Any]:
    steps = [{"block": block, "reducer": "static", "keep": keep} for block, keep in keeps]
    return as_json(steps=steps, key_bias={})


def read(data: Any) -> ReductionPlan:
    return ReductionPlan.loads(json.dumps(data))


finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def plans(draw: st.DrawFn) -> ReductionPlan:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    prefix, depth = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    patch = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    model = PlanModel(
        name=draw(st.text(min_size=1, max_size=12)),
        image_size=(rows * patch[0], columns * patch[1]),
        patch_size=patch,
        prefix_tokens=prefix,
        depth=depth,
        patches=rows * columns,
        weights_sha256=draw(st.none() | st.just("ab" * 32)),
    )
    steps, bias, alive = [], {}, list(range(model.patches))
    for block in range(depth):
        if draw(st.booleans()):
            alive = sorted(draw(st.sets(st.sampled_from(alive), min_size=1)))
            steps.append(StaticStep(block=block, keep=tuple(alive)))
        if draw(st.booleans()):
            size = prefix + len(alive)
            bias[block] = tuple(draw(st.lists(finite | st.integers(-9, 9), min_size=size, max_size=size)))
    return ReductionPlan(
        model=model,
        steps=tuple(steps),
        method=draw(st.text(max_size=12)),
        key_bias=bias,
        proportional_attention=draw(st.booleans()),
        budget=draw(json_values),
        provenance=draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
    )


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same JSON value, with the keys of every object in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(inner, rng)) for key, inner in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(inner, rng) for inner in value] if isinstance(value, list) else value


@settings(max_examples=150, deadline=None)
@given(plan=plans(), rng=st.randoms(use_true_random=False))
def test_json_round_trip(plan: ReductionPlan, rng: random.Random) -> None:
    text = plan.dumps()
    back = ReductionPlan.loads(text)
    assert back == plan
    assert back.fingerprint() == plan.fingerprint()
    assert back.dumps() == text
    assert ReductionPlan.loads(json.dumps(shuffled(json.loads(text), rng))).fingerprint() == plan.fingerprint()
    assert ReductionPlan.loads(text.encode()) == plan


def test_reads_what_stands_in_the_file() -> None:
    plan = read(as_json())
    assert plan.model == MODEL
    assert plan.steps == (StaticStep(block=1, keep=(0, 2, 3, 5)), StaticStep(block=3, keep=(2, 5)))
    assert plan.key_bias == {3: (0.0, -0.5, 0.25)}
    assert (plan.method, plan.proportional_attention) == ("by hand", False)
    assert (plan.budget, plan.provenance) == ({"macs": 0.6}, {"seed": 3})
    assert json.loads(plan.dumps()) == as_json()


def test_one_line_a_step() -> None:
    lines = [line.strip(" ,") for line in read(as_json()).dumps().splitlines()]
    assert '{"block": 1, "reducer": "static", "keep": [0, 2, 3, 5]}' in lines
    assert '{"block": 3, "reducer": "static", "keep": [2, 5]}' in lines


def test_optional_fields_may_be_left_out() -> None:
    assert read({key: as_json()[key] for key in ("format", "version", "model")}) == ReductionPlan(MODEL)


@pytest.mark.parametrize(
    "change", [{"method": "another"}, {"budget": None}, {"budget": {"macs": 0.1}}, {"provenance": {"seed": 4}}]
)
def test_fingerprint_ignores_what_does_not_run(change: dict[str, Any]) -> None:
    assert read(as_json(**change)).fingerprint() == read(as_json()).fingerprint()


def test_fingerprint_takes_whole_numbers_for_floats() -> None:
    whole = ReductionPlan(MODEL, key_bias={0: (0, 1, 0, 0, 0, 0, 2)})
    assert whole.fingerprint() == ReductionPlan.loads(whole.dumps()).fingerprint()


def test_a_plan_of_before_keeps_its_meaning_and_its_fingerprint() -> None:
    """Later fields are missing: they default to the earlier behaviour, and are not part of the fingerprint."""
    model = {**as_json()["model"], "patches": 30, "image_size": [80, 96]}
    steps = [
        {"block": 0, "reducer": "pitome", "r": 3, "margin": 0.5},
        {"block": 1, "reducer": "diffrate", "prune_to": 26, "merge_to": 24},
        {"block": 2, "reducer": "ppt", "r": 3, "tau": 0.0},
        {"block": 3, "reducer": "gtp", "r": 3, "alpha": 0.2, "score": "class", "graph": "mixed", "neighbours": 8},
    ]
    what = {"model": model, "steps": steps, "key_bias": {}, "proportional_attention": False}
    as_before = hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    plan = ReductionPlan.from_dict({"format": "vp-plan", "version": 1, **what})
    assert plan.fingerprint() == as_before
    assert ReductionPlan.loads(plan.dumps()).fingerprint() == as_before
    later = [{"matching": "protect"}, {"weights": "similarity"}, {"order": "position"}]
    later.append({"graph_from": "keys", "theta": 1.0})
    assert [step.fields() for step in plan.steps] == [
        {key: value for key, value in {**entry, **more}.items() if key not in ("block", "reducer")}
        for entry, more in zip(steps, later, strict=True)
    ]
    now = [{**steps[0], "matching": "bipartite"}, *steps[1:]]
    other = ReductionPlan.from_dict({"format": "vp-plan", "version": 1, **what, "steps": now})
    assert other.fingerprint() != as_before


def test_fingerprint_changes_with_what_runs() -> None:
    first, second = as_json()["steps"]
    variants = [
        as_json(),
        as_json(steps=[first, {**second, "keep": [2, 3]}]),
        as_json(steps=[first, {**second, "block": 2}]),
        as_json(steps=[first, {**second, "keep": [0, 5]}]),
        as_json(key_bias={}),
        as_json(key_bias={"3": [0.0, -0.5, 0.2500001]}),
        as_json(key_bias={"3": [0.0, 0.25, -0.5]}),
        as_json(key_bias={"2": [0.0, -0.5, 0.25, 0.0, 0.0]}),
        as_json(proportional_attention=True),
        as_json(model={**as_json()["model"], "name": "vit_other"}),
        as_json(model={**as_json()["model"], "depth": 5}),
    ]
    assert len({read(variant).fingerprint() for variant in variants}) == len(variants)


def test_save_and_load(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", read(as_json())
    path.write_text("an old file")
    plan.save(path)
    assert ReductionPlan.load(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]  # no partial file is left


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan .*none\.json: No such file"):
        ReductionPlan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match=r"cannot read the plan .*directory"):
        ReductionPlan.load(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PlanError, match=r"cannot write .*choose another place"):
        read(as_json()).save(tmp_path / "file" / "plan.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("an old file")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(PlanError, match="No space left"):
        read(as_json()).save(path)
    assert path.read_text() == "an old file"
    assert len(list(tmp_path.iterdir())) == 1


# id -> (plan, expected parts of the message: found, expected, fix).
BAD: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "revived": (
        with_keep((1, [0, 2]), (3, [0, 1])),
        "patch 1 comes back at block 3 after it was dropped",
        "stay away",
        "keep it in the earlier blocks",
    ),
    "revived-several": (with_keep((0, [0]), (1, [0, 3, 4, 5])), "patch 3 comes back at block 1", "stay away", "drop"),
    "outside-the-grid": (with_keep((2, [0, 6])), "static step at block 2 names position 6", "0 to 5", "prefix tokens"),
    "negative-position": (
        with_keep((0, [-1, 0])),
        "static step at block 0 names position -1",
        "patch positions 0 to 5",
        "prefix tokens are never listed",
    ),
    "unsorted": (with_keep((1, [2, 0])), "static step at block 1 is not sorted", "strictly ascending", ""),
    "duplicate": (with_keep((1, [2, 2])), "holds a position twice", "strictly ascending", ""),
    "empty": (with_keep((1, [])), "static step at block 1 keeps no patch", "at least 1", "keep one patch"),
    "keep-bool": (with_keep((1, [0, True])), "block 1 holds True", "whole numbers", ""),
    "keep-holds-null": (with_keep((1, [0, None])), "block 1 holds None", "whole numbers", ""),
    "keep-float": (with_keep((1, [0.0])), "block 1 holds 0.0", "whole numbers", ""),
    "keep-text": (with_keep((1, "0123")), "keep of the static step at block 1 is '0123'", "a list of positions", ""),
    "keep-null": (with_keep((1, None)), "block 1 is None", "a list of positions", ""),
    "block-too-large": (with_keep((4, [0])), "step at block 4 is outside the model", "0 to 3", "0-based"),
    "block-negative": (with_keep((-1, [0])), "step at block -1 is outside the model", "0 to 3", "0-based"),
    "block-bool": (as_json(steps=[{"block": True, "reducer": "static", "keep": [0]}]), "block True", "0-based", ""),
    "block-missing": (as_json(steps=[{"reducer": "static", "keep": [0]}]), "block None", "0-based block number", ""),
    "out-of-order": (
        with_keep((3, [0]), (1, [0])),
        "static step at block 1 follows a step at block 3",
        "steps ordered by block",
        "",
    ),
    "same-place": (with_keep((1, [0, 1]), (1, [0])), "block 1 has two steps in the same place", "one", "join them"),
    "unknown-reducer": (
        as_json(steps=[{"block": 0, "reducer": "magic"}]),
        "step at block 0 has the reducer 'magic'",
        "one of static",
        "cannot run it",
    ),
    "reducer-list": (as_json(steps=[{"block": 0, "reducer": []}]), "has the reducer []", "one of static", ""),
    "reducer-missing": (as_json(steps=[{"block": 0}]), "has the reducer None", "one of static", ""),
    "step-no-object": (as_json(steps=[3]), "a step is 3", "an object", ""),
    "step-unknown-field": (
        as_json(steps=[{"block": 1, "reducer": "static", "keep": [0], "rate": 1}]),
        "static step at block 1 has the unknown field rate",
        "exactly the fields keep",
        "",
    ),
    "step-missing-field": (
        as_json(steps=[{"block": 1, "reducer": "static"}]),
        "static step at block 1 lacks keep",
        "exactly the fields keep",
        "",
    ),
    "steps-no-list": (as_json(steps={"block": 1}), "steps of the plan is {'block': 1}", "a list", ""),
    "steps-null": (as_json(steps=None), "steps of the plan is None", "a list", ""),
    "unknown-field": (as_json(tempo=3), "unknown field 'tempo'", "'steps'", ""),
    "no-format": (without("format"), "format is None", "'vp-plan'", ""),
    "other-format": (as_json(format="vpe"), "format is 'vpe'", "'vp-plan'", ""),
    "future-version": (as_json(version=2), "version 2", "expected 1", "upgrade vp-export"),
    "no-version": (without("version"), "version None", "expected 1", ""),
    "version-bool": (as_json(version=True), "version True", "expected 1", ""),
    "version-text": (as_json(version="1"), "version '1'", "expected 1", ""),
    "no-model": (without("model"), "model of the plan is None", "an object", ""),
    "model-lacks": (
        as_json(model={k: v for k, v in as_json()["model"].items() if k != "patches"}),
        "model of the plan lacks patches",
        "image_size",
        "",
    ),
    "model-unknown": (with_model(stride=2), "model of the plan has the unknown stride", "the fields depth", ""),
    "model-name": (with_model(name=""), "model.name of the plan is ''", "a timm model name", ""),
    "model-name-number": (with_model(name=3), "model.name of the plan is 3", "a timm model name", ""),
    "model-depth": (with_model(depth=0), "model.depth of the plan is 0", "a whole number, 1 to 1000", ""),
    "model-depth-bool": (with_model(depth=True), "model.depth of the plan is True", "a whole number", ""),
    "model-huge": (with_model(patches=10**10), "model.patches of the plan is 10000000000", "1 to 1000000", ""),
    "model-prefix": (with_model(prefix_tokens=-1), "model.prefix_tokens of the plan is -1", "a whole number, 0 to", ""),
    "model-patches-float": (with_model(patches=6.0), "model.patches of the plan is 6.0", "a whole number", ""),
    "model-image-size": (with_model(image_size=224), "model.image_size of the plan is 224", "[height, width]", ""),
    "model-image-size-three": (with_model(image_size=[1, 2, 3]), "is [1, 2, 3]", "[height, width] in pixels", ""),
    "model-patch-size-text": (with_model(patch_size=["16", 16]), "is ['16', 16]", "[height, width] in pixels", ""),
    "model-weights": (with_model(weights_sha256=5), "model.weights_sha256 of the plan is 5", "text or null", ""),
    "bias-short": (
        as_json(key_bias={"3": [0.0, 0.0]}),
        "key_bias of block 3 has 2 values",
        "3, one for each of its 1 prefix tokens and 2 surviving patches",
        "",
    ),
    "bias-dense-length": (as_json(key_bias={"3": [0.0] * 7}), "block 3 has 7 values", "expected 3", ""),
    "bias-bool": (as_json(key_bias={"3": [0.0, True, 0.0]}), "block 3 holds True", "finite numbers", ""),
    "bias-null": (as_json(key_bias={"3": [0.0, None, 0.0]}), "block 3 holds None", "finite numbers", ""),
    "bias-huge-whole": (as_json(key_bias={"3": [0, 10**400, 0]}), "block 3 holds a number out of range", "finite", ""),
    "bias-no-list": (as_json(key_bias={"3": 1.0}), "key_bias holds '3': 1.0", "list of numbers", ""),
    "bias-block-outside": (as_json(key_bias={"4": [0.0]}), "key_bias names block 4", "0 to 3", ""),
    "bias-block-text": (as_json(key_bias={"three": [0.0]}), "key_bias holds 'three'", "block number", ""),
    "bias-block-twice": (
        as_json(key_bias={"3": [0, 0, 0], "03": [0, 0, 1]}),
        "key_bias holds '03'",
        "block number",
        "",
    ),
    "bias-block-endless": (as_json(key_bias={"9" * 5000: [0.0]}), "key_bias holds '999", "block number", ""),
    "bias-list": (as_json(key_bias=[[0.0]]), "key_bias of the plan is [[0.0]]", "block -> list", ""),
    "method": (as_json(method=None), "method of the plan is None", "text", ""),
    "proportional": (as_json(proportional_attention=1), "proportional_attention of the plan is 1", "a bool", ""),
    "provenance": (as_json(provenance=[1]), "provenance of the plan is [1]", "an object", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_found_expected_fix(case: str) -> None:
    data, found, expected, fix = BAD[case]
    with pytest.raises(PlanError) as caught:
        read(data)
    assert found in caught.value.found or found in str(caught.value)
    assert expected in str(caught.value)
    assert fix in caught.value.fix
    assert "\n" not in str(caught.value)


def test_several_revived_are_counted() -> None:
    with pytest.raises(PlanError, match=r"patch 3 comes back .*\(and 2 more\)"):
        read(with_keep((0, [0]), (1, [0, 3, 4, 5])))


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan"), True, "0"])
def test_bias_from_python_must_be_finite(value: Any) -> None:
    with pytest.raises(PlanError, match=r"key_bias of block 0 holds .*; expected finite numbers; to remove a token"):
        ReductionPlan(MODEL, key_bias={0: (0.0, value, 0.0, 0.0, 0.0, 0.0, 0.0)})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\xff\xfe", "not JSON"),
        (b"\xff\xfe\x00{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "its format is 'list'"),
        ("3", "its format is 'int'"),
        ("null", "its format is 'NoneType'"),
    ],
    ids=["empty", "cut", "not-ascii", "not-utf8", "deep", "list", "number", "null"],
)
def test_not_a_plan(text: str | bytes, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        ReductionPlan.loads(text)


@pytest.mark.parametrize(
    "twice",
    [('"version": 1', '"version": 1, "version": 1'), ('"depth": 4', '"depth": 4, "depth": 5')],
    ids=["top", "inside"],
)
def test_a_key_given_twice(twice: tuple[str, str]) -> None:
    text = json.dumps(as_json())
    assert twice[0] in text
    with pytest.raises(PlanError, match="a key stands twice"):
        ReductionPlan.loads(text.replace(*twice))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("place", ["-0.5", "0.6"], ids=["key_bias", "budget"])
def test_numbers_that_json_lacks(word: str, place: str) -> None:
    text = json.dumps(as_json())
    assert text.count(place) == 1
    with pytest.raises(PlanError, match=f"{word} is no JSON number"):
        ReductionPlan.loads(text.replace(place, word))


def test_numbers_too_large_for_a_float() -> None:
    text = json.dumps(as_json())
    with pytest.raises(PlanError, match="block 3 holds -inf"):
        ReductionPlan.loads(text.replace("-0.5", "-1e999"))
    with pytest.raises(PlanError, match="budget of the plan"):
        ReductionPlan.loads(text.replace("0.6", "1e999"))


@pytest.mark.parametrize("budget", [float("nan"), {"a": [float("inf")]}, object()])
def test_a_plan_that_could_not_be_read_back_is_refused(budget: Any) -> None:
    with pytest.raises(PlanError, match="budget of the plan does not fit JSON"):
        ReductionPlan(MODEL, budget=budget)


def test_tokens_by_hand() -> None:
    # 6 patches and a class token; blocks 1 and 3 drop: 7, 5, 5, 3 tokens in the attention, and as many in the MLP.
    assert read(as_json()).tokens() == (
        BlockTokens(7, 7, (0, 1, 2, 3, 4, 5)),
        BlockTokens(5, 5, (0, 2, 3, 5)),
        BlockTokens(5, 5, (0, 2, 3, 5)),
        BlockTokens(3, 3, (2, 5)),
    )


def test_reduces() -> None:
    assert read(as_json()).reduces
    assert not ReductionPlan(MODEL).reduces
    assert not read(with_keep((2, list(range(6))))).reduces


def describe_by_hand(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "name": "vit_toy",
        "image_size": (32, 48),
        "patch_size": (16, 16),
        "grid": (2, 3),
        "in_chans": 3,
        "prefix_tokens": 1,
        "class_token": True,
        "distilled": False,
        "register_tokens": 0,
        "embed_dim": 8,
        "num_heads": 2,
        "pool": "token",
        "pool_include_prefix": False,
        "num_classes": 2,
        "blocks": (BlockMacs(256, 512, 8),) * 4,
        "patch_embed_macs": 6144,
        "head_macs": (16, 0),
    }
    return ModelSpec(**{**values, **changes})


def test_check_model_accepts_its_own() -> None:
    read(as_json()).check_model(describe_by_hand())


@pytest.mark.parametrize(("mine", "theirs"), [("vit_toy", "vit_toy.in1k"), ("vit_toy.in21k", "vit_toy.in1k")])
def test_check_model_takes_another_pretrained_tag(mine: str, theirs: str) -> None:
    data = copy.deepcopy(as_json())
    data["model"]["name"] = mine
    read(data).check_model(describe_by_hand(name=theirs))


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        ({"name": "vit_other"}, "the plan is for vit_toy", "a plan for vit_other"),
        ({"image_size": (48, 32), "grid": (3, 2)}, "the plan has image_size [32, 48]", "[48, 32], as vit_toy has"),
        ({"patch_size": (8, 8)}, "the plan has patch_size [16, 16]", "[8, 8]"),
        ({"grid": (2, 4)}, "the plan has patches 6", "8, as"),
        ({"prefix_tokens": 2}, "the plan has prefix_tokens 1", "2, as"),
        ({"blocks": (BlockMacs(256, 512, 8),) * 5}, "the plan has depth 4", "5, as"),
    ],
    ids=["name", "image-size", "patch-size", "patches", "prefix", "depth"],
)
def test_check_model_refuses_another(change: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(as_json()).check_model(describe_by_hand(**change))
    assert caught.value.found == found
    assert expected in str(caught.value)
    assert "search a plan on this model" in caught.value.fix


def test_check_model_compares_weights_where_both_are_known() -> None:
    data = copy.deepcopy(as_json())
    data["model"]["weights_sha256"] = "a" * 64
    plan = read(data)
    plan.check_model(describe_by_hand(), "a" * 64)
    plan.check_model(describe_by_hand(), None)
    read(as_json()).check_model(describe_by_hand(), "b" * 64)
    with pytest.raises(PlanError, match=r"searched on weights a{12}; expected .* b{12}; search again, or remove"):
        plan.check_model(describe_by_hand(), "b" * 64)
