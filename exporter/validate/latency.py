"""Dense against reduced on the clock: interleaved runs, an interval for the speed-up, and the noise that it must clear.

What is timed is one `run`: host array in, host array out, so on a GPU the copies and the wait are in it, as they are
for whoever embeds the engine.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vp_exporter.errors import DataError
from vp_exporter.progress import SILENT, Progress
from vp_exporter.validate.accuracy import RunnerLike
from vp_exporter.validate.intervals import Interval, bootstrap_ratio_of_medians

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
    """Dense and reduced at one batch size.

    Attributes:
        batch: images per run.
        rounds: timed runs of each.
        speedup: median dense time over median reduced time, with the bootstrap interval over paired rounds.
        noise: the same statistic of the dense engine against itself, as its distance from 1 (see `noise_floor`).
        mac_ratio: multiply-accumulates of dense over reduced; None when not given.
        efficiency: speed-up over MAC ratio: 1.0 when every multiply-accumulate saved is time saved.
        claim: whether a speed-up may be claimed: the interval's lower end lies above 1 + noise. The interval alone is
            not enough: it only knows the spread of this run's timings, while `noise` also shows what this machine
            makes of two things that are equal.
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

    @property
    def outcome(self) -> Literal["faster", "slower", "within noise"]:
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

    Raises:
        DataError: a batch size or the number of rounds is out of range.
    """
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise DataError(f"batch sizes {list(batches)}", expected="distinct whole numbers from 1")
    if rounds is not None and rounds < MIN_ROUNDS:
        raise DataError(f"{rounds} timing rounds", expected=f"{MIN_ROUNDS} or more, below which no interval means much")
    ratio = macs_dense / macs_reduced if macs_dense and macs_reduced else None
    rows = []
    for batch in progress.track(batches, total=len(batches), description="timing against the dense model"):
        images = np.random.default_rng(seed).standard_normal((batch, *image_shape), dtype=np.float32)
        runners = (dense, reduced)
        per_round = warm_up(runners, images)
        count = rounds or int(np.clip(min_seconds / per_round, MIN_ROUNDS, MAX_ROUNDS))
        nanoseconds = time_rounds(runners, images, count, seed)
        rows.append(summarise(nanoseconds, batch=batch, mac_ratio=ratio, seed=seed))
    return rows


def summarise(nanoseconds: np.ndarray, *, batch: int, mac_ratio: float | None, seed: int = 0) -> LatencyRow:
    """The row for raw timings.

    Args:
        nanoseconds: [rounds, 2], dense and reduced.
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
        claim=speedup.low > 1 + noise,
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


def warm_up(runners: Sequence[RunnerLike], images: np.ndarray) -> float:
    """Run all until caches, clocks and lazy allocations have settled; seconds of the quickest round."""
    quickest, start, calls = float("inf"), time.perf_counter(), 0
    while calls < WARM_UP_CALLS or time.perf_counter() - start < WARM_UP_SECONDS:
        before = time.perf_counter()
        for runner in runners:
            runner.run(images)
        quickest = min(quickest, time.perf_counter() - before)
        calls += 1
    return max(quickest, 1e-9)


def time_rounds(runners: Sequence[RunnerLike], images: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """Nanoseconds, int64 [rounds, runners]; a round runs each of them once, in an order drawn anew."""
    runs, count = [runner.run for runner in runners], len(runners)
    # As many rounds start with each, shuffled: none has the better place more often.
    first = np.random.default_rng(seed).permutation(np.arange(rounds) % count)
    taken = np.empty((rounds, count), np.int64)
    with _without_gc():
        for i in range(rounds):
            for turn in range(count):
                which = (int(first[i]) + turn) % count
                start = time.perf_counter_ns()
                runs[which](images)
                taken[i, which] = time.perf_counter_ns() - start
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
