"""Kernels run in Triton's interpreter (enabled by tests/conftest.py)."""

from __future__ import annotations

import pytest

from tests.kernels.interpreter import complete_interpreter


@pytest.fixture(autouse=True, scope="session")
def whole_interpreter() -> None:
    complete_interpreter()
