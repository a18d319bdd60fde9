"""A small bundle for tests: its files are arbitrary bytes, or a linear model if it has to run."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vp_engines.bundle import write_bundle
from vp_engines.manifest import MANIFEST_NAME, Manifest, canonical_json

_FIELDS: dict[str, Any] = {
    "name": "tiny żółw",
    "created": "2026-11-21T03:24:00Z",
    "tool": {"name": "vp-export", "version": "0.1.0"},
    "engine": {
        "name": "ort",
        "version": "1.23.0",
        "precision": "fp32",
        "device": "cpu",
        "batch": {"min": 1, "opt": 8, "max": 64},
    },
    "variants": {
        "reduced": {
            "artefact": "engine/model.onnx",
            "files": ["engine/model.onnx", "engine/more/weights.bin"],
            "requirements": {"onnxruntime": ">=1.23", "nested": [1, 2.5, None, {"a": True}]},
            "notes": ["one note"],
        },
        "dense": {"artefact": "dense/model.onnx", "files": ["dense/model.onnx"], "requirements": {}, "notes": []},
    },
    "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 4, 4]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
    "preprocessing": {
        "input_size": [3, 4, 4],
        "resize": 4,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
    "classes": ["cat", "dog"],
    "model": {
        "name": "vit_tiny",
        "num_classes": 2,
        "img_size": 4,
        "patch_size": [2, 2],
        "weights_sha256": "ab" * 32,
        "weights_source": "a test",
    },
    "plan": {
        "path": "plan.json",
        "fingerprint": "cd" * 32,
        "method": "mask",
        "macs_dense": 1000,
        "macs_reduced": 600,
        "tokens": [5, 5, [4, 3]],
    },
    "validation": {
        "status": "unvalidated",
        "accuracy": "unmeasured",
        "latency": "unmeasured",
        "summary": "not validated",
    },
    "kernels": "portable",
}

FILES: dict[str, bytes] = {
    "plan.json": b'{"plan": 1}\n',
    "engine/model.onnx": bytes(range(256)) * 40,
    "engine/more/weights.bin": b"w" * 5000,
    "dense/model.onnx": b"dense model",
    "report.json": b"{}\n",
    "empty.txt": b"",
}


def fields(**changes: Any) -> dict[str, Any]:
    """Fields of a valid manifest, except its files; a fresh copy."""
    return {**copy.deepcopy(_FIELDS), **changes}


def write_sample(out: Path, *, force: bool = False, files: dict[str, bytes] | None = None, **changes: Any) -> Manifest:
    """Write the sample bundle, with some files or fields changed."""
    return write_bundle(out, files={**FILES, **(files or {})}, force=force, **fields(**changes))


def document(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle as JSON values, without its digest."""
    loaded: dict[str, Any] = json.loads((bundle / MANIFEST_NAME).read_bytes())
    del loaded["digest"]
    return loaded


def signed(changed: dict[str, Any]) -> bytes:
    """A manifest with a correct digest for any content, as an attacker can write."""
    digest = hashlib.sha256(canonical_json(changed)).hexdigest()
    return canonical_json({**changed, "digest": digest})


def forge(bundle: Path, changed: dict[str, Any]) -> None:
    """Replace a bundle's manifest by `changed`, with a correct digest."""
    (bundle / MANIFEST_NAME).write_bytes(signed(changed))


def linear_model(scale: float) -> bytes:
    """A real ONNX file for the sample's images: logits[i] = (scale, -scale) * sum of image i."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto
    weights = np.stack([np.full(48, scale), np.full(48, -scale)], 1).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("images", kind.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", kind.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data
