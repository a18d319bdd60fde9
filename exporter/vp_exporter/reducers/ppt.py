"""PPT: prune or pool per image and layer, depending on how peaked the scores are (Wu et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice
from vp_exporter.reducers.fused import FusedOperators

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

ORDERS = ("score", "position")


@dataclass(frozen=True)
class PptStep(InnerStep):
    """Removes `r` tokens: merges similar ones if scores are flat (variance below `tau`), else drops the lowest.

    Attributes:
        tau: Depends on the model and the number of tokens: scores sum to 1, so the variance falls with the token count.
        order: Order of the kept tokens if an image is pruned: by descending "score", as in the authors' code, or by
            "position" (ours). Affects which tokens a later step can pair.
    """

    r: int = 0
    tau: float = 0.0
    order: str = "score"

    reducer: ClassVar[str] = "ppt"
    merges: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    later: ClassVar[Mapping[str, Any]] = {"order": "position"}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        return {"order": "score"}

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["r", "tau"], cls.later)
        return cls(block, read.whole("r", 1), read.number("tau", 0.0), read.word("order", ORDERS))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"class_attention", "value_norm", "keys"})

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches // 2, tokens, "at most half of the patch tokens can merge")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.matching import match
        from vp_exporter.reducers.stream import Merge, TokenMap

        assert statistics.class_attention is not None
        assert statistics.value_norm is not None
        assert statistics.keys is not None
        prefix = stream.prefix
        scores = (statistics.class_attention * statistics.value_norm)[:, prefix:]
        scores = scores / scores.sum(dim=1, keepdim=True)
        centred = scores - scores.mean(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1, keepdim=True) / max(1, scores.shape[1] - 1)
        pool = variance < self.tau  # [B, 1]
        pooled, merge = match(statistics.keys, prefix, self.r)
        kept = ops.ranking(scores, scores.shape[1] - self.r)
        if self.order == "position":
            kept = ops.ascending(kept)
        pruned = ops.frame(kept, prefix, shift=prefix)
        # Both policies have index lists of one shape: a pruned image takes its own rows and merges with weight 0.
        size = ops.ones(merge.source) if stream.size is None else ops.take(stream.size, merge.source)
        weight = pool.float() * size
        return TokenMap(pooled.where(pool, pruned), Merge(merge.source, merge.into, source_weight=weight))

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> Stream | None:
        if self.order == "position":  # the operator orders them by score
            return None

        assert statistics.class_attention is not None
        assert statistics.value_norm is not None
        assert statistics.head_keys is not None
        prefix = stream.prefix
        scores = (statistics.class_attention * statistics.value_norm)[:, prefix:]
        x, size = operators.match_merge(stream.x, statistics.head_keys, stream.size, self.r, prefix, scores, self.tau)
        return replace(stream, x=x, size=size)
