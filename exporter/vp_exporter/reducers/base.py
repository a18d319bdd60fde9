"""What a reducer is to the rest of the exporter: a named step of a plan that knows its fields and its token count.

Plans are read where there is no torch, so reducers import it, `ops` and `stream` inside the functions that run.
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

# What a reducer may ask of its block's attention (the fields of vp_exporter.reducers.stream.AttentionStatistics).
Need = Literal["class_attention", "keys", "value_norm", "graph_score", "positions"]


@dataclass(frozen=True)
class Tokens:
    """The tokens that a step meets.

    Attributes:
        prefix: class, distillation and register tokens; no reducer ever drops one.
        patches: patch tokens (or tokens merged from them).
        positions: where the patch tokens came from in the original patch grid, ascending; None once a reducer has
            chosen by image, because then each image keeps other ones.
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
        reducer: the word in the plan.
        place: "input" acts on what enters the block; "inner" acts between its attention and its MLP.
        later: fields that came after the first plans were written -> what a plan that lacks them means: what it meant
            before there were such fields.
    """

    block: int

    reducer: ClassVar[str]
    place: ClassVar[Literal["input", "inner"]]
    later: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        """Fields of a new step that nobody laid down: what the authors' released code does at this block."""
        return {}

    @classmethod
    def new(cls, block: int, fields: Mapping[str, Any], model: ModelSpec) -> Self:
        """A step for a new plan: fields that are left out are the authors'.

        Raises:
            PlanError: a field is missing, unknown or malformed.
        """
        return cls.from_fields(block, {**cls.usual(block, model), **fields})

    @classmethod
    @abstractmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        """Read the reducer's own fields of a plan; those of `later` may be missing.

        Raises:
            PlanError: a field is missing, unknown or malformed.
        """

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The reducer's own fields, as JSON values; `from_fields` reads them back."""

    @abstractmethod
    def apply(self, tokens: Tokens) -> Tokens:
        """The tokens that remain: a fixed count, whatever the image.

        Raises:
            PlanError: the step cannot act on these tokens.
        """

    def check_model(self, description: ModelSpec) -> None:  # noqa: B027  (most steps ask for nothing)
        """Refuse a model that lacks what the step needs.

        Raises:
            PlanError: naming the block and what is missing.
        """

    @property
    def where(self) -> str:
        """Names the step in messages."""
        return f"{self.reducer} step at block {self.block}"


@dataclass(frozen=True)
class InnerStep(Step):
    """A step between attention and MLP, which chooses for each image.

    Class attributes:
        merges: tokens come to stand for several patches, so they have sizes.
        proportional: whether its paper adds log(size) to the logits: the default of plans made for it.
    """

    place: ClassVar[Literal["input", "inner"]] = "inner"
    merges: ClassVar[bool] = False
    proportional: ClassVar[bool] = False

    @property
    def carries_size(self) -> bool:
        """Whether a plan with this step carries the tokens' sizes."""
        return self.merges

    @property
    def pools_by_size(self) -> bool:
        """Whether average pooling weighs the tokens that this step leaves by their sizes."""
        return True

    @property
    def theta(self) -> float:
        """Share of each head's attention map that its block keeps, the highest entries; 1: all."""
        return 1.0

    @property
    def links(self) -> tuple[str, int] | None:
        """The graph of the embedded patches that it reads: its kind and its number of neighbours."""
        return None

    def fields(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "block"}

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What it asks of the block's attention."""

    @abstractmethod
    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        """Decide for each image which tokens stay and where the others go: index maps of a fixed shape."""

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> Stream | TokenMap | None:
        """The same by a vp operator that does more than choose; None where there is none: then `choose` decides.

        Args:
            statistics: with `head_keys` in place of `keys`.
            operators: what to call.
            carry_size: the plan carries sizes.

        Returns:
            What leaves (without log sizes), or a map whose new tokens are made already.
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
        """Refuse a count outside `low`..`high`, naming the block and the limit."""
        if low <= value <= high:
            return
        limit = f"{low} to {high}" if low <= high else "more tokens"
        raise PlanError(
            f"{name} of the {self.where} is {value}",
            expected=f"{limit}: {why} ({tokens.prefix} prefix and {tokens.patches} patch tokens enter it)",
            fix="reduce less here, or earlier blocks less",
        )


def after_choice(tokens: Tokens, patches: int) -> Tokens:
    """The tokens behind a step that chooses by image."""
    return Tokens(tokens.prefix, patches, None)


class Fields:
    """Reads a reducer's own fields of a plan, each with its type.

    Args:
        required: fields that must be there.
        optional: fields that may be left out, with their defaults.

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
