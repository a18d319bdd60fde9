"""Dynamic batching: a first-in, first-out queue in front of one engine, limited by the number of images.

Ray's `serve.batch` closes a batch when its time is up even if the engine is still busy, and moves a request that does
not fit behind all others. This queue gathers for as long as the engine runs, so batches grow with the load, and keeps
requests in order.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Run = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class _Waiting:
    images: np.ndarray
    since: float
    answer: asyncio.Future[tuple[dict[str, np.ndarray], int]]


class Batcher:
    """Gathers requests into batches for `run`.

    All methods must be called on one event loop; `run` is called on `executor`, one batch at a time.

    Args:
        run: float32 [b, 3, H, W] -> arrays by name, axis 0 the batch.
        most: Largest b.
        wait_s: Seconds that a request may wait for others while the engine is idle.
    """

    def __init__(self, run: Run, most: int, wait_s: float, executor: Executor) -> None:
        self._run, self._most, self._wait_s, self._executor = run, most, wait_s, executor
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, images: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Run one request and return its result.

        Args:
            images: float32 [b, 3, H, W], b at most `most`.

        Returns:
            This request's rows of every output, and the size of the batch that ran.

        Raises:
            Whatever `run` raised for the batch of these images.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(images, time.monotonic(), loop.create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._serve())
        return await waiting.answer

    async def _serve(self) -> None:
        """Run batches until the queue is empty."""
        while self._waiting:
            await self._fill()
            if batch := self._take():
                await self._answer(batch)

    async def _fill(self) -> None:
        """Wait until a batch is full, or its oldest request has waited long enough."""
        until = self._waiting[0].since + self._wait_s
        while sum(len(waiting.images) for waiting in self._waiting) < self._most:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """Take as many requests as fit, in order; cancelled ones are dropped."""
        batch: list[_Waiting] = []
        images = 0
        while self._waiting:
            first = self._waiting[0]
            if batch and images + len(first.images) > self._most:
                break
            self._waiting.popleft()
            if not first.answer.cancelled():
                batch.append(first)
                images += len(first.images)
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        import numpy as np

        parts = [waiting.images for waiting in batch]
        size = sum(map(len, parts))

        def run() -> dict[str, np.ndarray]:
            # A single request is not copied: it stays in Ray's shared memory, or in its message.
            return self._run(
                np.require(parts[0], requirements=["C", "A"]) if len(parts) == 1 else np.concatenate(parts)
            )

        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._executor, run)
        except Exception as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        start = 0
        for waiting in batch:
            rows = slice(start, start + len(waiting.images))
            start = rows.stop
            if not waiting.answer.done():
                waiting.answer.set_result(({name: array[rows] for name, array in outputs.items()}, size))
