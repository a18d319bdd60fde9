"""What the tests of the GPU benchmark share: none of them needs a GPU."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the kernels leave Triton's interpreter switched on in the process that they share with these."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a process without a GPU, whatever this machine has."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
