"""Inputs and outputs of a lowered model: float32 at any precision, with a dynamic batch."""

from __future__ import annotations

from vp_engines.backends.base import TensorSpec
from vp_exporter.rewrite.reduced_vit import ReducedViT

INPUT = "images"
BATCH = "batch"


def signature(model: ReducedViT) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Specs of the inputs and of the outputs."""
    description = model.description
    width = description.num_classes or description.embed_dim
    images = TensorSpec(INPUT, "float32", (BATCH, description.in_chans, *description.image_size))
    return (images,), (TensorSpec(model.output_name, "float32", (BATCH, width)),)
