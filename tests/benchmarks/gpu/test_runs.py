"""Rows survive crashes of the measuring process, and are not measured twice."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.runs import FORMAT, RESTART, Child, PostponedError, Results, Row, run_rows, supervise
from tests.waiting import LONG


def row(key: str, run: Callable[[], dict[str, Any]] | None = None, *, sources: str = "s", seconds: float = 1.0) -> Row:
    return Row("part", key, sources, seconds, run or (lambda: {"value": key}))


def quiet(text: str) -> None:
    pass


def test_rows_are_written_at_once_and_not_measured_again(tmp_path: Path) -> None:
    path, mirror = tmp_path / "rows.json", tmp_path / "out" / "copy.json"
    seen: list[str] = []

    def second() -> dict[str, Any]:
        seen.append("second")
        assert "part: first" in json.loads(path.read_text())["rows"]  # the previous one is in the file already
        return {}

    rows = [row("first"), row("second", second)]
    assert run_rows(rows, Results(path, mirror), deadline=time.time() + LONG, say=quiet) == 0
    assert json.loads(mirror.read_text()) == json.loads(path.read_text())
    assert run_rows(rows, Results(path), deadline=time.time() + LONG, say=quiet) == 0
    assert seen == ["second"]


def test_other_sources_are_measured_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    run_rows([row("a")], results, deadline=time.time() + LONG, say=quiet)
    run_rows([row("a", lambda: {"value": "new"}, sources="t")], results, deadline=time.time() + LONG, say=quiet)
    assert results.rows["part: a"]["value"] == "new"


def test_a_failure_is_a_row_and_the_next_one_runs() -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("first line\nsecond line")

    results = Results(None)
    assert run_rows([row("bad", fail), row("good")], results, deadline=time.time() + LONG, say=quiet) == 0
    assert results.rows["part: bad"]["error"] == "ValueError: first line"
    assert results.rows["part: good"]["value"] == "good"
    assert results.fresh(row("bad")) is not None
    assert results.fresh(row("bad"), retry=True) is None


def test_a_sick_device_ends_the_process_and_keeps_the_row() -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    results = Results(None)
    code = run_rows(
        [row("bad", fail), row("good")], results, deadline=time.time() + LONG, healthy=lambda: False, say=quiet
    )
    assert code == RESTART
    assert list(results.rows) == ["part: bad"]


def test_no_row_begins_that_would_end_too_late() -> None:
    results = Results(None)
    rows = [row("long", seconds=100.0), row("short", seconds=1.0)]
    run_rows(rows, results, deadline=50.0, now=lambda: 0.0, say=quiet)
    assert list(results.rows) == ["part: short"]


def test_a_row_that_waits_for_another_is_no_failure(tmp_path: Path) -> None:
    def wait() -> dict[str, Any]:
        raise PostponedError("the dense model comes first")

    results, current = Results(None), tmp_path / "current"
    run_rows([row("waits", wait), row("good")], results, deadline=time.time() + LONG, current=current, say=quiet)
    assert list(results.rows) == ["part: good"]
    assert not current.exists()


def test_a_foreign_file_is_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"rows": 3}')
    assert Results(path).rows == {}
    assert "no results file" in capsys.readouterr().out


CHILD = """
import json, os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
from benchmarks.gpu.runs import Results, Row, run_rows
from pathlib import Path
from types import SimpleNamespace
into, known = Path({into!r}), Results(Path({known!r}))
def die(): os.kill(os.getpid(), signal.SIGSEGV)
def hang(): time.sleep(600)
what = {{"good": lambda: {{"value": 1}}, "die": die, "hang": hang, "after": lambda: {{"value": 2}}}}
rows = [Row("part", key, "s", 0.0, what[key]) for key in {keys!r}]
rows = [row for row in rows if known.fresh(row) is None]
sys.exit(run_rows(rows, Results(into), deadline=time.time() + 900,
                  current=into.with_name(into.name + ".current"), say=lambda text: None))
"""


def child(tmp_path: Path, keys: list[str], name: str = "shard") -> Child:
    into = tmp_path / f"{name}.json"
    benchmarks = str(Path(__file__).resolve().parents[3])
    code = CHILD.format(benchmarks=benchmarks, into=str(into), known=str(tmp_path / "all.json"), keys=keys)
    return Child([sys.executable, "-c", code], into, {each.name: each for each in map(row, keys)})


def test_a_process_that_dies_loses_one_row_only(tmp_path: Path) -> None:
    results = Results(tmp_path / "all.json")
    children = [child(tmp_path, ["good", "die", "after"]), child(tmp_path, ["other"][:0], "empty")]
    supervise(children, results, deadline=time.time() + LONG, poll=0.05)
    assert results.rows["part: good"]["value"] == 1
    assert results.rows["part: die"]["error"] == "its process died (SIGSEGV)"
    assert results.rows["part: after"]["value"] == 2
    assert json.loads((tmp_path / "all.json").read_text())["format"] == FORMAT
    assert not list(tmp_path.glob("*.current"))
    assert not (tmp_path / "shard.json").exists()


@pytest.mark.parametrize("late_is_failure", [True, False])
def test_a_process_that_hangs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_is_failure: bool
) -> None:
    from benchmarks.gpu import runs

    results, stuck = Results(tmp_path / "all.json"), child(tmp_path, ["good", "hang", "after"])

    def now() -> float:
        """Time is up as soon as the child hangs, however long it took to get there."""
        hangs = stuck.current.exists() and "hang" in stuck.current.read_text()
        return time.time() + (1e6 if hangs else 0.0)

    monkeypatch.setattr(runs, "STUCK", 0.0)
    monkeypatch.setattr(runs, "time", SimpleNamespace(**{**vars(time), "time": now}))
    deadline = time.time() + LONG
    assert not supervise([stuck], results, deadline=deadline, late_is_failure=late_is_failure, poll=0.05)
    assert results.rows["part: good"]["value"] == 1
    if late_is_failure:
        assert "was stopped" in results.rows["part: hang"]["error"]
    else:
        assert "part: hang" not in results.rows


def test_newer_rows_win(tmp_path: Path) -> None:
    old, new = Results(tmp_path / "old.json"), Results(tmp_path / "new.json")
    old.put(row("a"), {"value": "old"}, 0.0)
    time.sleep(0.01)
    new.put(row("a"), {"value": "new"}, 0.0)
    assert old.absorb(tmp_path / "new.json") == 1
    assert old.rows["part: a"]["value"] == "new"
    assert new.absorb(tmp_path / "new.json") == 0


def test_a_row_says_what_it_is() -> None:
    assert row("a").name == "part: a"
