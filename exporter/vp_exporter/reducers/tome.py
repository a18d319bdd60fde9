"""ToMe: token merging by bipartite soft matching of the keys (Bolya et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice
from vp_exporter.reducers.fused import FusedOperators

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

ORDERS = ("position", "similarity")


@dataclass(frozen=True)
class TomeStep(InnerStep):
    """Merges the `r` patch tokens with the most similar partner into it, weighted by size.

    Attributes:
        order: Order of the unmerged tokens at even positions: by "position", or by descending "similarity" to their
            partner, as in the authors' code if there is no class token to move back to the front.
    """

    r: int = 0
    order: str = "position"

    reducer: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
    proportional: ClassVar[bool] = True

    later: ClassVar[Mapping[str, Any]] = {"order": "position"}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        return {} if model.prefix_tokens else {"order": "similarity"}

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["r"], cls.later)
        return cls(block, read.whole("r", 1), read.word("order", ORDERS))

    def fields(self) -> dict[str, Any]:
        return {"r": self.r} if self.order == "position" else {"r": self.r, "order": self.order}

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"keys"})

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches // 2, tokens, "at most half of the patch tokens can merge")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        from vp_exporter.reducers.matching import match
        from vp_exporter.reducers.stream import TokenMap

        assert statistics.keys is not None
        return TokenMap(*match(statistics.keys, stream.prefix, self.r, sort=self.order == "position"))

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> Stream | None:
        if self.order == "similarity":  # the operator sorts them by position
            return None
        assert statistics.head_keys is not None
        x, size = operators.match_merge(stream.x, statistics.head_keys, stream.size, self.r, stream.prefix)
        return replace(stream, x=x, size=size)
