"""A ViT of two blocks, lowered as by the exporter, and checks that every runner must pass."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vp_engines.backends.base import BuildResult, BuildSource, Precision, Runner, TensorSpec
from vp_engines.backends.recording import RecordedRun
from vp_engines.errors import InputError

SIZE, CLASSES, BLOCKS = 32, 10, 2
INPUTS = (TensorSpec("images", "float32", ("batch", 3, SIZE, SIZE)),)
OUTPUTS = (TensorSpec("logits", "float32", ("batch", CLASSES)),)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Logits are of order one; rounding every activation to 11 (fp16) or 8 bits (bf16) causes about this error.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


class FloatIO(nn.Module):
    """A model of any dtype with float32 inputs and outputs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float()


def make_vit(precision: Precision = "fp32") -> nn.Module:
    """Two blocks, 17 tokens, two heads of 64; the same weights at every precision."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=8,
        embed_dim=128,
        depth=BLOCKS,
        num_heads=2,
        num_classes=CLASSES,
        weight_init="jax",
    )
    nn.init.normal_(model.head.weight, std=0.1)
    return FloatIO(model, DTYPES[precision]).eval()


def export(model: nn.Module) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return torch.export.export(model, (torch.rand(2, 3, SIZE, SIZE),), dynamic_shapes=dynamic)


def lower(precision: Precision, folder: Path, *, opset: int = 23, external: bool = False) -> BuildSource:
    """Lower the ViT to an ONNX file in `folder`."""
    path = folder / f"vit_{precision}_{opset}_{external}.onnx"
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(
        make_vit(precision),
        (torch.rand(2, 3, SIZE, SIZE),),
        path,
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=dynamic,
        external_data=external,
        verbose=False,
    )
    return BuildSource(precision, INPUTS, OUTPUTS, onnx=path, attention_blocks=BLOCKS)


def contents(result: BuildResult, folder: Path) -> dict[str, bytes]:
    assert sorted(result.files) == sorted(path.name for path in folder.iterdir())
    return {name: (folder / name).read_bytes() for name in result.files}


def some_images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)


def expected(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def check_outputs(runner: Runner, model: nn.Module, tolerance: float = TOLERANCES["fp32"]) -> None:
    """Check that batches of several sizes match PyTorch, and that outputs are not overwritten by the next run."""
    kept = []
    for batch in (1, 3, 8, 1):
        images = some_images(batch, seed=batch)
        logits = runner.run(images)["logits"]
        assert logits.dtype == np.float32
        assert logits.shape == (batch, CLASSES)
        kept.append((logits, expected(model, images)))
    for logits, wanted in kept:
        assert wanted.std() > 0.1  # comparing zeros with zeros would prove nothing
        np.testing.assert_allclose(logits, wanted, atol=tolerance, rtol=0)


def check_threads(runner: Runner, model: nn.Module, tolerance: float = TOLERANCES["fp32"]) -> None:
    """Check that six threads with different inputs and batch sizes each get their own results."""
    work = [some_images(1 + seed % 3, seed) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda images: runner.run(images)["logits"], work))
    for images, logits in zip(work, results, strict=True):
        np.testing.assert_allclose(logits, expected(model, images), atol=tolerance, rtol=0)


def check_bad_inputs(runner: Runner) -> None:
    with pytest.raises(InputError, match=r"dtype float64; expected a float32 array.*astype\('float32'\)"):
        runner.run(some_images(2).astype(np.float64))
    with pytest.raises(InputError, match=r"shape \[2, 3, 16, 16\]; expected a float32 array of shape \[batch, 3, 32"):
        runner.run(some_images(2)[:, :, :16, :16])
    with pytest.raises(InputError, match=r"shape \[0, 3, 32, 32\]"):
        runner.run(some_images(1)[:0])


def check_closed(runner: Runner) -> None:
    runner.close()
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner.run(some_images(1))


def damaged(files: Mapping[str, bytes], name: str) -> list[dict[str, bytes]]:
    """Copies of `files` in which `name` is empty, truncated, or noise."""
    whole = files[name]
    noise = np.random.default_rng(0).bytes(4096)
    return [{**files, name: content} for content in (b"", whole[: len(whole) // 2], noise)]


def check_recorded(plain: Runner, profiled: Runner) -> list[RecordedRun]:
    """Check that an engine gives the same results with and without its profiler, which records each run."""
    images, start = some_images(3), time.perf_counter()
    for batch in (images[:1], images):
        np.testing.assert_allclose(profiled.run(batch)["logits"], plain.run(batch)["logits"], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"^nothing is recorded; load with profile=True, and ask once$"):
        plain.recorded()
    runs, wall = profiled.recorded(), time.perf_counter() - start
    assert len(runs) == 2
    for run in runs:
        assert len(run.operations) > 10
        starts = [operation.start for operation in run.operations]
        assert starts == sorted(starts)
        assert starts[0] >= 0
        assert all(operation.duration >= 0 and operation.name for operation in run.operations)
        spent = sum(operation.duration for operation in run.operations)
        assert 0 < spent < 4e6 * wall  # microseconds; may count several threads
        if run.duration is not None:
            assert spent <= run.duration
    with pytest.raises(InputError, match="nothing is recorded"):
        profiled.recorded()
    profiled.close()
    with pytest.raises(InputError, match="this engine is closed"):
        profiled.recorded()
    return runs
