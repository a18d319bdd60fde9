"""The timing loop, with a fake clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.gpu.timing import MOST_CALLS, Timing, buffers_for, interleave, per_launch


class FakeClock:
    """Every call of variant i takes `seconds[i]`, plus `drift` for each sample taken so far."""

    def __init__(self, seconds: dict[str, float], drift: float = 0.0) -> None:
        self.seconds, self.drift = seconds, drift
        self.taken: list[tuple[str, int]] = []

    def call(self, name: str) -> Callable[[], object]:
        return lambda: self.running.append(name)

    def sample(self, call: Callable[[], object], calls: int) -> float:
        self.running: list[str] = []
        call()
        (name,) = self.running
        self.taken.append((name, calls))
        return self.seconds[name] * (1 + self.drift * len(self.taken))


def timed(clock: FakeClock, **named: float) -> dict[str, Timing]:
    calls = {name: clock.call(name) for name in clock.seconds}
    return interleave(calls, clock, rounds=9, sample_seconds=named.get("sample_seconds", 1.0))


def test_medians_and_rounds() -> None:
    found = timed(FakeClock({"a": 0.1, "b": 0.3}))
    assert found["a"].median == pytest.approx(0.1)
    assert found["b"].median == pytest.approx(0.3)
    assert found["a"].rounds == 9


def test_every_variant_once_a_round_in_changing_order() -> None:
    clock = FakeClock({"a": 0.1, "b": 0.1, "c": 0.1})
    timed(clock)
    rounds = [name for name, _ in clock.taken[9:]]  # warm-up: three samples of each
    triples = [tuple(rounds[i : i + 3]) for i in range(0, len(rounds), 3)]
    assert len(triples) == 9
    assert all(sorted(triple) == ["a", "b", "c"] for triple in triples)
    assert len(set(triples)) > 2


def test_drift_hits_all_variants_alike() -> None:
    found = timed(FakeClock({"a": 0.1, "b": 0.2}, drift=0.05))
    assert found["b"].median / found["a"].median == pytest.approx(2.0, rel=0.05)


def test_samples_last_about_as_long_for_fast_and_slow() -> None:
    clock = FakeClock({"fast": 0.01, "slow": 3.0})
    timed(clock)
    assert clock.taken[-1][1] != clock.taken[-2][1]
    assert {calls for name, calls in clock.taken[6:] if name == "fast"} == {100}
    assert {calls for name, calls in clock.taken[6:] if name == "slow"} == {1}


def test_calls_are_bounded() -> None:
    clock = FakeClock({"nothing": 1e-12})
    timed(clock)
    assert clock.taken[-1][1] == MOST_CALLS


def test_quartiles() -> None:
    found = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_of_one_launch() -> None:
    found = per_launch({"a": Timing(20.0, 10.0, 40.0, 7)}, 20)
    assert found == {"a": Timing(1.0, 0.5, 2.0, 7)}


def test_buffers_exceed_the_cache() -> None:
    l2 = 60 << 20
    for size in (1 << 20, 10 << 20, 29 << 20):
        count = buffers_for(size, l2)
        assert count * size >= 3 * l2 or count == 24
    assert buffers_for(10**9, l2) == 2
