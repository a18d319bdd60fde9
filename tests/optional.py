"""What `make` sets up for some tests beside the venv, and what becomes of them where it is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str, variable: str) -> NoReturn:
    """Skip for `reason`; fail where the environment sets `variable`, as continuous integration does."""
    if os.environ.get(variable):
        pytest.fail(f"{reason} ({variable} is set)", pytrace=False)
    pytest.skip(reason)
