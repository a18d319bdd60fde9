"""Correcting for a profiler's overhead; the rest of `profile` is tested on real bundles (tests/exporter/cli)."""

from __future__ import annotations

import numpy as np
import pytest

from vp_engines.backends.recording import Operation, RecordedRun
from vp_exporter.profiling.groups import ATTENTION, GROUPS, MLP, REDUCTION, RUNTIME
from vp_exporter.profiling.measure import _Series

COST = 15.0  # microseconds that this profiler adds to each operation, a third of them inside it
TRUE = [("blocks.0/Attention.0", 400.0), ("blocks.0.reduce/TopK.0", 30.0), ("vit.blocks.0.mlp.fc1/MatMul.0", 900.0)]
LEAD = 20.0


def run(operations: list[tuple[str, float]], cost: float = COST, *, whole: bool = True) -> RecordedRun:
    found, clock = [], LEAD
    for name, duration in operations:
        found.append(Operation(name, "", clock, duration + cost / 3))
        clock += duration + cost
    return RecordedRun(tuple(found), clock if whole else None)


def series(operations: list[tuple[str, float]], cost: float = COST, rounds: int = 5, *, whole: bool = True) -> _Series:
    plain = (LEAD + sum(duration for _, duration in operations)) / 1000
    slowed = plain + cost * len(operations) / 1000
    return _Series("x", 1, [run(operations, cost, whole=whole)] * rounds, np.tile([plain, slowed], (rounds, 1)))


@pytest.mark.parametrize("repeats", [1, 50])
def test_the_profilers_cost_is_found_and_taken_off(repeats: int) -> None:
    """For any number of operations, the parts are as without a profiler."""
    measured = series(TRUE * repeats)
    assert measured.excess() == pytest.approx(COST / 1000)
    found = measured.profile(measured.excess())
    assert found.groups[ATTENTION] == pytest.approx(0.4 * repeats)
    assert found.groups[REDUCTION] == pytest.approx(0.03 * repeats)
    assert found.groups[MLP] == pytest.approx(0.9 * repeats)
    assert found.groups[RUNTIME] == pytest.approx(LEAD / 1000)
    assert found.covered == pytest.approx(1.0)
    assert [each.milliseconds for each in found.operations[:3]] == pytest.approx([0.4, 0.03, 0.9])
    assert found.slowdown > 1
    assert measured.shortest() == pytest.approx((30 + COST) / 1000)


def test_what_a_profiler_slows_down_in_proportion_is_scaled_to_the_clock() -> None:
    """In addition to its cost per operation; if the difference is too large, nothing is corrected."""
    measured = series([(name, 1.1 * duration) for name, duration in TRUE])
    measured.taken = np.tile([(LEAD + sum(duration for _, duration in TRUE)) / 1000, 1.5], (5, 1))
    found = measured.profile(COST / 1000)
    assert found.groups[ATTENTION] / found.groups[MLP] == pytest.approx(4 / 9)
    assert sum(found.groups.values()) == pytest.approx(1.35) == pytest.approx(found.covered * 1.35)
    assert found.scale == pytest.approx(1.35 / (0.02 + 1.1 * 1.33))
    measured.taken /= 2
    found = measured.profile(COST / 1000)
    assert found.scale == 1
    assert found.covered > 2


def test_a_profiler_that_times_no_whole_runs_is_held_to_the_clock() -> None:
    """Time not covered by operations is attributed to the runtime; an excess is scaled down."""
    measured = series(TRUE, whole=False)
    assert measured.excess() == 0
    found = measured.profile(1.0)
    assert found.profiler_ms == 0
    assert found.scale == 1
    assert found.groups[ATTENTION] == pytest.approx(0.4 + COST / 3000)
    assert found.groups[RUNTIME] == pytest.approx((LEAD - COST) / 1000)
    assert found.covered == pytest.approx(1.0)
    measured.taken -= 0.1
    found = measured.profile(1.0)
    assert found.groups[ATTENTION] == pytest.approx(0.405 * 1.25 / 1.345)
    assert found.groups[RUNTIME] == pytest.approx(0.0)
    assert found.covered == pytest.approx(1.0)


def test_a_lost_event_costs_one_run_and_no_event_no_crash() -> None:
    runs = [run(TRUE), run(TRUE[:2]), run(TRUE)]
    found = _Series("x", 1, runs, np.ones((3, 2))).profile(0.0)
    assert [each.name for each in found.operations] == [name for name, _ in TRUE]
    assert found.groups[MLP] == pytest.approx(0.9 + COST / 1000)
    for runs in ([], [RecordedRun(())]):
        found = _Series("x", 1, runs, np.ones((1, 2))).profile(0.0)
        assert found.groups == dict.fromkeys(GROUPS, 0.0)
        assert found.operations == ()
