"""Whether what an engine answers are numbers: NaN and infinities, in any output, of any image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class FiniteWatch:
    """Sees every output that is timed, off the clock, and counts the images with a NaN or an infinity in one.

    Args:
        runners: engines that are watched.
        batch: images of one run.
    """

    def __init__(self, runners: int, batch: int) -> None:
        self._bad = np.zeros((runners, batch), dtype=bool)

    def __call__(self, which: int, outputs: Mapping[str, np.ndarray]) -> None:
        """Look at the outputs of one run of engine number `which`."""
        self._bad[which] |= nonfinite_rows(outputs, self._bad.shape[1])

    def counts(self) -> tuple[int, ...]:
        """Images with an output that was not finite, for each engine."""
        return tuple(int(count) for count in self._bad.sum(axis=1))


def nonfinite_rows(outputs: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
    """Which images of a batch have a NaN or an infinity in any output: bool [batch]."""
    bad = np.zeros(batch, dtype=bool)
    for value in outputs.values():
        finite = np.isfinite(value)
        if not finite.all():  # an output that is not by image spoils all of them
            bad |= ~finite.reshape(batch, -1).all(axis=1) if value.ndim and len(value) == batch else True
    return bad
