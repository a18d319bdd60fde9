"""Detection of NaN and infinite outputs, per image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class FiniteWatch:
    """Counts images with a NaN or an infinity in any output of the timed runs. Called outside the timed section.

    Args:
        runners: Number of engines.
        batch: Images per run.
    """

    def __init__(self, runners: int, batch: int) -> None:
        self._bad = np.zeros((runners, batch), dtype=bool)

    def __call__(self, which: int, outputs: Mapping[str, np.ndarray]) -> None:
        """Check the outputs of one run of engine number `which`."""
        self._bad[which] |= nonfinite_rows(outputs, self._bad.shape[1])

    def counts(self) -> tuple[int, ...]:
        """Number of images with a nonfinite output, for each engine."""
        return tuple(int(count) for count in self._bad.sum(axis=1))


def nonfinite_rows(outputs: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
    """Images of a batch with a NaN or an infinity in any output: bool [batch]."""
    bad = np.zeros(batch, dtype=bool)
    for value in outputs.values():
        finite = np.isfinite(value)
        if not finite.all():  # an output without a batch dimension affects all images
            bad |= ~finite.reshape(batch, -1).all(axis=1) if value.ndim and len(value) == batch else True
    return bad
