"""Run tests in a process of their own, so that the fake driver does not affect other tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.kernels.interpreter import complete_interpreter
from tests.kernels.plugins.driver import Driver
from tests.optional import missing
from vp_kernels.plugins.harness import Plugins

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "plugins" / "kernels" / "plugins"
LIBRARY = FOLDER / "libvp_plugins.so"
KERNELS = ROOT / "build" / "plugin-kernels"


def need_plugins() -> None:
    if not LIBRARY.is_file():
        missing("there are no TensorRT plugins: make plugins", "VP_REQUIRE_CPP")


def isolated(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test function of a module in the other process, which has `driver` and `plugins`."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        need_plugins()
        _pool().submit(_call, test.__module__, test.__name__, args, kwargs).result()

    return run


@functools.cache
def driver() -> Driver:
    """The fake driver of this process."""
    return Driver(FOLDER / "fake" / "libcuda.so.1", KERNELS)


@functools.cache
def plugins() -> Plugins:
    """The plugin library, opened after the driver."""
    driver()
    return Plugins(FOLDER / "libvp_plugin_harness.so", LIBRARY)


@functools.cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=complete_interpreter)


def _call(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    driver().reset()
    plugins().log()
    getattr(import_module(module), name).__wrapped__(*args, **kwargs)
