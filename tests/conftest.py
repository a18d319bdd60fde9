"""Triton interprets the kernels of this process; whoever compiles them starts another (kernels/support.py).

Here and not in tests/kernels: Triton reads it when it is first imported, which a test of any folder may do.

And what `make test` and `make test-fast` rely on (docs/testing.md): examples are the same each time, files with slow
tests come first, and test functions that should be marked slow are named.
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
# AOTInductor's host code is compiled in two thirds of the time; the kernels are optimised as ever.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

# How long an example takes says how busy the machine is: no deadline, and slow drawing is no failure.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", CALM, derandomize=True)
settings.register_profile("random", CALM)
settings.load_profile("same")

SLOW = 3.0  # seconds of CPU time that all cases of a test function may take together, with what they set up
TOLERANCE = 2.0  # on another machine, or a busy one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a worker that gets the longest of them last would work alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("built")}
    items.sort(key=lambda item: item.path not in slow)
    # Torch's tracing makes millions of small objects: looking for cycles at every 700th is a sixth of its time.
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
    """Name what takes long and is not marked: `make test-fast` must stay fast."""
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
    """torch.compile works where the temporary folder or torch itself lies below a folder with a space in its name; the
    aoti backend sees to that itself."""
    if not any(character.isspace() for character in tempfile.gettempdir() + sys.prefix):
        yield
        return
    from vp_engines.backends.aoti import _paths_without_space

    with _paths_without_space():
        yield
