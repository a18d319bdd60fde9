"""GTP: propagate dropped tokens to their neighbours (Xu et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.errors import PlanError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice

if TYPE_CHECKING:
    from torch import Tensor

    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

SCORES, GRAPHS, SOURCES = ("graph", "class"), ("mixed", "spatial", "semantic"), ("patches", "keys")


@dataclass(frozen=True)
class GtpStep(InnerStep):
    """Drops the `r` patch tokens of lowest score and adds `alpha` times each to its kept neighbours.

    Attributes:
        score: "graph": as in the paper, self-attention times received attention; needs the whole attention map. "class"
            (ours, faster): class attention, one row.
        graph: Neighbours in the patch grid ("spatial"), by cosine similarity ("semantic"), or either ("mixed").
        neighbours: Semantic neighbours per token.
        graph_from: "patches": one graph of all embedded patches, normalised over all of them, as in the authors' code;
            "keys" (ours): a new graph at each block from its keys, normalised over the kept neighbours.
        theta: Share of each head's attention map that is kept; lower entries are set to 0, also for the attention's
            output. Below 1, attention is computed without a fused operator.
    """

    r: int = 0
    alpha: float = 0.1
    score: str = "graph"
    graph: str = "mixed"
    neighbours: int = 8
    graph_from: str = "patches"
    theta: float = 1.0

    reducer: ClassVar[str] = "gtp"
    merges: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    later: ClassVar[Mapping[str, Any]] = {"graph_from": "keys", "theta": 1.0}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        return {"alpha": 0.1, "score": "graph", "graph_from": "patches"}

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        optional = {"score": "class", "graph": "mixed", "neighbours": 8, **cls.later}
        read = Fields(cls.reducer, block, fields, ["r", "alpha"], optional)
        theta = read.number("theta")
        if not 0 < theta <= 1:
            raise PlanError(f"theta of the {read.where} is {theta:g}", expected="a share above 0, at most 1")
        return cls(
            block,
            read.whole("r", 1),
            read.number("alpha", 0.0),
            read.word("score", SCORES),
            read.word("graph", GRAPHS),
            read.whole("neighbours", 1),
            read.word("graph_from", SOURCES),
            theta,
        )

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"class_attention" if self.score == "class" else "graph_score"}
        if self.graph_from == "patches" or self.graph != "semantic":
            needs.add("positions")
        if self.graph_from == "keys" and self.graph != "spatial":
            needs.add("keys")
        return frozenset(needs)

    @property
    def links(self) -> tuple[str, int] | None:
        return (self.graph, self.neighbours) if self.graph_from == "patches" else None

    @property
    def pools_by_size(self) -> bool:
        return self.graph_from == "keys"  # the authors' average pooling is an unweighted mean

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches - 1, tokens, "at least 1 patch token stays")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        import torch.nn.functional as F

        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Propagation, TokenMap

        prefix = stream.prefix
        scores = statistics.class_attention if self.score == "class" else statistics.graph_score
        assert scores is not None
        order = ops.ranking(scores[:, prefix:])
        kept, dropped = order[:, : -self.r], order[:, -self.r :]
        if self.graph_from == "patches":
            share = self._of_graph(stream, kept, dropped)
        else:
            kept, dropped = ops.ascending(kept), ops.ascending(dropped)
            share = self._of_neighbours(stream, statistics, kept, dropped)
        # Prefix rows receive nothing: prepend zero rows.
        mix = F.pad(share * self.alpha, (0, 0, prefix, 0))
        keep = ops.frame(kept, prefix, shift=prefix)
        return TokenMap(keep, propagation=Propagation(dropped + prefix, mix))

    def _of_graph(self, stream: Stream, kept: Tensor, dropped: Tensor) -> Tensor:
        """Weight with which each kept token receives each dropped one, from the graph of patches: float32 [B, K, r]."""
        import torch.nn.functional as F

        from vp_exporter.reducers import ops

        assert stream.links is not None
        assert stream.code_index is not None
        assert stream.positions is not None
        assert self.links is not None
        links = stream.links[self.links]
        rows, columns = (
            ops.take_positions(stream.code_index, ops.take_positions(stream.positions, index))
            for index in (dropped, kept)
        )
        given = F.embedding(rows, links[0]) if self.graph == "spatial" else ops.take_rows(links, rows)
        return ops.take_rows(given.transpose(1, 2), columns)

    def _of_neighbours(self, stream: Stream, statistics: AttentionStatistics, kept: Tensor, dropped: Tensor) -> Tensor:
        """Equal weights for the kept neighbours among the current tokens: float32 [B, K, r]."""
        from vp_exporter.reducers import ops

        prefix = stream.prefix
        linked: Tensor | None = None  # [B, r, K] 1 if a kept token is a neighbour of the dropped one
        if self.graph != "spatial":
            assert statistics.keys is not None
            keys = ops.unit(statistics.keys)
            away, near = ops.take_rows(keys, dropped + prefix), ops.take_rows(keys, kept + prefix)
            cosines = away @ near.transpose(1, 2)
            linked = (cosines >= ops.nth_highest(cosines, min(self.neighbours, kept.shape[1]))).float()
        if self.graph != "semantic":
            assert stream.positions is not None
            codes = [ops.take_positions(stream.positions, rows) for rows in (dropped, kept)]
            beside = ops.adjacent(codes[0], codes[1], stream.columns)
            linked = beside if linked is None else linked.maximum(beside)
        assert linked is not None
        return (linked / linked.sum(dim=2, keepdim=True).clamp_min(1.0)).transpose(1, 2)
