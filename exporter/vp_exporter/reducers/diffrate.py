"""DiffRate: drop the lowest-ranked tokens, merge the next ones, with counts per layer (Chen et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

WEIGHTS = ("equal", "similarity")


@dataclass(frozen=True)
class DiffRateStep(InnerStep):
    """Ranks patch tokens by class attention, drops the last ones and merges the next into the most similar kept tokens.

    Attributes:
        prune_to: Tokens after dropping, prefix included.
        merge_to: Tokens after merging, prefix included.
        weights: "equal": plain mean of the features, as in the authors' code; "similarity" (ours): weighted by size, a
            source's times its similarity. In both, similarity scales the size that a source contributes.
    """

    prune_to: int = 0
    merge_to: int = 0
    weights: str = "equal"

    reducer: ClassVar[str] = "diffrate"
    merges: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    later: ClassVar[Mapping[str, Any]] = {"weights": "similarity"}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        return {"weights": "equal"}

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["prune_to", "merge_to"], cls.later)
        return cls(block, read.whole("prune_to", 1), read.whole("merge_to", 1), read.word("weights", WEIGHTS))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"class_attention"})

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("prune_to", self.prune_to, tokens.prefix + 1, tokens.total, tokens, "at least 1 patch token stays")
        why = f"at least 1 patch token stays, and prune_to is {self.prune_to}"
        self._limit("merge_to", self.merge_to, tokens.prefix + 1, self.prune_to, tokens, why)
        return after_choice(tokens, self.merge_to - tokens.prefix)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Merge, TokenMap

        assert statistics.class_attention is not None
        prefix = stream.prefix
        stay, alive = self.merge_to - prefix, self.prune_to - prefix
        order = ops.ranking(statistics.class_attention[:, prefix:], alive)
        kept = ops.ascending(order[:, :stay])
        keep = ops.frame(kept, prefix, shift=prefix)
        if stay == alive:
            return TokenMap(keep)
        source = order[:, stay:] + prefix
        # Compare with all output rows, prefix included, so that they are gathered once; then cut off the prefix
        # columns.
        rows, away = ops.take_rows(stream.x, keep).float(), ops.take_rows(stream.x, source).float()
        product = (away @ rows.transpose(1, 2)) / ops.norm(rows).clamp_min(1e-12)[:, None, :]
        similarity, partner = ops.best(product[:, :, prefix:])
        similarity = similarity / ops.norm(away).clamp_min(1e-12)
        weight = similarity if self.weights == "equal" else similarity.clamp_min(0.0)
        if stream.size is not None:
            weight = weight * ops.take(stream.size, source)
        if self.weights == "equal":
            return TokenMap(keep, Merge(source, partner + prefix, source_size=weight))
        return TokenMap(keep, Merge(source, partner + prefix, source_weight=weight))
