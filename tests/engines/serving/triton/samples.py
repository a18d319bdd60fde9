"""Bundles for a server: a linear model on 4 x 4 images, whose answers say which bundle gave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines.bundle_samples import fields, linear_model
from vp_engines.bundle import write_bundle

# Images per second: 4 pays, 8 does not.
REPORT = {
    "latency": [
        {"batch": batch, "reduced": {"images_per_second": rate}, "dense": {"images_per_second": rate / 2}}
        for batch, rate in ((1, 100.0), (4, 180.0), (8, 181.0))
    ]
}


def write_linear(out: Path, scale: float = 1.0, **changes: Any) -> Path:
    """logits[i] = (scale, -scale) * sum of image i; the dense one twice that."""
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
    """What `write_linear` answers."""
    sums = images.reshape(len(images), -1).sum(1, dtype=np.float64)
    return scale * np.stack([sums, -sums], 1)
