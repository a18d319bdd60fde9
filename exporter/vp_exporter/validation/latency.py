"""Dense against reduced on the clock: interleaved runs, an interval for the speed-up, and the noise that it must clear.

What is timed is one `run`: host array in, host array out, so on a GPU the copies and the wait are in it, as they are
for whoever embeds the engine.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vp_exporter.errors import DataError
from vp_exporter.utils.progress import SILENT, Progress
from vp_exporter.validation.accuracy import RunnerLike
from vp_exporter.validation.baseline import DENSE, Baseline
from vp_exporter.validation.finite import FiniteWatch, nonfinite_rows
from vp_exporter.validation.intervals import Interval, bootstrap_ratio_of_medians

MIN_ROUNDS = 20
MAX_ROUNDS = 5000
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one batch, and images per second at the median."""

    median_ms: float
    mean_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float


@dataclass(frozen=True)
class LatencyRow:
    """Dense and reduced at one batch size. "Dense" is the baseline, whatever it is (`Baseline`).

    Attributes:
        batch: images per run.
        rounds: timed runs of each.
        speedup: median dense time over median reduced time, with the bootstrap interval over paired rounds.
        noise: the same statistic of the dense engine against itself, as its distance from 1 (see `noise_floor`).
        mac_ratio: multiply-accumulates of dense over reduced; None when not given.
        efficiency: speed-up over MAC ratio: 1.0 when every multiply-accumulate saved is time saved; None where it may
            not be stated.
        claim: whether a speed-up may be claimed: the interval's lower end lies above 1 + noise. The interval alone is
            not enough: it only knows the spread of this run's timings, while `noise` also shows what this machine
            makes of two things that are equal. Never where an output is not finite.
        nonfinite_dense, nonfinite_reduced: images of the batch for which any output held a NaN or an infinity in any
            of the runs.
    """

    batch: int
    rounds: int
    dense: Timing
    reduced: Timing
    speedup: Interval
    noise: float
    mac_ratio: float | None
    efficiency: float | None
    claim: bool
    nonfinite_dense: int = 0
    nonfinite_reduced: int = 0

    @property
    def finite(self) -> bool:
        """Whether every output of both engines was a finite number: without that, no time means anything."""
        return not (self.nonfinite_dense or self.nonfinite_reduced)

    @property
    def outcome(self) -> Literal["faster", "slower", "within noise", "not finite"]:
        if not self.finite:
            return "not finite"
        if self.claim:
            return "faster"
        return "slower" if self.speedup.high < 1 / (1 + self.noise) else "within noise"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the interval as {"value", "low", "high"}."""
        return {**asdict(self), "outcome": self.outcome}


def compare(
    dense: RunnerLike,
    reduced: RunnerLike,
    *,
    image_shape: tuple[int, int, int],
    batches: Sequence[int] = (1, 8),
    rounds: int | None = None,
    min_seconds: float = 2.0,
    macs_dense: float | None = None,
    macs_reduced: float | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    baseline: Baseline = DENSE,
) -> list[LatencyRow]:
    """Time both engines on the same random images.

    Each round runs both once, in an order drawn anew, so that drift of clock and heat, and whatever the one leaves in
    the caches, meet both alike. Garbage collection is off while the clock runs.

    Args:
        image_shape: (3, height, width).
        batches: batch sizes, each once.
        rounds: timed runs of each engine per batch size; None takes as many as fill `min_seconds` (20 to 5000).
        min_seconds: seconds of timed work per batch size, both engines together, when `rounds` is None.
        macs_dense, macs_reduced: multiply-accumulates per image; without both there is no efficiency.
        seed: of the images, of the order and of the bootstrap.
        baseline: what `dense` is; decides whether efficiency may be stated.

    Raises:
        DataError: a batch size or the number of rounds is out of range.
    """
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise DataError(f"batch sizes {list(batches)}", expected="distinct whole numbers from 1")
    if rounds is not None and rounds < MIN_ROUNDS:
        raise DataError(f"{rounds} timing rounds", expected=f"{MIN_ROUNDS} or more, below which no interval means much")
    ratio = macs_dense / macs_reduced if macs_dense and macs_reduced else None
    rows = []
    for batch in progress.track(batches, total=len(batches), description=f"timing against {baseline.name}"):
        images = np.random.default_rng(seed).standard_normal((batch, *image_shape), dtype=np.float32)
        runners, outputs = (dense, reduced), FiniteWatch(2, batch)
        per_round = warm_up(runners, images, outputs)
        count = rounds or int(np.clip(min_seconds / per_round, MIN_ROUNDS, MAX_ROUNDS))
        nanoseconds = time_rounds(runners, images, count, seed, outputs)
        row = summarise(nanoseconds, batch=batch, mac_ratio=ratio, seed=seed, nonfinite=outputs.counts())
        rows.append(row if baseline.efficient and row.finite else replace(row, efficiency=None))
    return rows


def probe(runner: RunnerLike, *, image_shape: tuple[int, int, int], batches: Sequence[int], seed: int = 0) -> int:
    """Run an engine once at each batch size on the images that `compare` times, and count those without finite outputs.

    For a bundle that holds nothing to be timed against.
    """
    bad = 0
    for batch in batches:
        images = np.random.default_rng(seed).standard_normal((batch, *image_shape), dtype=np.float32)
        bad += int(nonfinite_rows(runner.run(images), batch).sum())
    return bad


def summarise(
    nanoseconds: np.ndarray,
    *,
    batch: int,
    mac_ratio: float | None,
    seed: int = 0,
    nonfinite: Sequence[int] = (0, 0),
) -> LatencyRow:
    """The row for raw timings.

    Args:
        nanoseconds: [rounds, 2], dense and reduced.
        nonfinite: images whose outputs were not finite, dense and reduced.
    """
    milliseconds = nanoseconds.astype(np.float64) / 1e6
    dense, reduced = milliseconds[:, 0], milliseconds[:, 1]
    speedup = bootstrap_ratio_of_medians(dense, reduced, seed=seed)
    noise = noise_floor(dense)
    return LatencyRow(
        batch=batch,
        rounds=len(dense),
        dense=timing(dense, batch),
        reduced=timing(reduced, batch),
        speedup=speedup,
        noise=noise,
        mac_ratio=mac_ratio,
        efficiency=speedup.value / mac_ratio if mac_ratio else None,
        claim=speedup.low > 1 + noise and not any(nonfinite),
        nonfinite_dense=nonfinite[0],
        nonfinite_reduced=nonfinite[1],
    )


def noise_floor(dense: np.ndarray) -> float:
    """The speed-up that this machine shows between the dense engine and itself.

    The dense runs are split into two interleaved halves, and the ratio of their medians is taken as if they were two
    engines: max(ratio, 1/ratio) - 1. One split can be lucky, so runs are dealt out by ones, twos, fours and eights,
    which also meets disturbances that last a few runs, and the largest counts.

    Args:
        dense: float [rounds], positive, in the order in which they ran.
    """
    worst = 0.0
    for deal in (1, 2, 4, 8):
        if len(dense) < 4 * deal and deal > 1:
            break
        half = (np.arange(len(dense)) // deal) % 2 == 0
        ratio = float(np.median(dense[half]) / np.median(dense[~half]))
        worst = max(worst, ratio - 1, 1 / ratio - 1)
    return worst


def environment(
    *, engine: str = "", engine_version: str = "", device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """Where the figures come from: what another machine must have to be compared. No host name, user or path.

    Args:
        engine, engine_version, device: of the engine that was run; for a GPU give `device` its name.
        threads: threads of one run; None is the engine's own choice.
    """
    return {
        "engine": f"{engine} {engine_version}".strip(),
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": "engine's choice" if threads is None else threads,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def timing(milliseconds: np.ndarray, batch: int) -> Timing:
    """The summary of one engine's runs, float [rounds]."""
    median, p90, p99 = (float(value) for value in np.quantile(milliseconds, [0.5, 0.9, 0.99]))
    return Timing(median, float(milliseconds.mean()), p90, p99, 1000 * batch / median)


