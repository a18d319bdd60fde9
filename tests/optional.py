"""Optional test requirements that `make` sets up outside the venv."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str, variable: str) -> NoReturn:
    """Skip for `reason`; fail if the environment variable `variable` is set, as in continuous integration."""
    if os.environ.get(variable):
        pytest.fail(f"{reason} ({variable} is set)", pytrace=False)
    pytest.skip(reason)
