"""Measured against a budget: one status, one sentence, and a check for each thing asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vp_engines.errors import EXIT_BUDGET_MISSED, EXIT_OK, VpError
from vp_exporter.validate.accuracy import Accuracy
from vp_exporter.validate.intervals import Interval
from vp_exporter.validate.latency import LatencyRow

Status = Literal["passed", "failed", "unvalidated"]
ROUNDING = 1e-9  # a drop of 100 x 1/200 against a budget of 0.5 must not hang on the last bit


@dataclass(frozen=True)
class Budget:
    """What the reduced engine must hold against the dense one. None means: not asked.

    Attributes:
        max_drop: top-1 that may be lost, in percentage points, 0 to 100.
        min_speedup: speed-up that must be reached at every batch size measured, above 0 and at most 1000. From 1 on
            it must also be a speed-up beyond noise (`LatencyRow.claim`); below 1 it reads "not slower than".
        min_agreement: images with the same top-1 class as the dense model, in percent, 0 to 100.

    Raises:
        VpError: a limit is out of its range or not a number.
    """

    max_drop: float | None = None
    min_speedup: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        _check_range("max_drop", self.max_drop, 0, 100, "percentage points from 0 to 100")
        _check_range("min_agreement", self.min_agreement, 0, 100, "a percentage from 0 to 100")
        _check_range("min_speedup", self.min_speedup, 1e-6, 1000, "a ratio above 0 and at most 1000, as 1.3")

    @property
    def empty(self) -> bool:
        return self.max_drop is None and self.min_speedup is None and self.min_agreement is None


@dataclass(frozen=True)
class Check:
    """One thing asked.

    Attributes:
        name: "finite outputs", "max_drop", "min_agreement" or "min_speedup".
        limit: what was asked, in the budget's unit.
        measured: what was found, in the same unit (for min_speedup: at the worst batch size); None when not measured.
        passed: judged on the point estimate.
        holds_at_interval: whether the unfavourable end of the 95% interval holds the limit too; None when there is
            none. A check that passes without it may owe that to chance.
        explanation: one sentence.
    """

    name: str
    limit: float
    measured: float | None
    passed: bool
    holds_at_interval: bool | None
    explanation: str


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    status: "failed" when any check failed; else "unvalidated" when the answers were not compared with the dense
        model's at all (a fast engine that answers wrongly is not good); else "passed".
    headline: one sentence.
    checks: in the order finite outputs, max_drop, min_agreement, min_speedup; only those asked.
    budget_given: False when nothing was asked and "passed" only says that everything was measured.
    """

    status: Status
    headline: str
    checks: tuple[Check, ...]
    budget_given: bool

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def exit_code(self) -> int:
        """0, or 1 when a check failed."""
        return EXIT_BUDGET_MISSED if self.status == "failed" else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def judge(accuracy: Accuracy | None, latency: Sequence[LatencyRow] | None, budget: Budget) -> Verdict:
    """Judge what was measured. A limit whose measurement is missing fails; a NaN or infinite output always fails."""
    checks = []
    if accuracy is not None:
        checks.append(_check_finite(accuracy))
    if budget.max_drop is not None:
        checks.append(_check_drop(accuracy, budget.max_drop))
    if budget.min_agreement is not None:
        checks.append(_check_agreement(accuracy, budget.min_agreement))
    if budget.min_speedup is not None:
        checks.append(_check_speedup(latency or (), budget.min_speedup))
    status: Status = "passed"
    if not all(check.passed for check in checks):
        status = "failed"
    elif accuracy is None:
        status = "unvalidated"
    return Verdict(status, _headline(status, accuracy, latency or (), checks, budget), tuple(checks), not budget.empty)


def _check_finite(accuracy: Accuracy) -> Check:
    count = (
        accuracy.nonfinite_dense + accuracy.nonfinite_reduced + (accuracy.parity.nonfinite if accuracy.parity else 0)
    )
    if accuracy.finite:
        text = f"Every logit of both engines is a finite number on all {accuracy.images} images."
    else:
        text = (
            f"NaN or infinite logits on {accuracy.nonfinite_reduced} images from the reduced engine and "
            f"{accuracy.nonfinite_dense} from the dense one, of {accuracy.images}"
            + (f", such as {accuracy.nonfinite_images[0]}" if accuracy.nonfinite_images else "")
            + "; try a wider precision."
        )
    return Check("finite outputs", 0, count, accuracy.finite, None, text)


