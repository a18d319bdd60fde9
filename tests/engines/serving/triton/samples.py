"""Bundles for a server: a linear model on 4 x 4 images, whose results identify the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines.bundle_samples import fields, linear_model
from vp_engines.bundle import write_bundle

# Images per second: a batch of 4 pays off, 8 does not.
REPORT = {
    "latency": [
        {"batch": batch, "reduced": {"images_per_second": rate}, "dense": {"images_per_second": rate / 2}}
        for batch, rate in ((1, 100.0), (4, 180.0), (8, 181.0))
    ]
}


def write_linear(out: Path, scale: float = 1.0, **changes: Any) -> Path:
    """Bundle with logits[i] = (scale, -scale) * sum of image i; twice that for the dense model."""
    variants = fields()["variants"]
    variants["reduced"] |= {"files": ["engine/model.onnx"], "requirements": {}}
    given = {"name": "linear", "variants": variants, **changes}
    write_bundle(
        out,
        files={
            "plan.json": b"{}",
            "report.json": json.dumps(REPORT).encode(),
            "engine/model.onnx": linear_model(scale),
            "dense/model.onnx": linear_model(2 * scale),
        },
        **fields(**given),
    )
    return out


def answers(images: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Expected results for `write_linear`."""
    sums = images.reshape(len(images), -1).sum(1, dtype=np.float64)
    return scale * np.stack([sums, -sums], 1)
