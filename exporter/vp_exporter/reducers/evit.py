"""EViT: keep the patches with the most class attention, fuse the rest into one token (Liang et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice
from vp_exporter.reducers.fused import FusedOperators

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap


@dataclass(frozen=True)
class EvitStep(InnerStep):
    """Keeps the patch tokens with the most class attention.

    Attributes:
        tokens_out: Number of output tokens, prefix and fused token included.
        fuse: Fuse the others into one token, the un-normalised sum of class attention times token (as the authors do).
    """

    tokens_out: int = 0
    fuse: bool = True

    reducer: ClassVar[str] = "evit"

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["tokens_out", "fuse"])
        return cls(block, read.whole("tokens_out", 1), read.flag("fuse"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"class_attention"})

    def apply(self, tokens: Tokens) -> Tokens:
        fused = int(self.fuse)
        why = "at least 1 patch token stays" + (" and the fused one replaces 1 or more" if fused else "")
        self._limit("tokens_out", self.tokens_out, tokens.prefix + 1 + fused, tokens.total, tokens, why)
        return after_choice(tokens, self.tokens_out - tokens.prefix)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Pool, TokenMap

        assert statistics.class_attention is not None
        prefix = stream.prefix
        scores = statistics.class_attention[:, prefix:]
        stay = self.tokens_out - prefix
        if not self.fuse:
            return TokenMap(ops.frame(ops.highest(scores, stay), prefix, shift=prefix))
        best, rest = ops.split(scores, stay - 1)
        keep = ops.frame(best, prefix, shift=prefix)
        weights = ops.take(scores, rest)[:, None, :]
        source = rest + prefix
        return TokenMap(keep, pool=Pool(source, weights, ops.ones(source)[:, None, :], source[:, :1]))

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> TokenMap | None:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import TokenMap

        assert statistics.class_attention is not None
        prefix = stream.prefix
        scores, stay = statistics.class_attention[:, prefix:], self.tokens_out - prefix
        if not self.fuse:
            return TokenMap(ops.frame(operators.select(scores, stay), prefix, shift=prefix))
        if carry_size:  # the fused token's size needs the list of its sources
            return None
        best, rest = operators.select_fuse(scores, stream.x, stay - 1)
        return TokenMap(ops.frame(best, prefix, shift=prefix), extra=rest)
