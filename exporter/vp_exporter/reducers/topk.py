"""Top-K pruning by class attention (Haurum et al., ICCVW 2023) or by the score of ATS (Fayyaz et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice
from vp_exporter.reducers.fused import FusedOperators

if TYPE_CHECKING:
    from torch import Tensor

    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

SCORES = ("class", "ats")


@dataclass(frozen=True)
class TopKStep(InnerStep):
    """Keeps the highest-scoring patch tokens, drops the others.

    Attributes:
        tokens_out: Number of output tokens, prefix included.
        score: "class": class attention; "ats": class attention times the norm of the value.
    """

    tokens_out: int = 0
    score: str = "class"

    reducer: ClassVar[str] = "topk"

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["tokens_out"], {"score": "class"})
        return cls(block, read.whole("tokens_out", 1), read.word("score", SCORES))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"class_attention", "value_norm"} if self.score == "ats" else {"class_attention"})

    def apply(self, tokens: Tokens) -> Tokens:
        why = "at least 1 patch token stays"
        self._limit("tokens_out", self.tokens_out, tokens.prefix + 1, tokens.total, tokens, why)
        return after_choice(tokens, self.tokens_out - tokens.prefix)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import TokenMap

        kept = ops.highest(self._scores(stream, statistics), self.tokens_out - stream.prefix)
        return TokenMap(ops.frame(kept, stream.prefix, shift=stream.prefix))

    def _scores(self, stream: Stream, statistics: AttentionStatistics) -> Tensor:
        """Scores of the patch tokens, [B, n]."""
        assert statistics.class_attention is not None
        scores = statistics.class_attention
        if self.score == "ats":
            assert statistics.value_norm is not None
            scores = scores * statistics.value_norm
        return scores[:, stream.prefix :]

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> TokenMap:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import TokenMap

        kept = operators.select(self._scores(stream, statistics), self.tokens_out - stream.prefix)
        return TokenMap(ops.frame(kept, stream.prefix, shift=stream.prefix))
