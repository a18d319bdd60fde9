"""Limits of a stage, and its progress messages."""

from __future__ import annotations

import pytest

from vp_exporter.errors import SearchError
from vp_exporter.searching import limits as module
from vp_exporter.searching.limits import TELL_SECONDS, Limits, Trace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_evaluations_and_seconds_whichever_ends_first(clock: Clock) -> None:
    counted, timed, free = Limits(3, 60.0), Limits(None, 60.0), Limits()
    counted.spend(2)
    assert counted.left
    counted.spend()
    assert not counted.left
    timed.spend(1000)
    assert timed.left
    clock.now += 60
    assert not timed.left
    assert free.left
    assert not Limits(0).left


@pytest.mark.parametrize(("given", "said"), [((-1,), "evaluations is -1"), ((None, -2.0), "seconds is -2")])
def test_less_than_nothing_is_refused(given: tuple, said: str) -> None:
    with pytest.raises(SearchError, match=f"{said}.*expected 0 or more"):
        Limits(*given)


def test_a_long_search_tells_where_it_is(clock: Clock) -> None:
    heard: list[str] = []
    trace = Trace(tell=heard.append)
    for step in range(7):
        trace.add("greedy", 0.5, 0.25 + step)
        clock.now += TELL_SECONDS / 2
    assert heard == [f"{n} candidates, at greedy: best loss {n - 1}.25000" for n in (3, 5, 7)]
    assert [row["evaluation"] for row in trace.rows] == list(range(1, 8))
