"""PiToMe: merge where the energy is high, protect what stands alone (Tran et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vp_exporter.reducers.base import Fields, InnerStep, Need, Tokens, after_choice

if TYPE_CHECKING:
    from vp_exporter.reducers.stream import Seen, Stream, TokenMap


@dataclass(frozen=True)
class PitomeStep(InnerStep):
    """Merge `r` of the 2r patch tokens of highest energy into the other r.

    A token's energy is the mean over the patch tokens of ELU(cosine of keys - `margin`): high inside large groups of
    alike tokens.
    """

    r: int = 0
    margin: float = 0.0

    reducer: ClassVar[str] = "pitome"
    merges: ClassVar[bool] = True

    @classmethod
    def from_fields(cls, block: int, fields: Mapping[str, Any]) -> Self:
        read = Fields(cls.reducer, block, fields, ["r", "margin"])
        return cls(block, read.whole("r", 1), read.number("margin"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"keys"})

    def apply(self, tokens: Tokens) -> Tokens:
        self._limit("r", self.r, 1, tokens.patches // 2, tokens, "r tokens merge into r others")
        return after_choice(tokens, tokens.patches - self.r)

    def choose(self, stream: Stream, seen: Seen) -> TokenMap:
        import torch

        from vp_exporter.reducers import ops
        from vp_exporter.reducers.stream import Merge, TokenMap

        assert seen.keys is not None
        prefix = stream.prefix
        keys = ops.unit(seen.keys[:, prefix:])
        # ELU(z) + 1 = max(z, 0) + exp(min(z, 0)). Only the ranks matter, so neither the 1 nor the mean is taken out;
        # ONNX Runtime's Elu takes longer than all of this.
        z = keys @ keys.transpose(1, 2) - self.margin
        above = z.relu()
        energy = ((z - above).exp() + above).sum(dim=-1)
        order = ops.ranking(energy)
        a, b = order[:, 0 : 2 * self.r : 2], order[:, 1 : 2 * self.r : 2]
        protected = ops.ascending(order[:, 2 * self.r :])
        _, partner = ops.best(ops.take_rows(keys, a) @ ops.take_rows(keys, b).transpose(1, 2))
        keep = ops.frame(torch.cat([protected, b], dim=1), prefix, shift=prefix)
        return TokenMap(keep, Merge(a + prefix, partner + (prefix + protected.shape[1])))
