"""What a search is asked: a method, one budget, and how much it may spend."""

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
# Candidates by default: exchanges soon fit the images, and schedules gain little after so many.
EXCHANGES, SCHEDULES = 24, 120
# Calibration images by default. Schedules are fitted to few and decided by all others, whose KL hangs on few images.
STATIC_IMAGES, SCHEDULE_IMAGES = 512, 1536


@dataclass(frozen=True)
class SearchSettings:
    """A request that exists is consistent in itself, whatever the model.

    Attributes:
        method: a name in METHODS.
        target_macs: share of the dense MACs, 0 to 1, both excluded; or
        target_latency: share of the dense latency as the engine's measured table predicts it (vpruner only).
        min_tokens: patches that every block keeps at least (vpruner).
        multiple: patch counts are multiples of it (vpruner).
        evaluations: candidate plans that each strategy may run; None becomes EXCHANGES for vpruner, else SCHEDULES.
        minutes: the same by the clock, for each strategy; the result then depends on the machine.
        strategies: of the rearrangement.
        tuning: of the mask tuning, in order; () for none.
        tune_steps: of Adam.
        targets: whose loss the Fisher information is of: classes drawn from the dense model's own distribution, a probe
            of its logits, or the labels.
        temperature: softens the loss that candidates are compared by while searching. Plain KL decides at the end.
        seed: of everything drawn.

    Raises:
        SearchError: an unknown name, no budget or two, or a value out of its range.
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
        """The budget as a share of dense."""
        return self.target_macs if self.target_macs is not None else self.target_latency or 0.0

    @property
    def seconds(self) -> float | None:
        return None if self.minutes is None else 60 * self.minutes

    @property
    def reducer(self) -> str:
        """The data-dependent reducer or cascade, of a scheduled or mixed search."""
        return self.method.removeprefix("static+")

    def asked(self) -> dict[str, Any]:
        """As JSON values, what is not set left out: the plan's `budget`."""
        return {key: _plain(value) for key, value in asdict(self).items() if value is not None}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def usual_images(method: str) -> int:
    """Calibration images of a method, where nothing is said."""
    return STATIC_IMAGES if method == STATIC else SCHEDULE_IMAGES
