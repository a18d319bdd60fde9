import gc
import json
import platform
import socket
from pathlib import Path

import numpy as np
import pytest

from vp_engines.backends.base import Runner, TensorSpec
from vp_exporter.errors import DataError
from vp_exporter.validation import latency
from vp_exporter.validation.finite import nonfinite_rows
from vp_exporter.validation.latency import compare, environment, noise_floor, probe, summarise

SHAPE = (3, 4, 4)


class Clock:
    """Fake `time` for timed runs: advances by the duration of runs, not by other load on the machine."""

    now = 0

    def perf_counter_ns(self):
        return self.now

    def perf_counter(self):
        return self.now / 1e9


CLOCK = Clock()


class Slow(Runner):
    """Takes `seconds` (plus a microsecond) per run, and records its inputs."""

    def __init__(self, seconds, log=None, name=""):
        super().__init__((TensorSpec("images", "float32", ("batch", *SHAPE)),), ())
        self.seconds, self.log, self.name, self.seen = seconds, log if log is not None else [], name, []

    def _run(self, images):
        self.log.append((self.name, gc.isenabled()))
        self.seen.append(images)
        CLOCK.now += round(self.seconds * 1e9) + 1000
        return {"logits": images.reshape(len(images), -1)[:, :2]}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(latency, "time", CLOCK)


def nanoseconds(dense_ms, reduced_ms):
    return (np.stack([dense_ms, reduced_ms], axis=1) * 1e6).astype(np.int64)


@pytest.mark.usefixtures("quick")
def test_a_plain_difference_is_found():
    rows = compare(
        Slow(0.02), Slow(0.005), image_shape=SHAPE, batches=(1, 2), rounds=20, macs_dense=400, macs_reduced=200
    )
    assert [row.batch for row in rows] == [1, 2]
    for row in rows:
        assert row.speedup.value == pytest.approx(4, rel=1e-3)
        assert row.speedup.low <= row.speedup.value <= row.speedup.high
        assert row.rounds == 20
        assert row.mac_ratio == 2
        assert row.efficiency == pytest.approx(row.speedup.value / 2)
        for timing in (row.dense, row.reduced):
            assert timing.median_ms <= timing.p90_ms <= timing.p99_ms
            assert timing.images_per_second == pytest.approx(1000 * row.batch / timing.median_ms)
        assert row.dense.median_ms >= 20
        json.dumps(row.to_dict(), allow_nan=False)


@pytest.mark.usefixtures("quick")
def test_runs_alternate_on_the_same_data_without_gc():
    log = []
    dense, reduced = Slow(0, log, "dense"), Slow(0, log, "reduced")
    assert gc.isenabled()
    compare(dense, reduced, image_shape=SHAPE, batches=(3,), rounds=40)
    assert gc.isenabled()
    names = [name for name, _ in log[-80:]]
    assert all(set(names[i : i + 2]) == {"dense", "reduced"} for i in range(0, 80, 2))  # each round has both
    assert names[::2].count("dense") == 20  # each goes first equally often
    assert names[::2] != ["dense", "reduced"] * 20  # but not in a fixed pattern
    assert not any(on for _, on in log[-80:])
    assert dense.seen[0].shape == (3, *SHAPE)
    assert abs(float(dense.seen[0].mean())) < 0.5 < float(dense.seen[0].std())
    assert all(np.array_equal(images, dense.seen[0]) for images in dense.seen + reduced.seen)


