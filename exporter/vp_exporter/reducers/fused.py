"""Protocol of the vp operators passed to `InnerStep.fused`, so that reducers need not import their implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # plans can be read without torch
    from torch import Tensor


class FusedOperators(Protocol):
    """Operators of one or two launches each; implemented by vp_exporter.rewrite.operators."""

    def select(self, scores: Tensor, k: int) -> Tensor:
        """Indices of the k highest of scores, float32 [B, n]: int64 [B, k], ascending."""

    def select_fuse(self, scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`select`, and the sum of the other rows weighted by their scores, [B, 1, D]."""

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
        """Bipartite soft matching and merge: [B, N - r, D] and sizes; with scores, prune or merge as in PPT."""

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
