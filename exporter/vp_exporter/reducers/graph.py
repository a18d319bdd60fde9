"""GTP's graph of the embedded patches, built once and used by all later steps (Xu et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.reducers import ops


class TokenGraph(nn.Module):
    """Graph of neighbouring patches, with the weight that each neighbour receives of a dropped patch.

    Args:
        places: Positions of the embedded patches in the original grid, row-major.
        columns: Columns of that grid.
        kind: "spatial", "semantic" or "mixed", as in GtpStep.
        count: Semantic neighbours per patch, itself included.
        prefix: Number of leading tokens before the patches.
    """

    beside: Tensor | None
    itself: Tensor

    def __init__(self, places: Sequence[int], columns: int, kind: str, count: int, prefix: int) -> None:
        super().__init__()
        self.kind, self.count, self.prefix = kind, min(count, len(places)), prefix
        codes = ops.grid_codes(list(places), columns)
        beside = None if kind == "semantic" else ops.adjacent(codes, codes, columns) > 0.5
        self.register_buffer("beside", beside, persistent=False)
        self.register_buffer("itself", torch.eye(len(places), dtype=torch.bool)[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the weights.

        Args:
            x: Embedded tokens [B, P + n, D].

        Returns:
            float32 [B, n, n], or [1, n, n] if equal for all images: at [i, j] the weight with which j receives i,
            1 / sqrt(d_i d_j) if i is a neighbour of j, with d the number of neighbours.
        """
        linked = self.beside
        if self.kind != "spatial":
            patches = ops.unit(x[:, self.prefix :])
            cosines = patches @ patches.transpose(1, 2)
            near = cosines >= ops.nth_highest(cosines, self.count)
            linked = near if linked is None else near | linked
        assert linked is not None
        graph = (linked & ~self.itself).float()
        # Isolated patches neither give nor receive; avoid dividing by 0.
        scale = graph.sum(dim=2).clamp_min(1.0).rsqrt()
        return (graph * scale[:, :, None] * scale[:, None, :]).transpose(1, 2)


def code_index(places: Sequence[int], columns: int) -> Tensor:
    """Index of each embedded patch by its grid code (`ops.grid_codes`): int64 [1, codes]."""
    codes = ops.grid_codes(list(places), columns)[0]
    table = torch.zeros(int(codes.max()) + 1, dtype=torch.int64)
    table[codes] = torch.arange(len(places))
    return table[None]
