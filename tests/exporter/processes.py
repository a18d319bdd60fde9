"""Groups of processes: real ones over gloo, or threads as a stand-in."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tests.ports import free_ports
from tests.waiting import LONG
from tests.warm import start
from vp_exporter.utils.distributed import Workers

T = TypeVar("T")


def together(arguments: list[str], world: int, timeout: float = LONG) -> list[subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` as `world` processes of one group, as torchrun would start them."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports()[0]),
              "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}  # fmt: skip
    started = [
        start(arguments, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        return [process.communicate(timeout) for process in started]
    finally:
        for process in started:  # a hanging process must not outlive its test
            process.kill()


class Threads(Workers):
    """A group of threads in this process, which gather over a shared list."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(values))
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_barrier", barrier)

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value  # type: ignore[attr-defined]
        self._barrier.wait()  # type: ignore[attr-defined]
        found = list(self._values)  # type: ignore[attr-defined]
        self._barrier.wait()  # type: ignore[attr-defined]
        return found

    def from_leader(self, make: Callable[[], T]) -> T:
        made = self.gather(self.agree(lambda: make() if self.leader else None))
        return made[0]  # type: ignore[no-any-return]


def in_threads(world: int, function: Callable[[Workers], T]) -> list[T | Exception]:
    """Result or exception of `function` on each of `world` processes."""
    values, barrier = [None] * world, threading.Barrier(world, timeout=LONG)

    def one(rank: int) -> T | Exception:
        try:
            return function(Threads(rank, values, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))
