"""Waiting for what must come: so long that only what hangs is given up, on however busy a machine."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG = 900.0  # seconds; the longest that a test waits for one thing. pytest's own limit (pyproject.toml) is twice that.


def until(true: Callable[[], object], why: Callable[[], str] = str, seconds: float = LONG) -> None:
    """Wait for something that must come; `why` is asked if it does not."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {why()[-4000:]}"
        time.sleep(0.02)
