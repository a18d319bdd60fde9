"""Time engines with and without their own profiler: duration of a run, and of each part of the model.

Each round runs every engine twice in turn, plain and with its profiler. Disturbances then affect all of them alike, and
the profiler's times can be compared with a plain run of the same round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import vp_engines
from vp_engines.backends.recording import RecordedRun
from vp_engines.errors import InputError
from vp_exporter.profiling.groups import GROUPS, RUNTIME, assign
from vp_exporter.profiling.memory import Memory, measure_memory
from vp_exporter.utils.progress import SILENT, Progress
from vp_exporter.validation.baseline import check_runs_alike
from vp_exporter.validation.finite import FiniteWatch
from vp_exporter.validation.intervals import Interval, bootstrap_ratio_of_medians
from vp_exporter.validation.latency import MIN_ROUNDS, Timing, time_rounds, timing, warm_up

# Profilers keep events in memory; ONNX Runtime's stops at a million.
MAX_ROUNDS = 500
MOST_SCALE = 1.2  # above it, profiled and plain runs are not comparable


@dataclass(frozen=True)
class Subject:
    """An engine to profile: bundle, variant and label."""

    label: str
    bundle: Path
    variant: Literal["reduced", "dense"]


@dataclass(frozen=True)
class OperationTime:
    """One operation of the engine: median milliseconds over the runs, part of the model, and block, if any."""

    name: str
    kind: str
    group: str
    block: int | None
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """Profile of one engine at one batch size.

    Attributes:
        label: Label of the subject; batch: images per run; rounds: runs of each kind.
        timing: Timing of whole runs without the profiler, from host array to host array.
        groups: Milliseconds by part of the model, medians over the profiled runs; has all of GROUPS.
        covered: Sum of the groups as a share of the median run without the profiler.
        slowdown: Median run with the profiler divided by the median without it.
        profiler_ms: Overhead subtracted from each operation, see `_Series`; 0 if the profiler does not time whole runs.
        scale: Factor applied to every operation after that, see `_Series`; 1 if the profiler does not time whole runs.
        operations: In execution order.
        typical: The profiled run of median duration, for a trace.
    """

    label: str
    batch: int
    rounds: int
    timing: Timing
    groups: dict[str, float]
    covered: float
    slowdown: float
    profiler_ms: float
    scale: float
    operations: tuple[OperationTime, ...]
    typical: RecordedRun

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values, without the trace."""
        data = asdict(self)
        del data["typical"]
        return data


