"""Bundles and engines for tests that only look at what is reported; nothing really runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vp_engines.bundle import write_bundle
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep

CLASSES = 3
QUICK: dict[str, Any] = {"seconds": 0.01, "batches": (1,)}
LARGE: dict[str, Any] = {  # fields of a bundle with another image size
    "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 64, 64]}],
    "preprocessing": {"input_size": (3, 64, 64), "resize": 64},
    "model": {"img_size": (64, 64)},
}


class FakeEngine:
    """Returns the brightest channel, so that red, green and blue images are classes 0, 1 and 2."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong
        self.closed = False

    def run(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        logits = images.mean(axis=(2, 3)).astype(np.float32)
        return {"logits": np.roll(logits, 1, axis=1) if self.wrong else logits}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *args: object) -> None:
        self.closed = True


def make_bundle(
    folder: Path,
    *,
    name: str = "b.vpe",
    dense: bool = True,
    batch: dict[str, int] | None = None,
    **changes: Any,
) -> Path:
    """A bundle whose engine files are a few bytes; its plan drops one of four patches at block 1.

    Args:
        changes: Fields of the manifest; mappings are merged.
    """
    plan = ReductionPlan(PlanModel("vit_x", (32, 32), (16, 16), 1, 2, 4), (StaticStep(block=1, keep=(0, 1, 3)),))
    folder.mkdir(exist_ok=True)
    variants = {}
    files: dict[str, bytes | Path] = {"plan.json": plan.dumps().encode()}
    for variant, inside in (("reduced", "engine"), ("dense", "dense"))[: 2 if dense else 1]:
        files[f"{inside}/model.onnx"] = b"engine"
        path = f"{inside}/model.onnx"
        variants[variant] = {"artefact": path, "files": [path], "requirements": {}, "notes": []}
    fields: dict[str, Any] = {
        "name": "b",
        "engine": {"name": "ort", "version": "1", "precision": "fp32", "device": "cpu", "batch": batch},
        "variants": variants,
        "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 32, 32]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
        "preprocessing": {"input_size": (3, 32, 32), "resize": 32, "crop_mode": "center", "interpolation": "bicubic",
                       "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        "classes": None,
        "model": {"name": "vit_x", "num_classes": CLASSES, "img_size": (32, 32), "patch_size": (16, 16),
               "weights_sha256": "0" * 64, "weights_source": "made up"},
        "plan": {"path": "plan.json", "fingerprint": plan.fingerprint(), "method": "test", "macs_dense": 10,
              "macs_reduced": 8, "tokens": [[5, 5], [4, 4]]},
        "validation": {"status": "unvalidated", "accuracy": "unmeasured", "latency": "unmeasured", "summary": "no"},
        "kernels": "portable",
    }  # fmt: skip
    for key, value in changes.items():
        fields[key] = {**fields[key], **value} if isinstance(value, dict) else value
    write_bundle(folder / name, files=files, **fields)
    return folder / name
