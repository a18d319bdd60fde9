"""What the tests of all kernels share: sizes, dtypes, and the one criterion of accuracy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

# Around every edge of a tile: one below, at and above powers of two; one token; class token plus 7 x 7, 14 x 14.
TOKENS = [1, 2, 15, 16, 17, 50, 63, 64, 65, 100, 127, 128, 129, 196, 197, 198, 256, 257]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The floor of the criterion, in units of the last place of the largest value: rounding of the output alone.
FLOOR_ULPS = 2.0


def assert_as_good(name: str, found: Tensor, same_dtype: Tensor, truth: Tensor, *, factor: float = 2.0) -> None:
    """The error against the truth is at most `factor` times that of torch's own path in the same dtype.

    Args:
        found: the kernel's answer.
        same_dtype: torch's answer, computed in the kernel's dtype.
        truth: computed in higher precision (fp64 where the kernel is fp32).
    """
    assert found.shape == truth.shape, f"{name}: {list(found.shape)}, expected {list(truth.shape)}"
    assert found.dtype == same_dtype.dtype
    if not found.numel():
        return
    truth = truth.double()
    wild = ~truth.isfinite()
    assert torch.equal(found.double()[wild].isnan(), truth[wild].isnan()), f"{name}: NaN in other places"
    assert bool(found.double()[~wild].isfinite().all()), f"{name}: not finite where the truth is"
    error = (found.double() - truth)[~wild].abs().max().item() if bool((~wild).any()) else 0.0
    theirs = (same_dtype.double() - truth)[~wild].abs().nan_to_num(0.0).max().item() if bool((~wild).any()) else 0.0
    scale = truth[~wild].abs().max().item() if bool((~wild).any()) else 0.0
    floor = FLOOR_ULPS * torch.finfo(found.dtype).eps * scale
    assert error <= factor * theirs + floor, f"{name}: error {error:.3e}, torch's {theirs:.3e}, floor {floor:.3e}"


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal noise, the same at every call."""
    generator = torch.Generator().manual_seed(seed + 1000003 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def without_interpreter(code: str, given: str = "") -> list[str]:
    """The lines that a Python process prints whose kernels are compiled, not interpreted; `given` is its input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        input=given,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
