"""Shared by the kernel tests: sizes, dtypes, and the common accuracy criterion (see `bounds.py` for its bounds)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from tests.warm import run

# Around every edge of a tile: one below, at and above powers of two; one token; class token plus 7 x 7, 14 x 14.
TOKENS = [1, 2, 15, 16, 17, 50, 63, 64, 65, 100, 127, 128, 129, 196, 197, 198, 256, 257]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_within(name: str, found: Tensor, truth: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """Check that errors are within their rounding bounds, and that NaN and infinity are in the same places.

    Args:
        found: Result of an operator.
        truth: Computed in fp64.
        bound: Of each element, from `bounds.py`.
        dtype: Expected dtype of `found`.
    """
    assert found.shape == truth.shape == bound.shape, f"{name}: {list(found.shape)}, expected {list(truth.shape)}"
    assert found.dtype == dtype
    truth = truth.double()
    wild = ~truth.isfinite()
    assert torch.equal(found.double()[wild].isnan(), truth[wild].isnan()), f"{name}: NaN in other places"
    error = torch.where(wild, 0.0, (found.double() - truth).abs())
    beyond = ~((error <= bound) | wild)  # NaN counts as beyond
    if bool(beyond.any()):
        at = (error / bound.clamp_min(1e-300)).masked_fill(~beyond, -1.0).nan_to_num(torch.inf).argmax()
        raise AssertionError(
            f"{name}: error {error.flatten()[at]:.3e}, bound {bound.flatten()[at]:.3e}, of {truth.flatten()[at]:.3e}; "
            f"{int(beyond.sum())} of {beyond.numel()} beyond theirs"
        )


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal noise, equal on every call."""
    generator = torch.Generator().manual_seed(seed + 1000003 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def without_interpreter(code: str, given: str = "") -> list[str]:
    """Lines printed by a Python process in which kernels are compiled; `given` is its input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run(["-c", code], given=given, env=environment, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
