"""The benchmarks are scripts, not a package: their folder goes on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the kernels leave Triton's interpreter switched on in the process that they share with these."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a process without a GPU, whatever this machine has."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
