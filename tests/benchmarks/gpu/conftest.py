"""Fixtures for the tests of the GPU benchmark, none of which needs a GPU."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel tests in the same process leave Triton's interpreter enabled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment of a process without a GPU, whatever this machine has."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