@pytest.mark.usefixtures("quick")
def test_gc_is_restored_after_an_error():
    class Broken(Slow):
        def _run(self, images):
            if len(self.seen) > 5:
                raise RuntimeError("out of memory")
            return super()._run(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        compare(Slow(0), Broken(0), image_shape=SHAPE, batches=(1,), rounds=20)
    assert gc.isenabled()


@pytest.mark.usefixtures("quick")
def test_rounds_fill_the_time():
    row = compare(Slow(0.001), Slow(0.001), image_shape=SHAPE, batches=(1,), min_seconds=0.1)[0]
    assert latency.MIN_ROUNDS <= row.rounds <= 50  # at least 2 ms per round
    assert (row.mac_ratio, row.efficiency) == (None, None)


@pytest.mark.parametrize("batches", [(), (0,), (1, 1), (-2, 4)])
def test_bad_batches(batches):
    with pytest.raises(DataError, match="batch sizes"):
        compare(Slow(0), Slow(0), image_shape=SHAPE, batches=batches)


def test_too_few_rounds():
    with pytest.raises(DataError, match="3 timing rounds"):
        compare(Slow(0), Slow(0), image_shape=SHAPE, rounds=3)


def test_figures_by_hand():
    dense = np.arange(1, 102, dtype=float)  # median 51, p90 91, p99 100
    row = summarise(nanoseconds(dense, np.full(101, 17.0)), batch=4, mac_ratio=1.5)
    assert (row.dense.median_ms, row.dense.mean_ms, row.dense.p90_ms, row.dense.p99_ms) == (51, 51, 91, 100)
    assert row.speedup.value == 3
    assert row.efficiency == 2
    assert row.reduced.images_per_second == pytest.approx(4000 / 17)


def test_no_claim_between_equals():
    """Between equal engines with 5% noise and drift, claims are rare."""
    rng, claims, slower = np.random.default_rng(0), 0, 0
    for i in range(100):
        drift = 1 + 0.1 * np.sin(np.arange(60) / 9 + i)
        pair = [10 * drift * (1 + 0.05 * rng.standard_exponential(60)) for _ in range(2)]
        row = summarise(nanoseconds(*pair), batch=1, mac_ratio=None)
        claims += row.claim
        slower += row.outcome == "slower"
    assert claims <= 3
    assert slower <= 3


def test_real_differences_are_claimed():
    rng = np.random.default_rng(0)
    for i in range(20):
        drift = 1 + 0.1 * np.sin(np.arange(200) / 9 + i)
        dense, reduced = (scale * drift * (1 + 0.05 * rng.standard_exponential(200)) for scale in (12.0, 10.0))
        assert summarise(nanoseconds(dense, reduced), batch=1, mac_ratio=None).outcome == "faster"
        back = summarise(nanoseconds(reduced, dense), batch=1, mac_ratio=None)
        assert (back.outcome, back.claim) == ("slower", False)


def test_noise_bars_a_claim_that_the_interval_would_allow():
    # The dense engine alternates between two speeds every four rounds: it is 30% faster than itself.
    dense = np.where(np.arange(160) // 4 % 2 == 0, 10.0, 13.0)
    assert noise_floor(dense) == pytest.approx(0.3)
    dense = dense + np.linspace(0, 0.01, 160)
    row = summarise(nanoseconds(dense, np.full(160, 9.5)), batch=1, mac_ratio=None)
    assert row.noise > 0.29
    assert not row.claim
    assert row.outcome == "within noise"


def test_noise_floor_of_a_steady_engine_is_nothing():
    assert noise_floor(np.full(50, 7.0)) == 0
    assert noise_floor(np.array([10.0, 11.0] * 20)) == pytest.approx(0.1)  # every second round is slower
    assert 0 < noise_floor(np.random.default_rng(0).normal(10, 0.5, 400)) < 0.05


def test_same_timings_same_row():
    pair = nanoseconds(np.linspace(9, 11, 50), np.linspace(7, 6, 50))
    assert summarise(pair, batch=1, mac_ratio=None) == summarise(pair, batch=1, mac_ratio=None)


def test_environment_names_the_machine_but_not_its_owner():
    facts = environment(engine="ort", engine_version="1.30.0", threads=2)
    assert facts["engine"] == "ort 1.30.0"
    assert facts["threads"] == 2
    assert facts["python"] == platform.python_version()
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert facts["date"].endswith("+00:00")
    text = json.dumps(facts)
    assert str(Path.home()) not in text.replace('"/"', "")
    assert str(Path.cwd()) not in text
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4


class Poisoned(Slow):
    """Finite outputs except for one run, one output and some images."""

    def __init__(self, poison, image=1, run=0, output="logits"):
        super().__init__(0)
        self.poison, self.image, self.bad_run, self.output = poison, image, run, output

    def _run(self, images):
        values = images.reshape(len(images), -1)
        outputs = {"logits": values[:, :2].copy(), "features": values.copy()}
        if len(self.seen) == self.bad_run and self.image < len(images):
            outputs[self.output][self.image, -1] = self.poison
        self.seen.append(images)
        return outputs


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("poison", "run", "output"),  # the first run, another of the warm-up, one that is timed, the last
    [(np.nan, 0, "logits"), (np.inf, 2, "features"), (-np.inf, 12, "logits"), (np.nan, 21, "features")],
)
def test_every_output_that_is_timed_is_looked_at(poison, run, output):
    good, bad = Slow(0.002), Poisoned(poison, run=run, output=output)
    (row,) = compare(good, bad, image_shape=SHAPE, batches=(3,), rounds=20, macs_dense=400, macs_reduced=200)
    assert len(bad.seen) >= 22
    assert (row.nonfinite_dense, row.nonfinite_reduced) == (0, 1)
    assert (row.finite, row.claim, row.outcome, row.efficiency) == (False, False, "not finite", None)
    (row,) = compare(
        Poisoned(poison, run=run, output=output), good, image_shape=SHAPE, batches=(3,), rounds=20,
    )  # fmt: skip
    assert (row.nonfinite_dense, row.nonfinite_reduced, row.outcome) == (1, 0, "not finite")


@pytest.mark.usefixtures("quick")
def test_finite_outputs_are_not_doubted():
    rows = compare(Slow(0.001), Slow(0), image_shape=SHAPE, batches=(1, 2), rounds=20)
    assert [(row.nonfinite_dense, row.nonfinite_reduced) for row in rows] == [(0, 0)] * 2


def test_an_output_that_is_not_by_image_spoils_all():
    assert nonfinite_rows({"a": np.ones((3, 2)), "scale": np.array([np.inf])}, 3).tolist() == [True] * 3
    assert nonfinite_rows({"scale": np.array(np.nan)}, 2).tolist() == [True] * 2
    assert nonfinite_rows({"a": np.ones((3, 2, 2)), "ids": np.arange(3)}, 3).tolist() == [False] * 3


def test_an_engine_alone():
    assert probe(Poisoned(np.nan, run=1), image_shape=SHAPE, batches=(1, 2)) == 1
    assert probe(Slow(0), image_shape=SHAPE, batches=(1, 2)) == 0
