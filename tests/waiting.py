"""Waiting with timeouts long enough for a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG = 900.0  # seconds to wait for one event; half of pytest's own limit (pyproject.toml)


def until(true: Callable[[], object], why: Callable[[], str] = str, seconds: float = LONG) -> None:
    """Wait until `true` returns a true value; `why` provides the message on timeout."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {why()[-4000:]}"
        time.sleep(0.02)
