"""Test configuration: Triton's interpreter, hypothesis profiles, order of tests, and a check for unmarked slow tests.

Triton reads TRITON_INTERPRET on its first import, which may happen in any folder's tests, so it is set here rather than
in tests/kernels. Tests that compile kernels start another process (kernels/support.py). `make test` and `make
test-fast` rely on the rest (docs/testing.md).
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ["TRITON_INTERPRET"] = "1"
# Compiles AOTInductor's host code in two thirds of the time; kernels are optimised as usual.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

# Examples take longer on a busy machine: no deadline, and slow generation is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", CALM, derandomize=True)
settings.register_profile("random", CALM)
settings.load_profile("same")

SLOW = 3.0  # seconds of CPU time for all cases of a test function together, fixtures included
TOLERANCE = 2.0  # for other or busy machines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no worker is left with the longest at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("built")}
    items.sort(key=lambda item: item.path not in slow)
    # torch's tracing creates millions of small objects; frequent garbage collection takes a sixth of the time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.user_properties.append(("started", _cpu_seconds()))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    finally:
        item.user_properties = [("cpu", _cpu_seconds() - dict(item.user_properties)["started"])]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List slow tests without the mark, to keep `make test-fast` fast."""
    spent: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and not {"slow", "built"} & set(report.keywords):
            spent[report.nodeid.partition("[")[0]] += dict(report.user_properties).get("cpu", 0.0)
    if found := [(name, seconds) for name, seconds in spent.most_common() if seconds > SLOW * TOLERANCE]:
        terminalreporter.section(f"more than {SLOW:g} s of CPU time and not marked slow")
        for name, seconds in found:
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")


@pytest.fixture(autouse=True, scope="session")
def compilable_paths() -> Iterator[None]:
    """Let torch.compile work if the temporary folder or torch is below a folder with a space in its name.

    The aoti backend does so by itself.
    """
    if not any(character.isspace() for character in tempfile.gettempdir() + sys.prefix):
        yield
        return
    from vp_engines.backends.aoti import _paths_without_space

    with _paths_without_space():
        yield
