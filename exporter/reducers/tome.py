"""ToMe: token merging by bipartite soft matching of the keys (Bolya et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import Seen, Stream, TokenMap


@dataclass(frozen=True)
class TomeStep(InnerStep):
    """Merge the `r` patch tokens that have the most similar partner into it, size-weighted."""

    r: int = 0

    reducer: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
    proportional: ClassVar[bool] = True

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        return cls(block, Fields(cls.reducer, block, fields, ["r"]).whole("r", 1))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"keys"})

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches // 2, tokens, "at most half of the patch tokens can merge")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, seen: Seen) -> TokenMap:
        from vp_exporter.reducers.matching import match
        from vp_exporter.reducers.stream import TokenMap

        assert seen.keys is not None
        return TokenMap(*match(seen.keys, stream.prefix, self.r))

    def fused(self, stream: Stream, seen: Seen, *, carry_size: bool) -> Stream:
        from vp_exporter import operators

        assert seen.head_keys is not None
        x, size = operators.match_merge(stream.x, seen.head_keys, stream.size, self.r, stream.prefix)
        return replace(stream, x=x, size=size)
