"""Compare the plan of a search with the best baseline, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vp_exporter.validation.intervals import Interval, bootstrap_mean


@dataclass(frozen=True)
class SearchVerdict:
    """Comparison of the final plan with the baseline of lowest KL, on the held-out images.

    Attributes:
        outcome: "better" or "worse" if the interval of the difference excludes 0; else "unproven".
        baseline: Name of the baseline.
        kl, baseline_kl: Mean KL to the dense model, nats.
        difference: kl minus baseline_kl, with a paired bootstrap interval; None if only means are known.
        images: Number of held-out images; None if only means are known.
    """

    outcome: Literal["better", "worse", "unproven"]
    baseline: str
    kl: float
    baseline_kl: float
    difference: Interval | None
    images: int | None

    @property
    def text(self) -> str:
        """One or two sentences."""
        against = f"KL {self.kl:.4f} against {self.baseline_kl:.4f} nats of {self.baseline}"
        change = f" ({100 * (self.kl / self.baseline_kl - 1):+.0f}%)".replace("-", "−") if self.baseline_kl > 0 else ""
        found = f"{against}, the best baseline{change}"
        if self.difference is None:
            return f"{found}. How much of that is chance is not known: no interval was measured."
        low, high = (f"{end:+.4f}".replace("-", "−") for end in (self.difference.low, self.difference.high))
        interval = f"the 95% interval of the difference on {self.images} held-out images, [{low}, {high}],"
        if self.outcome == "better":
            return f"The search beat the best baseline: {found}; {interval} lies below 0."
        if self.outcome == "worse":
            return f"The best baseline is better than what was searched: {found}; {interval} lies above 0."
        return f"No gain over the best baseline is proven: {found}; {interval} holds 0."

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        return {**asdict(self), "text": self.text}


def judge_search(name: str, own: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> SearchVerdict:
    """Compare two plans on the same images.

    Args:
        name: Name of the baseline.
        own, baseline: KL of each image, nats, in the same order.
    """
    first, second = np.asarray(own, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    difference = bootstrap_mean(first - second)
    outcome: Literal["better", "worse", "unproven"] = "unproven"
    if difference.high < 0:
        outcome = "better"
    elif difference.low > 0:
        outcome = "worse"
    return SearchVerdict(outcome, name, float(first.mean()), float(second.mean()), difference, len(first))


def from_rows(stages: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]) -> SearchVerdict | None:
    """Verdict from means alone, for the last accepted stage and the best baseline; None if either is missing."""
    own = [row for row in stages if row.get("accepted") in (True, None) and _known(row)]
    others = [row for row in baselines if _known(row)]
    if not own or not others:
        return None
    best = min(others, key=lambda row: float(row["kl"]))
    return SearchVerdict("unproven", str(best["name"]), float(own[-1]["kl"]), float(best["kl"]), None, None)


def _known(row: Mapping[str, Any]) -> bool:
    return row.get("kl") is not None and bool(np.isfinite(float(row["kl"])))