Watch = Callable[[int, Mapping[str, np.ndarray]], None]


def warm_up(runners: Sequence[RunnerLike], images: np.ndarray, watch: Watch | None = None) -> float:
    """Run all until caches, clocks and lazy allocations have settled; seconds of the quickest round.

    Args:
        watch: is shown every output, with the number of its engine.
    """
    quickest, start, calls = float("inf"), time.perf_counter(), 0
    while calls < WARM_UP_CALLS or time.perf_counter() - start < WARM_UP_SECONDS:
        before = time.perf_counter()
        outputs = [runner.run(images) for runner in runners]
        quickest = min(quickest, time.perf_counter() - before)
        calls += 1
        for which, found in enumerate(outputs if watch is not None else ()):
            assert watch is not None
            watch(which, found)
    return max(quickest, 1e-9)


def time_rounds(
    runners: Sequence[RunnerLike], images: np.ndarray, rounds: int, seed: int, watch: Watch | None = None
) -> np.ndarray:
    """Nanoseconds, int64 [rounds, runners]; a round runs each of them once, in an order drawn anew.

    Args:
        watch: is shown every output, with the number of its engine, while the clock stands.
    """
    runs, count = [runner.run for runner in runners], len(runners)
    # As many rounds start with each, shuffled: none has the better place more often.
    first = np.random.default_rng(seed).permutation(np.arange(rounds) % count)
    taken = np.empty((rounds, count), np.int64)
    with _without_gc():
        for i in range(rounds):
            for turn in range(count):
                which = (int(first[i]) + turn) % count
                start = time.perf_counter_ns()
                outputs = runs[which](images)
                taken[i, which] = time.perf_counter_ns() - start
                if watch is not None:
                    watch(which, outputs)
    return np.maximum(taken, 1)  # a coarse clock may say 0, and ratios are taken


@contextmanager
def _without_gc() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