@dataclass(frozen=True)
class Profiled:
    """Result of profiling.

    Attributes:
        profiles: For each batch size, every subject in order.
        speedups: By batch size, the last subject over the first, with its interval; empty for a single subject.
        memory: By label; None if it could not be measured.
        notes: One line each.
        nonfinite: By label, the number of images with NaN or infinite outputs, over all batch sizes.
    """

    profiles: tuple[Profile, ...]
    speedups: dict[int, Interval]
    memory: dict[str, Memory | None]
    notes: tuple[str, ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether all outputs were finite; otherwise the times are meaningless."""
        return not any(self.nonfinite.values())

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values: profile.json."""
        return {
            "profiles": [profile.to_dict() for profile in self.profiles],
            "speedups": [{"batch": batch, **asdict(found)} for batch, found in self.speedups.items()],
            "memory": {label: asdict(memory) if memory else None for label, memory in self.memory.items()},
            "notes": list(self.notes),
            "nonfinite": self.nonfinite,
        }


def profile(
    subjects: Sequence[Subject],
    *,
    batches: Sequence[int] = (1, 8),
    seconds: float = 4.0,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    memory: bool = True,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Profiled:
    """Profile engines side by side.

    Args:
        subjects: One or more of the same input size; the last is compared with the first.
        batches: Batch sizes, without duplicates.
        seconds: Work per batch size for all engines together (20 to 500 rounds).
        threads, device: Of every engine.
        memory: Also run each engine in a separate process to measure its memory.
        seed: Seed of the images and of the order.

    Raises:
        InputError: if an engine was not built for a batch size, image sizes differ, or batch sizes are duplicated.
        EngineUnavailableError: if an engine cannot run here, or has no profiler.
        BundleError: if a bundle is not valid, or two cannot be run side by side.
    """
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise InputError(f"batch sizes {list(batches)}", expected="distinct whole numbers from 1")
    notes, bad = _check_pair(subjects, batches, device), dict.fromkeys((each.label for each in subjects), 0)
    with contextlib.ExitStack() as stack:
        with progress.stage("loading the engines"):
            pairs = [
                [
                    stack.enter_context(
                        vp_engines.load(each.bundle, variant=each.variant, threads=threads, device=device, profile=on)
                    )
                    for on in (False, True)
                ]
                for each in subjects
            ]
        shape = tuple(int(size) for size in pairs[0][0].inputs[0].shape[1:])
        counts, taken = [], []
        for batch in progress.track(batches, total=len(batches), description="timing and profiling"):
            images = np.random.default_rng(seed).standard_normal((batch, *shape), dtype=np.float32)
            engines = [_Counted(engine) for pair in pairs for engine in pair]
            outputs = FiniteWatch(len(engines), batch)
            per_round = warm_up(engines, images, outputs)
            rounds = int(np.clip(seconds / per_round, MIN_ROUNDS, MAX_ROUNDS))
            warm = engines[0].calls
            taken.append(time_rounds(engines, images, rounds, seed, outputs).astype(np.float64) / 1e6)
            counts.append((warm, rounds))
            for i, subject in enumerate(subjects):
                bad[subject.label] += max(outputs.counts()[2 * i : 2 * i + 2])
        recorded = [pair[1].recorded() for pair in pairs]
    series, speedups = [], {}
    for at, batch in enumerate(batches):
        before = sum(warm + rounds for warm, rounds in counts[:at])
        warm, rounds = counts[at]
        for i, subject in enumerate(subjects):
            runs = recorded[i][before + warm : before + warm + rounds]
            series.append(_Series(subject.label, batch, runs, taken[at][:, 2 * i : 2 * i + 2]))
        if len(subjects) > 1:
            speedups[batch] = bootstrap_ratio_of_medians(taken[at][:, 0], taken[at][:, -2], seed=seed)
    # The series with the shortest operations shows the overhead per operation most clearly. No operation can have taken
    # less than what is subtracted from it.
    precise = min(series, key=lambda each: each.milliseconds_per_operation())
    cost = min(precise.excess(), *(each.shortest() for each in series))
    profiles = [each.profile(cost) for each in series]
    found: dict[str, Memory | None] = {}
    if memory:
        for subject in progress.track(subjects, total=len(subjects), description="memory, in processes of their own"):
            found[subject.label] = measure_memory(
                subject.bundle, subject.variant, batches, threads=threads, device=device
            )
    for each in profiles:
        if not 0.9 <= each.covered <= 1.1:
            notes.append(
                f"{each.label}, batch {each.batch}: the parts are {100 * each.covered:.0f}% of the run; the engine's "
                "profiler does not see the rest, or slows it down: read the shares, not the milliseconds"
            )
    broken = [f"{label} on {count} of {sum(batches)} images" for label, count in bad.items() if count]
    if broken:
        both = " (both: the model itself, at this precision)" if len(broken) == len(subjects) > 1 else ""
        notes.append(f"NaN or infinite outputs: {', '.join(broken)}{both}; these times count for nothing")
    return Profiled(tuple(profiles), speedups, found, tuple(notes), bad)


class _Counted:
    """Wraps an engine to count its runs, so that the profiler's runs can be matched by number."""

    def __init__(self, engine: vp_engines.Engine) -> None:
        self.engine, self.calls = engine, 0

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        return self.engine.run(images)


def _check_pair(subjects: Sequence[Subject], batches: Sequence[int], device: str | None) -> list[str]:
    """Check that subjects can run side by side, before loading them; returns notes, one line each."""
    manifests = [vp_engines.read_manifest(each.bundle) for each in subjects]
    for subject, manifest in zip(subjects, manifests, strict=True):
        check_runs_alike(subjects[0].label, manifests[0], subject.label, manifest, device=device)
        sizes = manifest.engine.batch
        for batch in batches:
            if sizes is not None and not sizes.min <= batch <= sizes.max:
                raise InputError(
                    f"`batch_sizes={batch}` with {subject.label}",
                    expected=f"{sizes.min} to {sizes.max}, which its engine was built for",
                )
    engines = [f"{each.engine.name} {each.engine.precision}" for each in manifests]
    if len(set(engines)) > 1:
        named = ", ".join(f"{each.label} is {engine}" for each, engine in zip(subjects, engines, strict=True))
        return [f"{named}: what differs is not the work saved alone"]
    return []


class _Series:
    """Runs of one engine at one batch size.

    If a profiler times whole runs, it costs every operation about the same, partly within the operation's own time and
    partly before the next. So an operation is taken to last until the start of the next one, and the overhead is
    subtracted from each: the difference between runs with and without the profiler, per operation. (ONNX Runtime 1.31,
    digits ViT: 17 us over the 94 operations of the dense model, 15 us over the 333 of a merging one.) At larger batches
    it is higher for multi-threaded operations, 14 to 23 us over those 94 at batch 8; the remaining difference is
    removed in proportion to each operation's time (`scale`). If a profiler does not time whole runs, the part of a
    plain run that its operations do not cover is attributed to the runtime.

    Args:
        runs: Profile of each round's run.
        taken: float [rounds, 2], milliseconds of a run without and with the profiler.
    """

    def __init__(self, label: str, batch: int, runs: Sequence[RecordedRun], taken: np.ndarray) -> None:
        self.label, self.batch, self.taken = label, batch, taken
        self.runs = _alike(runs)
        self.shape = self.runs[0].operations if self.runs else ()
        self.spent = np.array([_spent(run) for run in self.runs]).reshape(len(self.runs), len(self.shape))
        self.timed = bool(self.shape) and all(run.duration is not None for run in self.runs)

    def milliseconds_per_operation(self) -> float:
        """Milliseconds per operation in the runs without the profiler."""
        return float(np.median(self.taken[:, 0])) / max(1, len(self.shape))

    def shortest(self) -> float:
        """Median milliseconds of the shortest operation; infinite if there is none."""
        return float(np.median(self.spent, axis=0).min()) if self.spent.size else float("inf")

    def excess(self) -> float:
        """Overhead of the profiler in milliseconds per operation; 0 if it does not time whole runs."""
        if not self.timed:
            return 0.0
        whole = float(np.median([run.duration for run in self.runs])) / 1000
        return max(0.0, whole - float(np.median(self.taken[:, 0]))) / len(self.shape)

    def scale(self, cost: float) -> float:
        """Ratio of a run without the profiler to one with it, after subtracting `cost` from each operation.

        1 if the two are too far apart for a correction.
        """
        plain = float(np.median(self.taken[:, 0]))
        if self.timed:
            seen = float(np.median([run.duration for run in self.runs])) / 1000 - cost * len(self.shape)
        else:  # covering less than a whole run is not an overhead of the profiler
            seen = max(plain, float(np.median(self.spent.sum(axis=1))) if self.runs else 0.0)
        found = plain / max(seen, 1e-9)
        return found if 1 / MOST_SCALE <= found <= MOST_SCALE else 1.0

    def profile(self, cost: float) -> Profile:
        """Summarise, with `cost` milliseconds subtracted from each operation and the rest scaled to the plain runs."""
        plain, slowed = (float(value) for value in np.median(self.taken, axis=0))
        places, spent = assign(self.shape), self.spent
        cost, scale = cost if self.timed else 0.0, self.scale(cost)
        groups = dict.fromkeys(GROUPS, 0.0)
        for group in GROUPS:
            inside = [i for i, (found, _) in enumerate(places) if found == group]
            if inside:
                taken = float(np.median(spent[:, inside].sum(axis=1))) - cost * len(inside)
                groups[group] = max(0.0, taken) * scale
        if self.timed:
            groups[RUNTIME] = float(np.median([run.operations[0].start / 1000 for run in self.runs])) * scale
        elif self.shape:
            groups[RUNTIME] = max(0.0, plain - sum(groups.values()))
        middle = np.maximum(0.0, np.median(spent, axis=0) - cost) * scale if self.runs else []
        order = np.argsort(spent.sum(axis=1))
        return Profile(
            label=self.label,
            batch=self.batch,
            rounds=len(self.taken),
            timing=timing(self.taken[:, 0], self.batch),
            groups=groups,
            covered=sum(groups.values()) / plain,
            slowdown=slowed / plain,
            profiler_ms=cost,
            scale=scale,
            operations=tuple(
                OperationTime(each.name, each.kind, group, block, float(value))
                for each, (group, block), value in zip(self.shape, places, middle, strict=True)
            ),
            typical=self.runs[int(order[len(order) // 2])] if self.runs else RecordedRun(()),
        )


def _spent(run: RecordedRun) -> list[float]:
    """Milliseconds of each operation: until the start of the next one if whole runs are timed, else its own."""
    if run.duration is None:
        return [each.duration / 1000 for each in run.operations]
    ends = [each.start for each in run.operations[1:]] + [run.duration]
    return [(end - each.start) / 1000 for each, end in zip(run.operations, ends, strict=True)]


def _alike(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Runs with the most common sequence of operations: profilers occasionally lose an event."""
    seen: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in runs:
        seen.setdefault(tuple(each.name for each in run.operations), []).append(run)
    return max(seen.values(), key=len, default=[])
