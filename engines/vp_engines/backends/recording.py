"""What an engine's own profiler saw of its runs, in one form for all engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vp_engines.errors import InputError


@dataclass(frozen=True)
class Operation:
    """One operation of a run, as the engine's own profiler saw it.

    Attributes:
        name: as the engine calls it; where the engine keeps them, the name of the graph's node.
        kind: its operator ("MatMul"), or how the engine computes it; "" where the engine does not say.
        start, duration: microseconds; `start` from the run's beginning.
    """

    name: str
    kind: str
    start: float
    duration: float


@dataclass(frozen=True)
class RecordedRun:
    """What a profiler saw of one run.

    Attributes:
        operations: in the order in which they began.
        duration: microseconds of the whole run by the profiler's clock; None where it does not say.
    """

    operations: tuple[Operation, ...]
    duration: float | None = None

    @classmethod
    def in_sequence(cls, entries: Iterable[tuple[str, str, float]]) -> RecordedRun:
        """Of a profiler that says how long each operation took and not when: one after the other.

        Args:
            entries: (name, kind, microseconds).
        """
        operations, start = [], 0.0
        for name, kind, duration in entries:
            operations.append(Operation(name, kind, start, duration))
            start += duration
        return cls(tuple(operations))


def nothing_recorded() -> InputError:
    """What `Runner.recorded` raises where there is nothing to tell."""
    return InputError("nothing is recorded", fix="load with profile=True, and ask once")
