"""Lower a ReducedViT to a torch.export program with a dynamic batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vp_exporter.lowering.signature import BATCH
from vp_exporter.rewrite.reduced_vit import ReducedViT

MAX_BATCH = 1024  # upper bound required by torch.export; does not affect memory use


def export_program(model: ReducedViT) -> ExportedProgram:
    """Trace a model prepared by `ReducedViT.for_export`, on its device.

    Returns:
        A program with one input, float32 [batch, C, H, W], and one output; guards allow 1 to MAX_BATCH images.
    """
    images = example_images(model).to(next(model.parameters()).device)
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=dynamic_batch(), strict=False)


def example_images(model: ReducedViT) -> Tensor:
    """Example inputs for tracing. Two images, since torch.export treats a batch of 1 as constant."""
    return torch.zeros(2, model.description.in_chans, *model.description.image_size)


def dynamic_batch() -> tuple[dict[int, Any]]:
    """Dynamic shapes of the single input: axis 0 is "batch"."""
    return ({0: Dim(BATCH, min=1, max=MAX_BATCH)},)
