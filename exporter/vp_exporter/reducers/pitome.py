"""PiToMe: merge high-energy tokens, protect isolated ones (Tran et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice

if TYPE_CHECKING:
    from torch import Tensor

    from vp_exporter.reducers.stream import AttentionStatistics, Stream, TokenMap

MATCHINGS = ("bipartite", "protect")


@dataclass(frozen=True)
class PitomeStep(InnerStep):
    """Merges `r` patch tokens, ranked by energy, into others.

    A token's energy is the mean over patch tokens of ELU(cosine of keys - `margin`): high within large groups of
    similar tokens.

    Attributes:
        matching: "bipartite": all patch tokens, even ranks against odd ranks, the `r` most similar pairs merge (the
            authors' first half of the blocks); "protect": of the 2r tokens of highest energy, each even rank merges
            into an odd one, and all others are left alone (their second half).
    """

    r: int = 0
    margin: float = 0.0
    matching: str = "protect"

    reducer: ClassVar[str] = "pitome"
    merges: ClassVar[bool] = True
    later: ClassVar[Mapping[str, Any]] = {"matching": "protect"}

    @classmethod
    def usual(cls, block: int, model: ModelSpec) -> Mapping[str, Any]:
        matching = "bipartite" if block < math.ceil(model.depth / 2) else "protect"
        return {"margin": round(0.75 * (1 - block / model.depth), 6), "matching": matching}

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["r", "margin"], cls.later)
        return cls(block, read.whole("r", 1), read.number("margin"), read.word("matching", MATCHINGS))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"keys"})

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches // 2, tokens, "r tokens merge into r others")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, statistics: AttentionStatistics) -> TokenMap:
        import torch

        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Merge, TokenMap

        assert statistics.keys is not None
        prefix = stream.prefix
        keys = ops.unit(statistics.keys[:, prefix:])
        order = self._by_energy(keys)
        taking_part = stream.patches if self.matching == "bipartite" else 2 * self.r
        a, b = order[:, 0:taking_part:2], order[:, 1:taking_part:2]
        score, partner = ops.best(ops.take_rows(keys, a) @ ops.take_rows(keys, b).transpose(1, 2))
        if self.matching == "bipartite":
            closest = ops.ranking(score)
            merging, alone = closest[:, : self.r], ops.take(a, closest[:, self.r :])
            a, partner = ops.take(a, merging), ops.take(partner, merging)
        else:
            alone = ops.ascending(order[:, taking_part:])
        keep = ops.frame(torch.cat([alone, b], dim=1), prefix, shift=prefix)
        return TokenMap(keep, Merge(a + prefix, partner + (prefix + alone.shape[1])))

    def _by_energy(self, keys: Tensor) -> Tensor:
        """Positions of the patch tokens by descending energy, int64 [B, n]; keys: unit rows [B, n, d]."""
        from vp_exporter.reducers import ops

        # ELU(z) + 1 = max(z, 0) + exp(min(z, 0)). Only ranks matter, so neither the 1 nor the mean is applied. ONNX
        # Runtime's Elu takes longer than all of this.
        z = keys @ keys.transpose(1, 2) - self.margin
        above = z.relu()
        return ops.ranking(((z - above).exp() + above).sum(dim=-1))
