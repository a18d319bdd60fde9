"""Static reduction: remove the same patches from every image (e.g. a searched mask).

No cost per image: positions are constants of the graph, and what leaves before block 0 is never embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from vp_exporter.errors import PlanError
from vp_exporter.reducers.base import Fields, Step, Tokens


@dataclass(frozen=True)
class StaticStep(Step):
    """Keeps the patches at `keep`, positions in the original patch grid (row-major, prefix tokens not counted)."""

    keep: tuple[int, ...] = ()

    reducer: ClassVar[str] = "static"
    place: ClassVar[Literal["input", "inner"]] = "input"

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        keep = Fields(cls.reducer, block, fields, ["keep"]).values["keep"]
        if not isinstance(keep, Sequence) or isinstance(keep, str):
            raise PlanError(f"keep of the static step at block {block} is {keep!r}", expected="a list of positions")
        odd = [value for value in keep if isinstance(value, bool) or not isinstance(value, int)]
        if odd:
            raise PlanError(
                f"keep of the static step at block {block} holds {odd[0]!r}", expected="whole numbers: patch positions"
            )
        return cls(block=block, keep=tuple(keep))

    def fields(self) -> dict[str, Any]:
        return {"keep": list(self.keep)}

    def apply(self, tokens: Tokens) -> Tokens:
        if tokens.positions is None:
            raise PlanError(
                f"the {self.where} comes after a reducer that chooses by image",
                expected="static steps before every other reducer",
                fix="a static position means nothing once images keep different tokens: move it to the front",
            )
        if not self.keep:
            raise PlanError(f"the {self.where} keeps no patch", expected="at least 1", fix="keep one patch or more")
        if any(a >= b for a, b in zip(self.keep, self.keep[1:], strict=False)):
            raise PlanError(
                f"keep of the {self.where} is not sorted or holds a position twice",
                expected="strictly ascending patch positions",
            )
        return Tokens(tokens.prefix, len(self.keep), self.keep)

    def local_index(self, tokens: Tokens) -> tuple[int, ...]:
        """Indices of the kept patches among the entering patch tokens (0-based, prefix tokens not counted)."""
        assert tokens.positions is not None  # ensured by apply()
        place = {position: index for index, position in enumerate(tokens.positions)}
        return tuple(place[position] for position in self.keep)
