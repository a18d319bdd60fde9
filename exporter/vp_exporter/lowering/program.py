"""ReducedViT -> torch.export program with a dynamic batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vp_exporter.lowering.signature import BATCH
from vp_exporter.rewrite.reduced_vit import ReducedViT

MAX_BATCH = 1024  # an upper bound that the exporter needs; no engine of ours reserves memory by it


def export_program(model: ReducedViT) -> ExportedProgram:
    """Trace a model that `ReducedViT.for_export` has prepared, on the device that it is on.

    Returns:
        A program of one input, float32 [batch, C, H, W], and one output; its guards hold for 1 to MAX_BATCH images.
    """
    images = example_images(model).to(next(model.parameters()).device)
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=dynamic_batch(), strict=False)


def example_images(model: ReducedViT) -> Tensor:
    """Images to trace with: two of them, because the exporter takes a batch of 1 for a constant."""
    return torch.zeros(2, model.description.in_chans, *model.description.image_size)


def dynamic_batch() -> tuple[dict[int, Any]]:
    """The dynamic shapes of the one input: its axis 0 is called "batch"."""
    return ({0: Dim(BATCH, min=1, max=MAX_BATCH)},)
