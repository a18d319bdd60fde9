"""Rows of kernel timings: what they compare, and how verdicts follow from figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernels, machine, tune
from benchmarks.gpu.cases import Make
from benchmarks.gpu.kernels import Timed, judge, timed
from benchmarks.gpu.timing import Timing


def at(microseconds: float) -> Timing:
    return Timing(microseconds * 1e-6, microseconds * 1e-6, microseconds * 1e-6, 9)


def first(operator: str, **shape: Any) -> Timed:
    return next(row for row in timed(small=True) if row.operator == operator and shape.items() <= row.shape.items())


def test_keys_are_unique_and_every_operator_is_timed() -> None:
    for quick in (False, True):
        rows = timed(quick=quick)
        assert len({row.key for row in rows}) == len(rows)
        assert {row.operator for row in rows} == set(kernels.BARS)
    shapes = {
        (r.shape["N"], r.shape["B"], r.shape["H"], r.shape["dtype"]) for r in timed() if r.operator == "attention"
    }
    assert shapes == {(n, b, h, t) for n in (197, 138, 98, 69) for b in (64, 256) for h in (6, 12)
                      for t in ("bf16", "fp16")}  # fmt: skip


@pytest.mark.parametrize("operator", list(kernels.BARS))
def test_all_forms_of_a_row_agree(operator: str) -> None:
    """All forms of a row compute the same; on a CPU ours runs its torch implementation."""
    torch.set_num_threads(1)
    row = first(operator)
    arguments = row.build(Make("cpu", 0))
    answers = {}
    for variant in row.variants:
        if "compiled" in variant.name or "gather" in variant.name or variant.name.startswith(("sdpa e", "sdpa c")):
            continue
        if variant.name == "sdpa flash bias":
            continue
        found = variant.form()(*variant.given(arguments))
        answers[variant.name] = found[0] if isinstance(found, tuple) else found
    # A bias changes the answer; importance does not.
    base = {name: answer for name, answer in answers.items() if "bias" not in name}
    assert len(base) >= 2
    one, *others = base.values()
    for other in others:
        assert torch.allclose(one.float(), other.float(), atol=0.04, rtol=0.02), list(base)


def test_dry_measure_gives_a_whole_row() -> None:
    found = kernels.measure(first("select"), device="cpu")
    assert found["refused"] == {}
    assert found["judged"]["vp"]["rival"] == "torch topk + sort"
    assert found["judged"]["vp"]["met"] in ([True], [False])
    assert "us" in found["say"]


def test_attention_is_held_to_the_fastest_of_its_kind() -> None:
    row = first("attention")
    times = {"vp": at(10), "vp bias": at(10), "sdpa flash": at(12), "sdpa cudnn": at(11), "sdpa cudnn bias": at(9)}
    moved = dict.fromkeys(times, 30000000)
    found = judge(row, times, moved, 4e12)["judged"]
    assert found["vp"]["rival"] == "sdpa cudnn"
    assert found["vp"]["ratio"] == pytest.approx(1.1)
    assert found["vp"]["share"] == pytest.approx(0.75)
    assert found["vp"]["met"] == [True, True]
    assert found["vp bias"]["rival"] == "sdpa cudnn bias"
    assert found["vp bias"]["met"] == [False, True]


def test_without_a_rival_no_bar_is_met_or_missed() -> None:
    row = first("attention")
    found = judge(row, {"vp bias": at(10)}, {"vp bias": 30_000_000}, None)["judged"]["vp bias"]
    assert found["ratio"] is None
    assert found["met"] == [None, None]


def test_compiled_forms_are_no_rivals() -> None:
    row = first("match_merge")
    times = {"vp": at(10), "torch portable": at(90), "torch textbook": at(85), "torch portable compiled": at(20)}
    found = judge(row, times, {"vp": 1}, 4e12)["judged"]["vp"]
    assert (found["rival"], found["met"]) == ("torch textbook", [True])


def test_attention_counts_qkv_once_and_what_is_written() -> None:
    row = first("attention", N=69)
    arguments = row.build(Make("cpu", 0))
    out, importance = torch.empty(2, 69, 192, dtype=torch.bfloat16), torch.empty(2, 69)
    assert row.moved(arguments, (out, None)) == 2 * 69 * (3 + 1) * 192 * 2
    assert row.moved(arguments, (out, importance)) == 2 * 69 * 4 * 192 * 2 + 2 * 69 * 4


def test_tuning_tries_other_tiles_and_puts_config_back() -> None:
    def attention_looped() -> None: ...

    def attention_whole() -> None: ...

    from vp_kernels.launch import Config

    chosen = Config(attention_whole, {"P0": 128, "P1": 64, "P2": 16, "BLOCK_M": 64}, 4, 2)
    room = SimpleNamespace(config=lambda n: chosen, attention_looped=attention_looped)
    own = room.config
    assert tune.base(room, lambda: room.config(197)) is chosen
    assert room.config is own
    found = tune.candidates(room, "attention", chosen)
    assert len({repr(config) for config in found.values()}) == len(found)
    assert {config.kernel for config in found.values()} == {attention_whole, attention_looped}
    assert all("P0" not in config.constants for config in found.values() if config.kernel is attention_looped)
    with tune.using(room, found[list(found)[-1]]):
        assert room.config(1, 2, anything=3) is found[list(found)[-1]]
    assert room.config is own


def test_nvidia_smi_may_be_absent_or_ignorant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.smi(command="no-such-nvidia-smi") == {}
    answers = {"name": "NVIDIA H200", "clocks.sm": "1980", "bad": None, "power.draw": "[N/A]"}

    def ask(command: list[str]) -> list[str] | None:
        query = command[-1].removeprefix("--query-gpu=")
        answer = answers.get(query)
        return None if "," in query or answer is None else [answer]

    monkeypatch.setattr(machine, "_ask", ask)
    assert machine.smi(list(answers)) == {"name": "NVIDIA H200", "clocks.sm": "1980"}


def test_throttle_reasons() -> None:
    assert machine.throttle("0x0000000000000004") == ["power cap"]
    assert machine.throttle("0x0000000000000000") == []
    assert machine.throttle("0x0000000000000441") == ["idle", "hardware thermal", "0x400"]
    assert machine.throttle("Not Active") == ["Not Active"]
