"""A tiny model with calibration images, for tests of the search."""

from __future__ import annotations

import torch
import torch.nn as nn

from tests.exporter.tiny import tiny_vit
from vp_exporter.model.spec import ModelSpec
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.scoring import Scorer
from vp_exporter.utils.distributed import Workers


def images(description: ModelSpec, count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images: neighbouring patches are similar, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, description.image_size, mode="bilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def calibrated(
    kind: str = "class-token", count: int = 16, batch_size: int = 4, labels: bool = True, workers: Workers | None = None
) -> tuple[nn.Module, ModelSpec, Calibration]:
    """Model, description and calibration images in batches of `batch_size`, a quarter of them held out."""
    vit, description = tiny_vit(kind)
    pictures = images(description, count)
    named = torch.arange(count) % description.num_classes if labels else None
    return (
        vit,
        description,
        Calibration.of_tensors(pictures, named, vit, description, batch_size=batch_size, workers=workers),
    )


def scorer(kind: str = "class-token", count: int = 16, batch_size: int = 4, labels: bool = True) -> Scorer:
    return Scorer(*calibrated(kind, count, batch_size, labels))
