"""GTP: what a dropped token knew is propagated to its neighbours (Xu et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice

if TYPE_CHECKING:
    from torch import Tensor

    from vp_exporter.reducers.stream import Seen, Stream, TokenMap

SCORES, GRAPHS = ("class", "graph"), ("mixed", "spatial", "semantic")


@dataclass(frozen=True)
class GtpStep(InnerStep):
    """Drop the `r` patch tokens of lowest score and add `alpha` times each to its kept neighbours, in equal parts.

    Attributes:
        score: "class": class attention (ours: one row); "graph": the paper's, self-attention times received attention,
            which needs the whole map once more and is slow.
        graph: neighbours in the patch grid ("spatial"), by the cosine of keys ("semantic"), or both ("mixed").
        neighbours: semantic neighbours of a token.
    """

    r: int = 0
    alpha: float = 0.2
    score: str = "class"
    graph: str = "mixed"
    neighbours: int = 8

    reducer: ClassVar[str] = "gtp"
    merges: ClassVar[bool] = True
    proportional: ClassVar[bool] = True

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["r", "alpha"], {"score": "class", "graph": "mixed", "neighbours": 8})
        return cls(
            block,
            read.whole("r", 1),
            read.number("alpha", 0.0),
            read.word("score", SCORES),
            read.word("graph", GRAPHS),
            read.whole("neighbours", 1),
        )

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"class_attention" if self.score == "class" else "graph_score"}
        if self.graph != "semantic":
            needs.add("positions")
        if self.graph != "spatial":
            needs.add("keys")
        return frozenset(needs)

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches - 1, tokens, "at least 1 patch token stays")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, seen: Seen) -> TokenMap:
        import torch.nn.functional as F

        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Spread, TokenMap

        prefix = stream.prefix
        scores = seen.class_attention if self.score == "class" else seen.graph_score
        assert scores is not None
        kept, dropped = ops.split(scores[:, prefix:], stream.patches - self.r)
        linked: Tensor | None = None  # [B, r, K] 1 where a kept token is a neighbour of the dropped one
        if self.graph != "spatial":
            assert seen.keys is not None
            keys = ops.unit(seen.keys)
            away, near = ops.take_rows(keys, dropped + prefix), ops.take_rows(keys, kept + prefix)
            cosines = away @ near.transpose(1, 2)
            linked = (cosines >= ops.nth_highest(cosines, min(self.neighbours, kept.shape[1]))).float()
        if self.graph != "semantic":
            assert stream.positions is not None
            codes = [ops.take_positions(stream.positions, rows) for rows in (dropped, kept)]
            beside = ops.adjacent(codes[0], codes[1], stream.columns)
            linked = beside if linked is None else linked.maximum(beside)
        assert linked is not None
        share = linked / linked.sum(dim=2, keepdim=True).clamp_min(1.0)
        # Prefix rows receive nothing: zero columns in front.
        mix = F.pad(share * self.alpha, (prefix, 0)).transpose(1, 2)
        keep = ops.frame(kept, prefix, shift=prefix)
        return TokenMap(keep, spread=Spread(dropped + prefix, mix))
