"""Invalid methods: one line names the block and the limit; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.exporter.cli.samples import (
    NAME,
    Inputs,
    argv,
    call,
    check_error,
    export_options,
    model_args,
    snapshot,
)
from vp_exporter.cli import export, inspect

Entry = dict[str, Any]


class Case(NamedTuple):
    """Options that differ from a valid export with a mask; `steps` are those of a plan file given instead."""

    id: str
    options: dict[str, Any]
    message: str
    steps: list[Entry] | None = None


def without_class_token(method: str, **options: Any) -> dict[str, Any]:
    """The tiny model with average pooling: 2 blocks, 16 patches and no prefix token."""
    args = model_args(class_token="false", global_pool="avg")
    return {"method": method, "model_arg": args, "weights": None, "random_init": True, **options}


def step(block: int, reducer: str, **fields: Any) -> Entry:
    return {"block": block, "reducer": reducer, **fields}


# The tiny model has 2 blocks, 16 patches and a class token.
CASES = [
    # more tokens than there are
    Case("tokens-out-too-large", {"method": "evit", "blocks": 1, "method_arg": "tokens_out=[18]"},
         r"tokens_out of the evit step at block 1 is 18; expected 3 to 17: at least 1 patch token stays.*; reduce les"),
    Case("tokens-out-too-large-in-a-plan", {}, r"tokens_out of the topk step at block 1 is 12; expected 2 to 10: at le",
         [step(0, "evit", tokens_out=10, fuse=True), step(1, "topk", tokens_out=12)]),
    Case("tokens-out-grows", {"method": "bat", "blocks": "0,1", "method_arg": "tokens_out=[9,12]"},
         r"tokens_out of the bat step at block 1 is 12; expected 2 to 9"),
    Case("r-beyond-half", {"method": "tome", "r": 9},
         r"r of the tome step at block 0 is 9; expected 1 to 8: at most half of the patch tokens can merge "
         r"\(1 prefix and 16 patch tokens enter it\); reduce less here, or earlier blocks less"),
    Case("r-beyond-half-in-a-list", {"method": "pitome", "r": "6,6"},
         r"r of the pitome step at block 1 is 6; expected 1 to 5: r tokens merge into r others"),
    Case("r-beyond-half-in-a-plan", {}, r"r of the ppt step at block 1 is 9; expected 1 to 8: at most half of the patc",
         [step(1, "ppt", r=9, tau=1e-4)]),
    Case("gtp-beyond-all-but-one", {"method": "gtp", "r": 16}, r"r of the gtp step at block 0 is 16; expected 1 to 15"),
    Case("block-outside", {"method": "topk", "keep_rate": 0.5, "blocks": "1,2"},
         r"--blocks names block 2; expected 0 to 1: vit_tiny_patch16_224 has 2 blocks; block numbers are 0-based"),
    Case("target-out-of-reach", {"method": "evit", "target_macs": 0.1},
         r"--target-macs 0.1 is out of reach; expected 0\.\d{4} to 0\.\d{4} of the dense MACs: block 0 is the first to "
         r"reduce and keeps at least 1 patch token; choose a share in reach"),
    Case("target-out-of-reach-of-late-blocks", {"method": "tome", "target_macs": 0.5, "blocks": 1},
         r"--target-macs 0.5 is out of reach; expected .*: block 1 can lose at most 8 of its 16 patch tokens"),
    # missing tokens
    *(Case(f"{method}-without-class-token", without_class_token(method, target_macs=0.8, **extra),
           rf"the {method} step at block \d scores patches by .*, and {NAME} has no class token; expected a model with "
           r"a class token; use a reducer that needs none")
      for method, extra in (("evit", {}), ("topk", {}), ("bat", {}), ("ppt", {"tau": 0}), ("diffrate", {}),
                            ("gtp", {"method_arg": "score=class"}))),
    # conflicting steps
    Case("two-steps-in-one-block", {}, r"block 1 has two steps in the same place; expected one; join them",
         [step(1, "tome", r=2), step(1, "evit", tokens_out=8, fuse=True)]),
    Case("static-after-a-choice", {},
         r"static step at block 1 comes after a reducer that chooses by image; expected static steps before every othe",
         [step(0, "tome", r=2), step(1, "static", keep=[0, 1])]),
    Case("unknown-reducer", {}, r"the step at block 0 has the reducer 'atc'; expected one of static, .*; this version",
         [step(0, "atc", r=2)]),
    Case("field-missing", {}, r"the ppt step at block 0 lacks tau; expected only the fields order, r, tau",
         [step(0, "ppt", r=2)]),
    # missing, excess or unknown options
    Case("tau-missing", {"method": "ppt", "r": 4},
         r"--method ppt has no tau; expected --tau, .*; tau belongs to a model and a token count: preset ppt-deit-s u"),
    Case("amount-missing", {"method": "tome"}, r"nothing says how much tome removes; expected exactly one of --r, --t"),
    Case("two-amounts", {"method": "tome", "r": 2, "target_macs": 0.7}, r"tome is given --r and --target-macs; expect"),
    Case("option-of-another-method", {"method": "evit", "r": 2}, r"method evit does not take --r; expected only --kee"),
    Case("argument-of-another-method", {"method": "tome", "r": 2, "method_arg": "fuse=true"},
         r"method tome does not take --method-arg fuse; expected only --r, --schedule, --blocks, --target-macs, --pre"),
    Case("argument-malformed", {"method": "evit", "keep_rate": 0.5, "method_arg": "fuse"},
         r"--method-arg is 'fuse'; expected KEY=VALUE, such as fuse=false"),
    Case("argument-of-wrong-type", {"method": "evit", "keep_rate": 0.5, "method_arg": "fuse=2"},
         r"fuse of the evit step at block 0 is 2; expected true or false"),
    Case("unknown-method", {"method": "tomme", "r": 2}, r"unknown method 'tomme'; expected one of tome, ppt, evit, to"),
    Case("unknown-preset", {"method": "ppt", "preset": "ppt-deit-xl"},
         r"unknown preset 'ppt-deit-xl'; expected one of ppt-deit-s \(of every method: ppt-deit-s, tome-r13, evit-0.7"),
    Case("preset-of-another-method", {"method": "tome", "preset": "ppt-deit-s"},
         r"preset ppt-deit-s is one of method ppt; expected one of tome-r13; --method ppt"),
    Case("preset-for-another-model", {"method": "tome", "preset": "tome-r13"},
         r"preset tome-r13 is given for vit_tiny\w+ with 2 blocks and 16 patches; expected 12 blocks and 196 patches"),
    Case("options-without-method", {"masks": lambda i: i.mask, "target_macs": 0.7},
         r"--target-macs is given without --method; expected --method NAME, such as --method tome; name the method"),
    Case("method-and-mask", {"masks": lambda i: i.mask, "method": "tome", "r": 2},
         r"--masks and --method are given together; expected one of --plan FILE.json, --masks FILE.npy or --method NA"),
    Case("method-plan-and-mask", {"masks": lambda i: i.mask, "plan": lambda i: i.plan, "method": "tome", "r": 2},
         r"--plan, --masks and --method are given together; expected one of"),
    Case("r-not-a-number", {"method": "tome", "r": "13;13"}, r"--r is '13;13'; expected whole numbers with commas, su"),
    Case("blocks-not-numbers", {"method": "tome", "r": 2, "blocks": "first"}, r"--blocks is 'first'; expected whole n"),
    Case("keep-rate-of-70", {"method": "evit", "keep_rate": 70},
         r"--keep-rate is 70.0; expected the share of patch tokens that stay, above 0 and below 1, such as 0.7"),
    Case("target-macs-of-65", {"method": "evit", "target_macs": 65}, r"--target-macs is 65.0; expected a share of the"),
    Case("unknown-schedule", {"method": "tome", "r": 2, "schedule": "down"}, r"--schedule is 'down'; expected one of"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
@pytest.mark.usefixtures("ready_engines")
def test_export_refuses(case: Case, inputs: Inputs, tmp_path: Path) -> None:
    given = {key: value(inputs) if callable(value) else value for key, value in case.options.items()}
    if case.steps is not None:
        plan = json.loads(inputs.plan.read_text())
        plan["steps"] = case.steps
        given["plan"] = tmp_path / "bad.json"
        given["plan"].write_text(json.dumps(plan))
    before = snapshot(tmp_path)
    options = export_options(inputs, **{"out": tmp_path / "new.vpe", "quiet": True, "masks": None, **given})
    check_error(call(export.app, *argv(options)), 2, case.message)
    assert snapshot(tmp_path) == before


INSPECT = [
    ([], r"nothing to inspect is named; expected a bundle, a plan or a mask; or --method NAME with --model NAME"),
    (["--method", "tome", "--r", "2"], r"--method is given without --model; expected --model NAME, for which"),
    (
        ["plan.json", "--method", "tome", "--r", "2"],
        r"both plan.json and --method are given; expected a bundle, a plan",
    ),
    (["plan.json", "--keep-rate", "0.7"], r"--keep-rate is given without --method; expected --method NAME"),
    (["-m", NAME, "--method", "tome", "--r", "99"], r"r of the tome step at block 0 is 99; expected 1 to 98"),
]


@pytest.mark.parametrize(("words", "message"), INSPECT, ids=range(len(INSPECT)))
def test_inspect_refuses(words: list[str], message: str) -> None:
    check_error(call(inspect.app, *words), 2, message)
