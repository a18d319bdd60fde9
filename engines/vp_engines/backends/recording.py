"""Profiles of engine runs, in one form for all engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vp_engines.errors import InputError


@dataclass(frozen=True)
class Operation:
    """One operation of a profiled run.

    Attributes:
        name: The engine's name for it, or the name of the graph node if the engine keeps it.
        kind: Operator ("MatMul") or implementation; "" if the engine does not report it.
        start, duration: In microseconds; `start` is relative to the beginning of the run.
    """

    name: str
    kind: str
    start: float
    duration: float


@dataclass(frozen=True)
class RecordedRun:
    """Profile of one run.

    Attributes:
        operations: In the order in which they began.
        duration: Duration of the run in microseconds by the profiler's clock; None if not reported.
    """

    operations: tuple[Operation, ...]
    duration: float | None = None

    @classmethod
    def in_sequence(cls, entries: Iterable[tuple[str, str, float]]) -> RecordedRun:
        """Build a run from durations without start times: operations follow one another.

        Args:
            entries: (name, kind, microseconds).
        """
        operations, start = [], 0.0
        for name, kind, duration in entries:
            operations.append(Operation(name, kind, start, duration))
            start += duration
        return cls(tuple(operations))


def nothing_recorded() -> InputError:
    """The error that `Runner.recorded` raises if nothing was recorded."""
    return InputError("nothing is recorded", fix="load with profile=True, and ask once")
