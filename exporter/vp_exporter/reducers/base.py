"""Interface of a reducer: a step of a plan with its fields and token count.

Plans can be read without torch, so reducers import torch, `ops` and `stream` inside functions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from vp_exporter.errors import PlanError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers.fused import FusedOperators

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

# Attention statistics that a reducer may request (fields of vp_exporter.reducers.stream.AttentionStatistics).
Need = Literal["class_attention", "keys", "value_norm", "graph_score", "positions"]


@dataclass(frozen=True)
class Tokens:
    """Tokens at the input of a step.

    Attributes:
        prefix: Number of class, distillation and register tokens; never dropped.
        patches: Number of patch tokens (or tokens merged from them).
        positions: Positions of the patch tokens in the original patch grid, ascending; None after a reducer that
            chooses per image.
    """

    prefix: int
    patches: int
    positions: tuple[int, ...] | None

    @property
    def total(self) -> int:
        return self.prefix + self.patches


@dataclass(frozen=True)
class Step(ABC):
    """One reduction at one block (0-based).

    Class attributes:
        reducer: Name in the plan.
        place: "input" acts on the block's input; "inner" acts between attention and MLP.
        later: Fields added since the first release -> value for plans without them, which preserves their meaning.
    """

    block: int

    reducer: ClassVar[str]
    place: ClassVar[Literal["input", "inner"]]
    later: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        """Default fields of a new step at this block, as in the authors' code."""
        return {}

    @classmethod
    def new(cls, block: int, fields: Mapping[str, Any], model: ModelSpec) -> Self:
        """Create a step; omitted fields are set as in the authors' code.

        Raises:
            PlanError: if a field is missing, unknown or malformed.
        """
        return cls.from_fields(block, {**cls.usual(block, model), **fields})

    @classmethod
    @abstractmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        """Create a step from the reducer's fields in a plan; those in `later` may be missing.

        Raises:
            PlanError: if a field is missing, unknown or malformed.
        """

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """Fields of the reducer, as JSON values; the inverse of `from_fields`."""

    @abstractmethod
    def apply(self, tokens: Tokens) -> Tokens:
        """Tokens that remain after the step. The count does not depend on the image.

        Raises:
            PlanError: if the step cannot act on these tokens.
        """

    def check_model(self, description: ModelSpec) -> None:  # noqa: B027  (optional)
        """Check that the model has what the step needs.

        Raises:
            PlanError: naming the block and what is missing.
        """

    @property
    def where(self) -> str:
        """Name of the step in messages."""
        return f"{self.reducer} step at block {self.block}"


@dataclass(frozen=True)
class InnerStep(Step):
    """A step between attention and MLP that chooses tokens per image.

    Class attributes:
        merges: Tokens may stand for several patches, so they have sizes.
        proportional: Whether the paper adds log(size) to the attention logits: the default for new plans.
    """

    place: ClassVar[Literal["input", "inner"]] = "inner"
    merges: ClassVar[bool] = False
    proportional: ClassVar[bool] = False

    @property
    def carries_size(self) -> bool:
        """Whether a plan with this step tracks token sizes."""
        return self.merges

    @property
    def pools_by_size(self) -> bool:
        """Whether average pooling weights tokens by size after this step."""
        return True

    @property
    def theta(self) -> float:
        """Share of each head's attention map that is kept, the highest entries; 1 keeps all."""
        return 1.0

    @property
    def links(self) -> tuple[str, int] | None:
        """Graph of the embedded patches that the step needs: its kind and number of neighbours."""
        return None

    def fields(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "block"}

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Attention statistics that the step needs."""

    @abstractmethod
    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        """Choose, per image, which tokens stay and where the others go: index tensors of static shape."""

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> Stream | TokenMap | None:
        """Perform the step with a vp operator; None if there is none that does more than choose: `choose` is then used.

        Args:
            statistics: With `head_keys` in place of `keys`.
            operators: Implementations of the operators.
            carry_size: Track token sizes.

        Returns:
            The output tokens (without log sizes), or a map whose new tokens are already computed.
        """
        return None

    def check_model(self, description: ModelSpec) -> None:
        if "class_attention" in self.needs and not description.class_token:
            raise PlanError(
                f"the {self.where} scores patches by the class token's attention, "
                f"and {description.name} has no class token",
                expected="a model with a class token",
                fix="use a reducer that needs none: tome, pitome, gtp with score 'graph', or a static mask",
            )

    def _limit(self, name: str, value: int, low: int, high: int, tokens: Tokens, why: str) -> None:
        """Check that a count is in `low`..`high`; the error names the block and the limit."""
        if low <= value <= high:
            return
        limit = f"{low} to {high}" if low <= high else "more tokens"
        raise PlanError(
            f"{name} of the {self.where} is {value}",
            expected=f"{limit}: {why} ({tokens.prefix} prefix and {tokens.patches} patch tokens enter it)",
            fix="reduce less here, or earlier blocks less",
        )


def after_choice(tokens: Tokens, patches: int) -> Tokens:
    """Tokens after a step that chooses per image."""
    return Tokens(tokens.prefix, patches, None)


class Fields:
    """Parses the fields of a reducer in a plan, with type checks.

    Args:
        required: Required fields.
        optional: Optional fields with their defaults.

    Raises:
        PlanError: naming what is missing, unknown or malformed.
    """

    def __init__(
        self,
        reducer: str,
        block: int,
        values: Mapping[str, Any],
        required: Sequence[str],
        optional: Mapping[str, Any] | None = None,
    ) -> None:
        optional = optional or {}
        known = {*required, *optional}
        self.where = f"{reducer} step at block {block}"
        missing, unknown = sorted(set(required) - set(values)), sorted(set(values) - known)
        if missing or unknown:
            found = f"lacks {', '.join(missing)}" if missing else f"has the unknown field {', '.join(unknown)}"
            only = "exactly" if not optional else "only"
            raise PlanError(f"the {self.where} {found}", expected=f"{only} the fields {', '.join(sorted(known))}")
        self.values = {**optional, **values}

    def whole(self, name: str, low: int = 0) -> int:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise PlanError(f"{name} of the {self.where} is {value!r}", expected=f"a whole number, at least {low}")
        return value

    def number(self, name: str, low: float | None = None) -> float:
        value = self.values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            number = float(value) if is_number else math.nan
        except OverflowError:
            number = math.nan
        if not math.isfinite(number) or (low is not None and number < low):
            limit = "" if low is None else f", at least {low:g}"
            raise PlanError(f"{name} of the {self.where} is {value!r}", expected=f"a finite number{limit}")
        return number

    def flag(self, name: str) -> bool:
        value = self.values[name]
        if not isinstance(value, bool):
            raise PlanError(f"{name} of the {self.where} is {value!r}", expected="true or false")
        return value

    def word(self, name: str, words: Sequence[str]) -> str:
        value = self.values[name]
        if not isinstance(value, str) or value not in words:
            raise PlanError(f"{name} of the {self.where} is {value!r}", expected=" or ".join(words))
        return value
