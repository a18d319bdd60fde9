"""Gaussian process over schedules, which smooths the losses of individual plans.

Moving a single token changes which other tokens are matched, so a plan's loss on some images fluctuates by a tenth, in
ways that do not generalise. Taking the lowest observed loss would select the luckiest plan. A process with a noise
term, fitted to all plans so far, estimates a plan's loss from its neighbours (Rasmussen and Williams 2006, chapters 2
and 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LENGTHS = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)  # RMS over the blocks; roots of shares are in 0..1
_SETTINGS = (0.25, 1.0)  # likewise for settings, in 0..1
_NOISES = (0.01, 0.05, 0.2, 0.5, 1.0)  # noise variance relative to the signal variance


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process fitted to some points.

    Attributes:
        counts, settings: float [n, d], the points, in two groups with separate length scales.
        scales: Length scale of counts, of settings, and the noise.
    """

    counts: np.ndarray
    settings: np.ndarray
    scales: tuple[float, float, float]
    _weights: np.ndarray
    _inverse: np.ndarray
    _centre: float
    _spread: float

    @classmethod
    def fit(cls, counts: np.ndarray, settings: np.ndarray, values: Sequence[float] | np.ndarray) -> GaussianProcess:
        """Fit hyperparameters by maximum marginal likelihood over a small grid; the amplitude has a closed form.

        Args:
            counts: float [n, d]; settings: float [n, e], e may be 0. Points may repeat.
            values: float [n].
        """
        y = np.asarray(values, dtype=np.float64)
        centre = float(y.mean())
        near, alike = _squares(counts, counts), _squares(settings, settings)
        best, found = -np.inf, None
        for length in _LENGTHS:
            for other in _SETTINGS if settings.shape[1] else _SETTINGS[:1]:
                kernel = np.exp(-near / (2 * length**2) - alike / (2 * other**2))
                for noise in _NOISES:
                    root = np.linalg.cholesky(kernel + noise * np.eye(len(y)))
                    half = np.linalg.solve(root, y - centre)
                    amplitude = max(float(half @ half) / len(y), 1e-18)
                    likelihood = -0.5 * len(y) * np.log(amplitude) - float(np.log(np.diag(root)).sum())
                    if likelihood > best:
                        best, found = likelihood, (length, other, noise, root, half, amplitude)
        assert found is not None
        length, other, noise, root, half, amplitude = found
        inverse = np.linalg.inv(root)
        return cls(
            counts, settings, (length, other, noise), inverse.T @ half, inverse, centre, float(np.sqrt(amplitude))
        )

    def predict(self, counts: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation, float64 [m] each, without the noise."""
        length, other, _ = self.scales
        square = _squares(counts, self.counts) / length**2 + _squares(settings, self.settings) / other**2
        kernel = np.exp(-square / 2)
        known = ((kernel @ self._inverse.T) ** 2).sum(axis=1)
        return self._centre + kernel @ self._weights, self._spread * np.sqrt(np.clip(1 - known, 0, None))


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference over the last axis: float64 [n, m]; zeros if that axis is empty."""
    if not a.shape[1]:
        return np.zeros((len(a), len(b)))
    square: np.ndarray = ((a[:, None, :] - b[None, :, :]) ** 2).mean(axis=2)
    return square
