"""Compare measurements with a budget: a status, a headline, and a check for each limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vp_engines.errors import EXIT_BUDGET_MISSED, EXIT_OK, VpError
from vp_exporter.validation.accuracy import Accuracy
from vp_exporter.validation.baseline import DENSE, Baseline
from vp_exporter.validation.intervals import Interval
from vp_exporter.validation.latency import LatencyRow

Status = Literal["passed", "failed", "measured", "unvalidated"]
ROUNDING = 1e-9  # e.g. a drop of 100 x 1/200 must meet a budget of 0.5 despite rounding


@dataclass(frozen=True)
class Budget:
    """Limits for the reduced engine against its baseline, the dense engine or another bundle's; None for no limit.

    Attributes:
        max_drop: Largest drop in top-1, in percentage points, 0 to 100.
        min_speedup: Smallest speed-up at every batch size measured, above 0 and at most 1000. From 1 on, the speed-up
            must also exceed noise (`LatencyRow.claim`); a limit below 1 allows a slow-down.
        min_agreement: Smallest share of images with the same top-1 class as the baseline, in percent, 0 to 100.

    Raises:
        VpError: if a limit is out of range or not a number.
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
    """Check of one limit.

    Attributes:
        name: "finite outputs", "max_drop", "min_agreement" or "min_speedup".
        limit: The limit, in the budget's unit.
        measured: The measured value, in the same unit (for min_speedup: at the worst batch size); None if not measured.
        passed: Whether the point estimate meets the limit.
        holds_at_interval: Whether the unfavourable end of the 95% interval also meets the limit; None without an
            interval. If it is False, a check may have passed by chance.
        explanation: One sentence.
    """

    name: str
    limit: float
    measured: float | None
    passed: bool
    holds_at_interval: bool | None
    explanation: str


@dataclass(frozen=True)
class Verdict:
    """Result of a validation.

    Attributes:
        status: "failed" if any check failed; else "unvalidated" if the outputs were not compared with the baseline's;
            else "passed" if a budget was given and no batch size is slower; else "measured", e.g. without a budget, or
            with a slow-down that the budget allows.
        headline: One sentence.
        checks: In the order finite outputs, max_drop, min_agreement, min_speedup; only those requested, and finite
            outputs whenever an engine ran.
        budget_given: Whether any limit was given.
    """

    status: Status
    headline: str
    checks: tuple[Check, ...]
    budget_given: bool

    def __str__(self) -> str:
        return self.headline

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def exit_code(self) -> int:
        """0, or 1 when a check failed."""
        return EXIT_BUDGET_MISSED if self.status == "failed" else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True)
class Probe:
    """Run of an engine without a baseline: number of images, and of those without finite outputs."""

    images: int
    nonfinite: int


def judge(
    accuracy: Accuracy | None,
    latency: Sequence[LatencyRow] | None,
    budget: Budget,
    *,
    baseline: Baseline = DENSE,
    probe: Probe | None = None,
) -> Verdict:
    """Compare measurements with a budget. A limit without a measurement fails; a NaN or infinite output always fails.

    Args:
        baseline: Baseline of the measurements, which the sentences refer to.
        probe: Run of an engine without a baseline.
    """
    checks, rows = [], latency or ()
    if accuracy is not None or rows or probe is not None:
        checks.append(_check_finite(accuracy, rows, baseline, probe))
    if budget.max_drop is not None:
        checks.append(_check_drop(accuracy, budget.max_drop))
    if budget.min_agreement is not None:
        checks.append(_check_agreement(accuracy, budget.min_agreement, baseline))
    if budget.min_speedup is not None:
        checks.append(_check_speedup(rows, budget.min_speedup))
    if not all(check.passed for check in checks):
        status: Status = "failed"
    elif accuracy is None:
        status = "unvalidated"
    elif budget.empty or any(row.outcome == "slower" for row in rows):
        status = "measured"
    else:
        status = "passed"
    return Verdict(status, _headline(status, accuracy, rows, checks, budget, baseline), tuple(checks), not budget.empty)


def _check_finite(
    accuracy: Accuracy | None, latency: Sequence[LatencyRow], baseline: Baseline, probe: Probe | None
) -> Check:
    """Check all outputs of the engines, on the images and on the random inputs used for timing."""
    timed = sum(row.batch for row in latency) + (probe.images if probe else 0)
    own = [(accuracy.nonfinite_reduced, accuracy.images, "images")] if accuracy else []
    its = [(accuracy.nonfinite_dense, accuracy.images, "images")] if accuracy else []
    if timed:
        found = sum(row.nonfinite_reduced for row in latency) + (probe.nonfinite if probe else 0)
        own.append((found, timed, "timed images"))
    if latency:
        found = sum(row.nonfinite_dense for row in latency)
        its.append((found, timed, "timed images"))
    parity = accuracy.parity.nonfinite if accuracy is not None and accuracy.parity else 0
    count = sum(bad for bad, *_ in (*own, *its)) + parity
    if not count:
        whose = "both engines" if its else baseline.own_engine
        where = " and ".join(f"{images} {what}" for _, images, what in own)
        text = f"Every output of {whose} is a finite number, on all {where}."
    else:
        text = f"NaN or infinite outputs {_nonfinite_words(own, its, baseline)}"
        if parity and not any(bad for bad, *_ in own):
            text += f", and from the PyTorch model on {parity} of {accuracy.parity.images} images"  # type: ignore[union-attr]
        if accuracy is not None and accuracy.nonfinite_images:
            text += f"; such as {accuracy.nonfinite_images[0]}"
        text += "; try a wider precision."
    return Check("finite outputs", 0, count, not count, None, text)