def _check_drop(accuracy: Accuracy | None, limit: float) -> Check:
    if accuracy is None or accuracy.top1_difference is None:
        lacking = "no images were given" if accuracy is None else "the images have no labels"
        text = f"Top-1 was not measured: {lacking}; give a folder with one sub-folder per class."
        return Check("max_drop", limit, None, False, None, text)
    difference = accuracy.top1_difference
    drop, passed = -difference.value + 0.0, -difference.value <= limit + ROUNDING
    holds = -difference.low <= limit + ROUNDING
    text = (
        f"Top-1 changed by {points(difference.value)} points; at most {limit:g} may be lost. From {accuracy.images} "
        f"images the 95% interval is {interval(difference)}{_surety(passed, holds)}."
    )
    return Check("max_drop", limit, drop, passed, holds, text)


def _check_agreement(accuracy: Accuracy | None, limit: float) -> Check:
    if accuracy is None:
        text = "Agreement was not measured: no images were given."
        return Check("min_agreement", limit, None, False, None, text)
    share = accuracy.agreement
    passed, holds = share.value >= limit - ROUNDING, share.low >= limit - ROUNDING
    text = (
        f"{share.value:.2f}% of the images get the dense model's class; at least {limit:g}% are asked. From "
        f"{accuracy.images} images the 95% interval is [{share.low:.2f}, {share.high:.2f}]{_surety(passed, holds)}."
    )
    return Check("min_agreement", limit, share.value, passed, holds, text)


def _check_speedup(latency: Sequence[LatencyRow], limit: float) -> Check:
    if not latency:
        return Check("min_speedup", limit, None, False, None, "Latency was not measured.")
    needs_claim = limit >= 1
    worst = min(latency, key=lambda row: row.speedup.value)
    slow = [row for row in latency if row.speedup.value < limit - ROUNDING]
    unproven = [row for row in latency if needs_claim and not row.claim]
    holds = all(row.speedup.low >= limit - ROUNDING for row in latency)
    text = f"Asked for {limit:g}× at every batch size; found " + ", ".join(
        f"{row.speedup.value:.2f}× at batch {row.batch} (95% interval [{row.speedup.low:.2f}, {row.speedup.high:.2f}])"
        for row in latency
    )
    passed = not slow and not unproven
    if unproven:
        text += "; no speed-up beyond noise at batch " + ", ".join(
            f"{row.batch} (noise floor {100 * row.noise:.1f}%)" for row in unproven
        )
    elif passed and not holds:
        text += "; not every interval's lower end reaches it: more rounds would tell"
    return Check("min_speedup", limit, worst.speedup.value, passed, holds, text + ".")


def _headline(
    status: Status, accuracy: Accuracy | None, latency: Sequence[LatencyRow], checks: Sequence[Check], budget: Budget
) -> str:
    parts = []
    if latency:
        parts.append(" and ".join(_speed_words(row) for row in latency))
    if accuracy is not None and accuracy.top1_difference is not None:
        parts.append(f"top-1 {points(accuracy.top1_difference.value)} points")
    elif accuracy is not None:
        parts.append(f"{accuracy.agreement.value:.2f}% of answers the same (no labels, so accuracy itself is unknown)")
    measured = ", ".join(parts) + " against the dense model on the same engine" if parts else "nothing was measured"
    if status == "failed":
        return f"Failed {' and '.join(_plain_name(check) for check in checks if not check.passed)}: {measured}."
    if status == "unvalidated":
        within = " (within the budget for speed)" if checks else ""
        return f"Accuracy not validated: {measured}{within}."
    return f"Within budget: {measured}." if not budget.empty else f"Measured, with no budget to hold: {measured}."


def _speed_words(row: LatencyRow) -> str:
    if row.outcome == "within noise":
        return f"no speed difference beyond noise at batch {row.batch}"
    if row.outcome == "slower":
        return f"slower at batch {row.batch} ({row.speedup.value:.2f}×)"
    return f"{row.speedup.value:.2f}× faster at batch {row.batch}"


def _plain_name(check: Check) -> str:
    names = {"max_drop": "the accuracy budget", "min_agreement": "the agreement budget"}
    return {**names, "min_speedup": "the speed budget", "finite outputs": "on NaN or infinite outputs"}[check.name]


def _surety(passed: bool, holds: bool) -> str:
    """What the interval's unfavourable end adds to a point estimate that holds."""
    if not passed:
        return ""
    return ", whose lower end holds too" if holds else ", whose lower end does not: more images would tell"


def points(value: float) -> str:
    """Signed, two decimals, with a minus sign that is one; no sign on zero."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def interval(value: Interval) -> str:
    return f"[{points(value.low)}, {points(value.high)}]"


def _check_range(name: str, value: float | None, low: float, high: float, expected: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not low <= value <= high:
        raise VpError(f"{name} is {value!r}", expected=expected)
