"""How much a stage may still spend, and what it has found so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vp_exporter.errors import SearchError
from vp_exporter.utils.distributed import Workers, single

TELL_SECONDS = 20.0


class Limits:
    """Evaluations and minutes, whichever ends first.

    Args:
        evaluations: candidate plans that may be run; None for no limit.
        seconds: of wall time from now; None for no limit. A search that this one ends depends on the clock.
        workers: they stop together, by the leader's clock.

    Raises:
        SearchError: a limit below 0.
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
        """Whether one more evaluation is allowed; asked by all processes together."""
        if self.evaluations is not None and self.spent >= self.evaluations:
            return False
        seconds = self.seconds
        if seconds is None:
            return True
        return self._workers.from_leader(lambda: time.perf_counter() - self._start < seconds)


@dataclass
class Trace:
    """The loss of every candidate, for the pictures.

    Attributes:
        rows: {"stage", "evaluation" (from 1, over all stages), "loss", "best" (of its stage)}, as a search
            goes by them (vp_exporter.searching.scoring.Scorer.losses).
        tell: gets a line every TELL_SECONDS, from the first candidate on: a search is long.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tell: Callable[[str], None] | None = None
    _told: float = field(default_factory=lambda: time.monotonic())

    def add(self, stage: str, loss: float, best: float) -> None:
        self.rows.append({"stage": stage, "evaluation": len(self.rows) + 1, "loss": loss, "best": best})
        if self.tell is not None and time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self.tell(f"{len(self.rows)} candidates, at {stage}: best loss {best:.5f}")
