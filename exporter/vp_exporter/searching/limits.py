"""Limits of a search stage, and its trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vp_exporter.errors import SearchError
from vp_exporter.utils.distributed import Workers, single

TELL_SECONDS = 20.0


class Limits:
    """Limits on evaluations and time, whichever is reached first.

    Args:
        evaluations: Maximum number of candidate plans to run; None for no limit.
        seconds: Wall time from now; None for no limit. If reached, the result depends on the machine.
        workers: Processes, which stop together by the leader's clock.

    Raises:
        SearchError: if a limit is negative.
    """

    def __init__(
        self, evaluations: int | None = None, seconds: float | None = None, workers: Workers | None = None
    ) -> None:
        for name, value in (("evaluations", evaluations), ("seconds", seconds)):
            if value is not None and value < 0:
                raise SearchError(f"{name} is {value}", expected="0 or more")
        self.evaluations, self.seconds, self.spent = evaluations, seconds, 0
        self._start, self._workers = time.perf_counter(), workers or single()

    def spend(self, evaluations: int = 1) -> None:
        self.spent += evaluations

    @property
    def left(self) -> bool:
        """Whether one more evaluation is allowed; all processes must call this together."""
        if self.evaluations is not None and self.spent >= self.evaluations:
            return False
        seconds = self.seconds
        if seconds is None:
            return True
        return self._workers.from_leader(lambda: time.perf_counter() - self._start < seconds)


@dataclass
class Trace:
    """Loss of every candidate, for plots.

    Attributes:
        rows: {"stage", "evaluation" (from 1, over all stages), "loss", "best" (of its stage)}, with the losses used by
            the search (vp_exporter.searching.scoring.Scorer.losses).
        tell: Called with a line every TELL_SECONDS, starting at the first candidate.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tell: Callable[[str], None] | None = None
    _told: float = field(default_factory=lambda: time.monotonic())

    def add(self, stage: str, loss: float, best: float) -> None:
        self.rows.append({"stage": stage, "evaluation": len(self.rows) + 1, "loss": loss, "best": best})
        if self.tell is not None and time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self.tell(f"{len(self.rows)} candidates, at {stage}: best loss {best:.5f}")
