"""Tables on narrow terminals keep every digit, and a digest can be copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.exporter.cli.samples import NAME, call, model_args
from vp_engines.bundle import verify_bundle
from vp_exporter.cli import console, inspect, show, tables
from vp_exporter.plan import ReductionPlan
from vp_exporter.validation.intervals import Interval
from vp_exporter.validation.latency import LatencyRow, Timing

WIDTHS = (30, 60, 80, 132)


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(console.stdout, "width", request.param)
    return int(request.param)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"target_macs": 0.65, "seed": None}, "target_macs 0.65, seed none"),
        ({"cpu_flags": ["avx", "avx2"], "device": "cpu"}, "cpu_flags avx, avx2; device cpu"),
        (
            [{"stage": "fisher", "kl": 0.5}, {"stage": "tune", "ok": True}],
            "(stage fisher, kl 0.5), (stage tune, ok yes)",
        ),
        ("as it is", "as it is"),
        (["batch", 3, 224], "batch, 3, 224"),
        (1e-7, "1e-07"),
    ],
)
def test_words(value: object, text: str) -> None:
    assert tables.words(value) == text


def test_facts_lose_nothing(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    digest = "0123456789abcdef" * 4
    sentence = "a sentence of several words that has to be wrapped where the terminal is narrow"
    tables.facts("bundle", [("digest", digest), ("summary", sentence), ("empty", "")])
    lines = capsys.readouterr().out.splitlines()
    assert any(digest in line for line in lines)  # complete, on one line
    assert " ".join(" ".join(lines).split()).count(sentence) == 1
    assert all(len(line) <= width for line in lines if digest not in line)


def test_a_table_loses_no_digit(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    def timing(milliseconds: float) -> Timing:
        return Timing(milliseconds, milliseconds, milliseconds, milliseconds, 1000 / milliseconds)

    speedup = Interval(1.25, 1.234, 1.267)
    row = LatencyRow(8, 40, timing(1234.56), timing(987.65), speedup, 0.01, 1.617, 0.773, True)
    show.latency([row, row])
    text = capsys.readouterr().out
    for number in ("1234.56", "987.65", "1.250x", "1.234-1.267", "1.617", "0.773", "speed-up", "efficiency"):
        assert text.count(number) >= 1, (number, text)
    assert "…" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


@pytest.mark.parametrize("full", [197, 4097])
def test_bars_fit(width: int, full: int, capsys: pytest.CaptureFixture[str]) -> None:
    show.tokens([(full, full), (full, full // 2), (1, 1)], full)
    text = capsys.readouterr().out
    assert f"{full} > {full // 2}" in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_inspect_shows_whole_digests_and_no_python(
    width: int, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = verify_bundle(exported)
    found = call(inspect.app, str(exported))
    assert found.exit_code == 0, found.output
    assert any(bundle.digest in line for line in found.output.splitlines())
    plan = replace(
        ReductionPlan.load(exported / "plan.json"),
        budget={"target_macs": 0.5, "seed": None},
        provenance={"seeds": [0, 1], "tool": {"name": "vp", "augment": True}},
    )
    plan.save(tmp_path / "plan.json")
    shown = call(inspect.app, str(tmp_path / "plan.json"), "--model", NAME, *(f"--model-arg={a}" for a in model_args()))
    assert shown.exit_code == 0, shown.output
    assert any(ReductionPlan.load(tmp_path / "plan.json").fingerprint() in line for line in shown.output.splitlines())
    for text in (found.output, shown.output):
        for python in ("{'", "['", "None", "True", "…"):
            assert python not in text


def test_no_line_ends_in_blanks(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    show.tokens([(197, 180), (180, 90), (90, 90)], 197)
    tables.table("title", ["", "first", "second"], [["a", "1", "2.50"], ["longer", "100", "3"]])
    tables.facts("facts", [("name", "value"), ("empty", "")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 9
    assert [line for line in lines if line != line.rstrip()] == []