def _nonfinite_words(
    own: Sequence[tuple[int, int, str]], its: Sequence[tuple[int, int, str]], baseline: Baseline
) -> str:
    """ "from the reduced engine on 8 of 8 timed images, and from the dense engine too (8 of 8)"."""
    bad, worse = ([each for each in side if each[0]] for side in (own, its))
    counts = " and ".join(f"{count} of {images} {what}" for count, images, what in bad)
    others = " and ".join(f"{count} of {images} {what}" for count, images, what in worse)
    if not worse:
        clean = f", not from {baseline.engine}" if its and bad else ""
        return f"from {baseline.own_engine} on {counts}{clean}" if bad else f"from {baseline.own_engine}"
    if not bad:
        return f"from {baseline.engine} on {others}, not from {baseline.own_engine}"
    too = "dense too" if baseline.kind == "dense" else f"{baseline.label} too"
    return f"from {baseline.own_engine} on {counts}, {too} ({others})"


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


def _check_agreement(accuracy: Accuracy | None, limit: float, baseline: Baseline) -> Check:
    if accuracy is None:
        text = "Agreement was not measured: no images were given."
        return Check("min_agreement", limit, None, False, None, text)
    share = accuracy.agreement
    passed, holds = share.value >= limit - ROUNDING, share.low >= limit - ROUNDING
    text = (
        f"{share.value:.2f}% of the images get the class that {baseline.name} gives; at least {limit:g}% are asked. "
        f"From {accuracy.images} images the 95% interval is "
        f"[{share.low:.2f}, {share.high:.2f}]{_surety(passed, holds)}."
    )
    return Check("min_agreement", limit, share.value, passed, holds, text)


def _check_speedup(latency: Sequence[LatencyRow], limit: float) -> Check:
    if not latency:
        return Check("min_speedup", limit, None, False, None, "Latency was not measured.")
    needs_claim = limit >= 1
    worst = min(latency, key=lambda row: row.speedup.value)
    slow = [row for row in latency if row.speedup.value < limit - ROUNDING]
    broken = [row for row in latency if not row.finite]
    unproven = [row for row in latency if needs_claim and row.finite and not row.claim]
    holds = all(row.speedup.low >= limit - ROUNDING for row in latency)
    text = f"Asked for {limit:g}× at every batch size; found " + ", ".join(
        f"{row.speedup.value:.2f}× at batch {row.batch} (95% interval [{row.speedup.low:.2f}, {row.speedup.high:.2f}])"
        for row in latency
    )
    passed = not slow and not unproven and not broken
    if broken:
        text += "; the outputs are not finite at batch " + ", ".join(str(row.batch) for row in broken)
    if unproven:
        text += "; no speed-up beyond noise at batch " + ", ".join(
            f"{row.batch} (noise floor {100 * row.noise:.1f}%)" for row in unproven
        )
    elif passed and not holds:
        text += "; not every interval's lower end reaches it: more rounds would tell"
    return Check("min_speedup", limit, worst.speedup.value, passed, holds, text + ".")


def _headline(
    status: Status,
    accuracy: Accuracy | None,
    latency: Sequence[LatencyRow],
    checks: Sequence[Check],
    budget: Budget,
    baseline: Baseline,
) -> str:
    failed = [check for check in checks if not check.passed]
    if failed and failed[0].name == "finite outputs":  # times and accuracy are meaningless
        words = failed[0].explanation.removeprefix("NaN or infinite outputs ").removesuffix("; try a wider precision.")
        more = "".join(f" and {_plain_name(check)}" for check in failed[1:])
        return f"Failed on NaN or infinite outputs{more}: {words}. Neither its speed nor its answers count."
    parts = []
    if latency:
        parts.append(" and ".join(_speed_words(row) for row in latency))
    if accuracy is not None and accuracy.top1_difference is not None:
        parts.append(f"top-1 {points(accuracy.top1_difference.value)} points")
    elif accuracy is not None:
        parts.append(f"{accuracy.agreement.value:.2f}% of answers the same (no labels, so accuracy itself is unknown)")
    against = f" against {baseline.name} {baseline.setting}"
    measured = ", ".join(parts) + against if parts else "nothing was measured"
    if failed:
        return f"Failed {' and '.join(_plain_name(check) for check in failed)}: {measured}."
    if status == "unvalidated":
        within = " (within the budget for speed)" if budget.min_speedup is not None else ""
        return f"Accuracy not validated: {measured}{within}."
    if budget.empty:
        return f"Measured, with no budget to hold: {measured}."
    return f"Within budget, but a slow-down: {measured}." if status == "measured" else f"Within budget: {measured}."


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
    """Describe whether the unfavourable end of the interval also meets the limit, if the point estimate does."""
    if not passed:
        return ""
    return ", whose lower end holds too" if holds else ", whose lower end does not: more images would tell"


def points(value: float) -> str:
    """Format with a sign and two decimals, using a typographic minus; no sign on zero."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def interval(value: Interval) -> str:
    return f"[{points(value.low)}, {points(value.high)}]"


def _check_range(name: str, value: float | None, low: float, high: float, expected: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not low <= value <= high:
        raise VpError(f"`{name}` is {value!r}", expected=expected)
