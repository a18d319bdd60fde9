"""Base runner for engines whose profiler reports each run as it ends."""

from __future__ import annotations

from vp_engines.backends.base import Runner, TensorSpec
from vp_engines.backends.recording import RecordedRun, nothing_recorded


class RecordingRunner(Runner):
    """Base runner for engines whose profiler reports each run as it ends.

    `_run` appends to `_runs`, unless that is None.

    Args:
        profile: Whether to record.
    """

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, profile: bool = False
    ) -> None:
        super().__init__(inputs, outputs)
        self._runs: list[RecordedRun] | None = [] if profile else None

    def _recorded(self) -> list[RecordedRun]:
        if self._runs is None:
            raise nothing_recorded()
        runs, self._runs = self._runs, None
        return runs
