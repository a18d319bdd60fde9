"""The vp operators that a reducer may be: what `InnerStep.fused` is given, so that no reducer imports how they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a plan is read where there is no torch
    from torch import Tensor


class FusedOperators(Protocol):
    """Operators of one launch or two, as vp_exporter.rewrite.operators has them."""

    def select(self, scores: Tensor, k: int) -> Tensor:
        """scores float32 [B, n] -> the k highest, int64 [B, k], ascending."""

    def select_fuse(self, scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same, and the sum of the others' rows weighted by their scores, [B, 1, D]."""

    def match_merge(
        self,
        x: Tensor,
        metric: Tensor,
        size: Tensor | None,
        r: int,
        prefix: int,
        scores: Tensor | None = None,
        tau: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Bipartite soft matching and merge: [B, N - r, D] and sizes; with scores, PPT's choice of two policies."""

    def density_merge(
        self,
        x: Tensor,
        scores: Tensor,
        size: Tensor | None,
        tokens_out: int,
        clusters: int,
        pairs: int,
        prefix: int,
        weights: str,
    ) -> tuple[Tensor, Tensor]:
        """BAT's step: [B, tokens_out, D] and sizes."""
