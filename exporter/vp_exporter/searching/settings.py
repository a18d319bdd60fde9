"""Settings of a search: method, budget, and limits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from vp_exporter.errors import SearchError
from vp_exporter.searching.mask.fisher import TARGETS
from vp_exporter.searching.mask.rearrangement import STRATEGIES
from vp_exporter.searching.mask.tuning import METHODS as TUNING
from vp_exporter.searching.schedule.space import SCHEDULED

STATIC = "vpruner"
MIXED = tuple(f"static+{name}" for name in SCHEDULED)
METHODS = (STATIC, *SCHEDULED, *MIXED)
# Default numbers of candidates: exchanges soon overfit, and schedules hardly improve after this many.
EXCHANGES, SCHEDULES = 24, 120
# Default numbers of calibration images. Schedules are fitted to few images and selected on all others.
STATIC_IMAGES, SCHEDULE_IMAGES = 512, 1536


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search, checked for consistency independently of the model.

    Attributes:
        method: A name in METHODS.
        target_macs: Share of the dense MACs, in (0, 1); or
        target_latency: Share of the dense latency, by the engine's measured table (vpruner only).
        min_tokens: Minimum number of patches in every block (vpruner).
        multiple: Patch counts are multiples of it (vpruner).
        evaluations: Candidate plans per strategy; None for EXCHANGES with vpruner, else SCHEDULES.
        minutes: Time limit per strategy; the result then depends on the machine.
        strategies: Strategies of the rearrangement.
        tuning: Stages of the mask tuning, in order; () for none.
        tune_steps: Steps of Adam.
        targets: Loss for the Fisher information: classes sampled from the dense model, a probe of its logits, or
            labels.
        temperature: Softens the loss used to compare candidates during the search. Plain KL decides at the end.
        seed: Seed of all randomness.

    Raises:
        SearchError: if a name is unknown, there is not exactly one budget, or a value is out of range.
    """

    method: str = STATIC
    target_macs: float | None = None
    target_latency: float | None = None
    min_tokens: int = 8
    multiple: int = 1
    evaluations: int | None = None
    minutes: float | None = None
    strategies: tuple[str, ...] = STRATEGIES
    tuning: tuple[str, ...] = TUNING
    tune_steps: int = 12
    targets: str = "model"
    temperature: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SearchError(f"`method` is {self.method!r}", expected=f"one of {', '.join(METHODS)}")
        if self.evaluations is None:
            object.__setattr__(self, "evaluations", EXCHANGES if self.method == STATIC else SCHEDULES)
        if (self.target_macs is None) == (self.target_latency is None):
            found = "no budget is named" if self.target_macs is None else "two budgets are named"
            raise SearchError(found, expected="one of `target_macs=SHARE` and `target_latency=SHARE`")
        for name in ("target_macs", "target_latency"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 < value < 1):
                raise SearchError(f"`{name}` is {value:g}", expected="a share of dense, above 0 and below 1")
        if self.target_latency is not None and self.method != STATIC:
            raise SearchError(
                f"`target_latency` is given with `method={self.method}`", expected=f"`method={STATIC}`",
                fix="ask by `target_macs`: a reducer's own work is not in the measured table",
            )  # fmt: skip
        for name, low in (("min_tokens", 1), ("multiple", 1), ("evaluations", 0), ("tune_steps", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise SearchError(f"`{name}` is {getattr(self, name)}", expected=f"at least {low}")
        if self.minutes is not None and not self.minutes > 0:
            raise SearchError(f"`minutes` is {self.minutes:g}", expected="above 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SearchError(f"`temperature` is {self.temperature:g}", expected="a finite number above 0")
        if self.targets not in TARGETS:
            raise SearchError(f"`targets` is {self.targets!r}", expected=f"one of {', '.join(TARGETS)}")
        for name, known in (("strategies", STRATEGIES), ("tuning", TUNING)):
            strange = [value for value in getattr(self, name) if value not in known]
            if strange:
                argument = {"strategies": "rearrange", "tuning": "tune"}[name]
                raise SearchError(f"`{argument}` names {strange[0]!r}", expected=f"{', '.join(known)}, or none")

    @property
    def share(self) -> float:
        """The budget as a share of the dense model."""
        return self.target_macs if self.target_macs is not None else self.target_latency or 0.0

    @property
    def seconds(self) -> float | None:
        return None if self.minutes is None else 60 * self.minutes

    @property
    def reducer(self) -> str:
        """The data-dependent reducer or cascade of a scheduled or mixed search."""
        return self.method.removeprefix("static+")

    def asked(self) -> dict[str, Any]:
        """Settings that are set, as JSON values: the plan's `budget`."""
        return {key: _plain(value) for key, value in asdict(self).items() if value is not None}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def usual_images(method: str) -> int:
    """Default number of calibration images of a method."""
    return STATIC_IMAGES if method == STATIC else SCHEDULE_IMAGES
