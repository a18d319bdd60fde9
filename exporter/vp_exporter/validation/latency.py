"""Latency of the dense and the reduced engine: interleaved runs, an interval for the speed-up, a noise floor.

Each timing is one `run`, from host array to host array. On a GPU it includes copies and synchronisation, as in an
application that embeds the engine.
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
    """Milliseconds per batch, and images per second at the median."""

    median_ms: float
    mean_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float


@dataclass(frozen=True)
class LatencyRow:
    """Latency of the dense and the reduced engine at one batch size.

    "Dense" stands for the baseline, which may also be another bundle (`Baseline`).

    Attributes:
        batch: Images per run.
        rounds: Timed runs of each engine.
        speedup: Median dense time over median reduced time, with a bootstrap interval over paired rounds.
        noise: Largest apparent speed-up of the dense engine over itself, minus 1 (see `noise_floor`).
        mac_ratio: Multiply-accumulates of dense over reduced; None if not given.
        efficiency: Speed-up over MAC ratio: 1.0 if time drops in proportion to multiply-accumulates; None if it may not
            be stated.
        claim: Whether a speed-up may be claimed: the lower end of the interval is above 1 + noise, and all outputs are
            finite. The interval alone is not enough: it covers the spread of these timings, while `noise` also covers
            differences that this machine shows between equal engines.
        nonfinite_dense, nonfinite_reduced: Images of the batch with a NaN or an infinity in any output of any run.
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
        """Whether all outputs of both engines were finite; otherwise the times are meaningless."""
        return not (self.nonfinite_dense or self.nonfinite_reduced)

    @property
    def outcome(self) -> Literal["faster", "slower", "within noise", "not finite"]:
        if not self.finite:
            return "not finite"
        if self.claim:
            return "faster"
        return "slower" if self.speedup.high < 1 / (1 + self.noise) else "within noise"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; the interval becomes {"value", "low", "high"}."""
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

    Each round runs both engines once in random order, so that clock drift, heat and cache effects affect both equally.
    Garbage collection is disabled while timing.

    Args:
        image_shape: (3, height, width).
        batches: Distinct batch sizes.
        rounds: Timed runs of each engine per batch size; None for as many as fill `min_seconds` (20 to 5000).
        min_seconds: Seconds of timed work per batch size, both engines together, if `rounds` is None.
        macs_dense, macs_reduced: Multiply-accumulates per image; both are needed for the efficiency.
        seed: Seed of the images, the order and the bootstrap.
        baseline: Description of `dense`; determines whether efficiency may be stated.

    Raises:
        DataError: if a batch size or the number of rounds is out of range.
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
    """Run an engine once per batch size on the images that `compare` uses, and count those without finite outputs.

    Used for bundles without a baseline.
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
    """Summarise raw timings.

    Args:
        nanoseconds: [rounds, 2], dense and reduced.
        nonfinite: Number of images with nonfinite outputs, dense and reduced.
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
    """Largest apparent speed-up of the dense engine over itself on this machine.

    Splits the dense runs into two interleaved halves and takes the ratio of their medians, as for two engines:
    max(ratio, 1/ratio) - 1. Returns the largest value over splits that alternate every 1, 2, 4 and 8 runs: the halves
    of a single split may agree by chance, and longer alternation reveals disturbances that last a few runs.

    Args:
        dense: float [rounds], positive, in the order of the runs.
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
    """Describe the machine and software, for comparison with other machines. Contains no host name, user or path.

    Args:
        engine, engine_version, device: Engine that was run, and its device; for a GPU, the name of the GPU.
        threads: Threads per run; None for the engine's own choice.
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
    """Summarise one engine's runs, float [rounds]."""
    median, p90, p99 = (float(value) for value in np.quantile(milliseconds, [0.5, 0.9, 0.99]))
    return Timing(median, float(milliseconds.mean()), p90, p99, 1000 * batch / median)


Watch = Callable[[int, Mapping[str, np.ndarray]], None]


def warm_up(runners: Sequence[RunnerLike], images: np.ndarray, watch: Watch | None = None) -> float:
    """Run all engines until caches, clocks and lazy allocations have settled. Returns seconds of the fastest round.

    Args:
        watch: Called with every output and the index of its engine.
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
    """Time rounds that run each engine once, in random order. Returns nanoseconds, int64 [rounds, runners].

    Args:
        watch: Called with every output and the index of its engine, outside the timed section.
    """
    runs, count = [runner.run for runner in runners], len(runners)
    # Shuffled, but balanced: each engine starts equally many rounds.
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
    return np.maximum(taken, 1)  # a coarse clock may return 0, which ratios cannot use


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
