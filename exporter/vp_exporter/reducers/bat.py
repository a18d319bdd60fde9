"""BAT: pair similar attentive tokens, cluster the inattentive ones (Long et al., CVPR 2023).

There is no public implementation, and the equations are taken from SCE-MAE (CVPR 2024, eq. 2-3). docs/reducers.md marks
what is inferred: the density's scale, nearest-centre assignment, matching and weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice
from vp_exporter.reducers.fused import FusedOperators

if TYPE_CHECKING:
    from torch import Tensor

    from vp_exporter.reducers.stream import AttentionStatistics, Merge, Pool, Stream, TokenMap

WEIGHTS = ("attention", "size")


@dataclass(frozen=True)
class BatStep(InnerStep):
    """Leaves `tokens_out` tokens: attentive ones after `pairs` merges, and `clusters` of the inattentive.

    Attributes:
        tokens_out: Number of output tokens, prefix included.
        clusters: Number of tokens that replace the inattentive ones.
        pairs: Merges among attentive tokens.
        weights: Weight means by class "attention" or token "size".
    """

    tokens_out: int = 0
    clusters: int = 0
    pairs: int = 0
    weights: str = "attention"

    reducer: ClassVar[str] = "bat"

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["tokens_out", "clusters", "pairs"], {"weights": "attention"})
        return cls(
            block,
            read.whole("tokens_out", 1),
            read.whole("clusters"),
            read.whole("pairs"),
            read.word("weights", WEIGHTS),
        )

    @property
    def carries_size(self) -> bool:
        return self.weights == "size"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"class_attention"})

    def attentive(self, prefix: int) -> int:
        """n_a: attentive tokens before pairs merge."""
        return self.tokens_out - prefix - self.clusters + self.pairs

    def apply(self, tokens: Tokens) -> Tokens:
        out, high = self.tokens_out, tokens.total - self.pairs
        self._limit(
            "tokens_out", out, tokens.prefix + 1, high, tokens, f"1 patch token or more, after {self.pairs} pairs"
        )
        attentive = self.attentive(tokens.prefix)
        most = out - tokens.prefix
        self._limit("clusters", self.clusters, 0, most, tokens, f"tokens_out leaves room for {most} patch tokens")
        inattentive = tokens.patches - attentive
        why = f"{attentive} attentive tokens are matched"
        self._limit("pairs", self.pairs, 0, max(attentive, 0) // 2, tokens, why)
        low = max(0, min(1, inattentive))
        self._limit(
            "clusters", self.clusters, low, inattentive, tokens, f"{inattentive} inattentive tokens are clustered"
        )
        return after_choice(tokens, self.tokens_out - tokens.prefix)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import TokenMap

        assert statistics.class_attention is not None
        prefix = stream.prefix
        scores = statistics.class_attention[:, prefix:]
        best, rest = ops.split(scores, self.attentive(prefix))
        weight: Tensor | None = None  # [B, N]; None for equal weights
        if self.weights == "attention":
            weight = statistics.class_attention.clamp_min(1e-12)
        elif stream.size is not None:
            weight = stream.size
        keep, merge = self._match(stream, best + prefix, weight)
        pool = self._cluster(stream, rest + prefix, weight) if self.clusters else None
        return TokenMap(keep, merge, pool=pool)

    def _match(self, stream: Stream, rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Merge | None]:
        """Merge the most similar pairs of attentive tokens at `rows` [B, n_a]."""
        import torch

        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Merge

        prefix = stream.prefix
        if not self.pairs:
            return ops.frame(rows, prefix), None
        a, b = rows[:, ::2], rows[:, 1::2]
        score, partner = ops.best(ops.cosines(ops.take_rows(stream.x, a), ops.take_rows(stream.x, b)))
        # Among tokens with one partner, the most similar is paired; ties to the lowest index, hence the strict order.
        rivals = partner[:, :, None] == partner[:, None, :]
        n = a.shape[1]
        higher = score[:, None, :] > score[:, :, None]
        equal = (score[:, None, :] == score[:, :, None]) & ops.lower_triangle(n, score.device)
        beaten = (rivals & (higher | equal)).any(dim=2)
        order = ops.ranking(score - 4.0 * beaten.float())  # cosines differ by at most 2: beaten tokens rank last
        source, single = order[:, : self.pairs], ops.ascending(order[:, self.pairs :])
        keep = ops.frame(torch.cat([ops.take(a, single), b], dim=1), prefix)
        into = ops.take(partner, source) + (stream.prefix + single.shape[1])
        merged = ops.take(a, source)
        if weight is None:
            return keep, Merge(merged, into)
        return keep, Merge(merged, into, ops.take(weight, merged), ops.take(weight, keep))

    def _cluster(self, stream: Stream, rows: Tensor, weight: Tensor | None) -> Pool:
        """Cluster the inattentive tokens at `rows` [B, n_i] by density peaks."""
        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Pool

        t = ops.take_rows(stream.x, rows).float()
        n, width = t.shape[1], t.shape[2]
        squared = ops.squared_distances(t)  # [B, n_i, n_i]
        distance = squared.sqrt()
        # In logarithms: the density itself underflows for distant tokens.
        density = squared.sum(dim=2) / -(n * width)
        denser = (density[:, None, :] > density[:, :, None]) | (
            (density[:, None, :] == density[:, :, None]) & ops.lower_triangle(n, t.device)
        )
        farthest = distance.amax(dim=2)
        # No token is denser than the densest: its distance is its row's maximum rather than infinity.
        nearest = distance.masked_fill(~denser, 1e30).amin(dim=2)
        delta = nearest.where(nearest < 1e29, farthest)
        centres = ops.highest(density + delta.log(), self.clusters)
        to_centre = ops.take_rows(squared, centres)  # [B, K, n_i]: distances are symmetric
        _, nearest_centre = ops.best(-to_centre.transpose(1, 2))
        is_centre = ops.one_hot(centres, n)  # [B, n_i, K]
        belongs = ops.one_hot(nearest_centre, self.clusters)  # [B, K, n_i]
        taken = is_centre.sum(dim=2)[:, None, :]
        members = belongs * (1.0 - taken) + is_centre.transpose(1, 2)
        weighted = members if weight is None else members * ops.take(weight, rows)[:, None, :]
        return Pool(rows, weighted / weighted.sum(dim=2, keepdim=True), members, ops.take(rows, centres))

    def fused(
        self, stream: Stream, statistics: AttentionStatistics, operators: FusedOperators, *, carry_size: bool
    ) -> Stream:
        assert statistics.class_attention is not None
        x, size = operators.density_merge(
            stream.x,
            statistics.class_attention,
            stream.size,
            self.tokens_out,
            self.clusters,
            self.pairs,
            stream.prefix,
            self.weights,
        )
        return replace(stream, x=x, size=size)
