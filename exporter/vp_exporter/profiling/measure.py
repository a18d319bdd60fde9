"""Engines on the clock and under their own profiler: how long a run takes, and which part of the model takes it.

Each round runs every engine twice, once as it is and once opened with its profiler, in turn: what the machine does
meanwhile meets all alike, so the profiler's times can be held to the run that they are of.
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

# Profilers keep everything in memory, and ONNX Runtime's stops at a million events.
MAX_ROUNDS = 500
MOST_SCALE = 1.2  # beyond it the profiled runs are not those that the clock saw


@dataclass(frozen=True)
class Subject:
    """An engine to profile: which variant of which bundle, and what to call it."""

    label: str
    bundle: Path
    variant: Literal["reduced", "dense"]


@dataclass(frozen=True)
class OperationTime:
    """One operation of the engine: median milliseconds over the runs, its part of the model, its block if any."""

    name: str
    kind: str
    group: str
    block: int | None
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """One engine at one batch size.

    Attributes:
        label: of the subject; batch: images per run; rounds: runs of each kind.
        timing: of whole runs without the profiler: host array in, host array out.
        groups: milliseconds by part of the model, medians over the profiled runs; all of GROUPS.
        covered: the groups' sum as a share of the median run without the profiler.
        slowdown: median run with the profiler over the median without it.
        profiler_ms: taken off each operation, see `_Series`; 0 where the engine's profiler does not time whole runs.
        scale: what every operation is multiplied by after that, see `_Series`; 1 where it does not.
        operations: in the order in which they run.
        typical: the profiled run whose time is the median one, for a trace.
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
        """Plain JSON values, without the trace."""
        data = asdict(self)
        del data["typical"]
        return data


@dataclass(frozen=True)
class Profiled:
    """All that was measured.

    Attributes:
        profiles: for each batch size every subject, in their order.
        speedups: by batch size, of the last subject over the first, with its interval; empty for a single subject.
        memory: by label; None where it could not be measured.
        notes: one line each.
        nonfinite: by label, the images whose outputs held a NaN or an infinity, of those of all batch sizes.
    """

    profiles: tuple[Profile, ...]
    speedups: dict[int, Interval]
    memory: dict[str, Memory | None]
    notes: tuple[str, ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every engine answered with numbers: without that, no time means anything."""
        return not any(self.nonfinite.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: profile.json."""
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
    """Measure engines side by side.

    Args:
        subjects: one or more with one input size; the first is the one that the last is compared with.
        batches: batch sizes, each once.
        seconds: of work per batch size, all engines together (20 to 500 rounds).
        threads, device: of every engine.
        memory: run each engine once more in a process of its own, for its memory.
        seed: of the images and of the order.

    Raises:
        InputError: a batch size that an engine was not built for, images of different sizes, or sizes given twice.
        EngineUnavailableError: an engine cannot run here, or has no profiler.
        BundleError: a bundle that is not sound, or two that cannot be run side by side.
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
    # Where operations are the shortest, what they cost beside their work stands out of the noise.
    # No operation can have taken less than what is taken off it.
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
    """An engine that counts its runs: the profiler's runs are told apart by their number."""

    def __init__(self, engine: vp_engines.Engine) -> None:
        self.engine, self.calls = engine, 0

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        return self.engine.run(images)


def _check_pair(subjects: Sequence[Subject], batches: Sequence[int], device: str | None) -> list[str]:
    """Refuse subjects that cannot run side by side, before one is loaded; what to know of the others, a line each."""
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
    """The runs of one engine at one batch size.

    A profiler that times whole runs is seen to cost every operation the same, part of it inside the operation's own
    time and part between it and the next. So an operation's time is taken to reach to the start of the next one, and
    that cost is taken off each: what a run takes longer by the profiler than by the clock without it, for each of its
    operations. (ONNX Runtime 1.31, digits ViT: 17 us over the 94 operations of the dense model, 15 us over the 333 of a
    merging one.) At larger batches operations on several threads cost it more, 14 to 23 us over those 94 at batch 8:
    what is left of the excess is taken off every operation in proportion to its time (`scale`). A profiler that does
    not time whole runs is held to the clock: what its operations leave of a run without it is the runtime's.

    Args:
        runs: what the profiler saw, a run a round.
        taken: float [rounds, 2], milliseconds of a run without and with the profiler.
    """

    def __init__(self, label: str, batch: int, runs: Sequence[RecordedRun], taken: np.ndarray) -> None:
        self.label, self.batch, self.taken = label, batch, taken
        self.runs = _alike(runs)
        self.shape = self.runs[0].operations if self.runs else ()
        self.spent = np.array([_spent(run) for run in self.runs]).reshape(len(self.runs), len(self.shape))
        self.timed = bool(self.shape) and all(run.duration is not None for run in self.runs)

    def milliseconds_per_operation(self) -> float:
        """Of the runs without the profiler."""
        return float(np.median(self.taken[:, 0])) / max(1, len(self.shape))

    def shortest(self) -> float:
        """Median milliseconds of the shortest operation; infinite where there is none."""
        return float(np.median(self.spent, axis=0).min()) if self.spent.size else float("inf")

    def excess(self) -> float:
        """Milliseconds an operation that runs take longer by the profiler than without it; 0 where it does not say."""
        if not self.timed:
            return 0.0
        whole = float(np.median([run.duration for run in self.runs])) / 1000
        return max(0.0, whole - float(np.median(self.taken[:, 0]))) / len(self.shape)

    def scale(self, cost: float) -> float:
        """Milliseconds of a run without the profiler for each one with it, `cost` taken off each operation.

        1 where the two are too far apart for a correction.
        """
        plain = float(np.median(self.taken[:, 0]))
        if self.timed:
            seen = float(np.median([run.duration for run in self.runs])) / 1000 - cost * len(self.shape)
        else:  # less than a whole run is no fault of the profiler's
            seen = max(plain, float(np.median(self.spent.sum(axis=1))) if self.runs else 0.0)
        found = plain / max(seen, 1e-9)
        return found if 1 / MOST_SCALE <= found <= MOST_SCALE else 1.0

    def profile(self, cost: float) -> Profile:
        """The summary, `cost` milliseconds taken off each operation and the rest scaled to the clock."""
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
    """Milliseconds of each operation: to the start of the next one where whole runs are timed, else its own."""
    if run.duration is None:
        return [each.duration / 1000 for each in run.operations]
    ends = [each.start for each in run.operations[1:]] + [run.duration]
    return [(end - each.start) / 1000 for each, end in zip(run.operations, ends, strict=True)]


def _alike(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Those with the sequence of operations that most have: a profiler may lose an event now and then."""
    seen: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in runs:
        seen.setdefault(tuple(each.name for each in run.operations), []).append(run)
    return max(seen.values(), key=len, default=[])
