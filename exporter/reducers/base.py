"""What a reducer is to the rest of the exporter: a named step of a plan that knows its fields and its token count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from vp_exporter.errors import PlanError


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
    """

    block: int

    reducer: ClassVar[str]
    place: ClassVar[Literal["input", "inner"]]

    @classmethod
    @abstractmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        """Read the reducer's own fields of a plan.

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

    @property
    def where(self) -> str:
        """Names the step in messages."""
        return f"{self.reducer} step at block {self.block}"


def take_fields(reducer: str, block: int, fields: Mapping[str, Any], known: set[str]) -> None:
    """Check that exactly the `known` fields are there.

    Raises:
        PlanError: naming what is missing or unknown.
    """
    missing, unknown = sorted(known - set(fields)), sorted(set(fields) - known)
    if missing or unknown:
        found = f"lacks {', '.join(missing)}" if missing else f"has the unknown field {', '.join(unknown)}"
        raise PlanError(
            f"the {reducer} step at block {block} {found}", expected=f"exactly the fields {', '.join(sorted(known))}"
        )
