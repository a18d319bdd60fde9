"""Batching in a replica, with an engine that blocks until released."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.waiting import LONG
from vp_engines.serving.ray.batching import Batcher


class FakeEngine:
    """Records the batches that it receives; returns each image's first value."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.fails = False

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.entered.set()
        assert self.go.wait(LONG)
        self.sizes.append(len(images))
        if self.fails:
            raise ValueError("no")
        return {"logits": images[:, 0, 0, :1].copy()}


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def parts(*sizes: int) -> list[np.ndarray]:
    numbers = iter(range(1000))
    return [np.stack([np.full((3, 2, 2), next(numbers), np.float32) for _ in range(size)]) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [((1,), [1]), ((4,), [4]), ((1, 2, 1), [4]), ((1, 2, 2), [3, 2]), ((4, 4, 1, 3), [4, 4, 4]), ((3, 2, 1), [3, 3])],
)
def test_images_are_counted_and_nobody_is_overtaken(
    executor: ThreadPoolExecutor, sizes: tuple[int, ...], batches: list[int]
) -> None:
    async def ask() -> None:
        engine, given = FakeEngine(), parts(*sizes)
        batcher = Batcher(engine.run, 4, 0.02, executor)
        found = await asyncio.gather(*map(batcher.submit, given))
        assert engine.sizes == batches
        for images, (outputs, size) in zip(given, found, strict=True):
            assert outputs["logits"][:, 0].tolist() == images[:, 0, 0, 0].tolist()
            assert size in batches

    asyncio.run(ask())


def test_a_batch_grows_while_the_engine_is_busy(executor: ThreadPoolExecutor) -> None:
    """Nine requests arrive one by one, each long after the previous one's wait has expired: they run as 1 and 8."""

    async def ask() -> None:
        engine = FakeEngine()
        engine.go.clear()
        batcher = Batcher(engine.run, 8, 0.0, executor)
        tasks = []
        for images in parts(*[1] * 9):
            tasks.append(asyncio.create_task(batcher.submit(images)))
            while not engine.entered.is_set():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
        engine.go.set()
        await asyncio.gather(*tasks)
        assert engine.sizes == [1, 8]

    asyncio.run(ask())


def test_whoever_has_gone_away_is_not_run(executor: ThreadPoolExecutor) -> None:
    async def ask() -> None:
        engine = FakeEngine()
        batcher = Batcher(engine.run, 8, 0.05, executor)
        gone, stays = [asyncio.create_task(batcher.submit(images)) for images in parts(2, 3)]
        await asyncio.sleep(0)
        gone.cancel()
        _, size = await stays
        assert (size, engine.sizes) == (3, [3])

    asyncio.run(ask())


def test_a_failure_reaches_all_of_its_batch_and_no_other(executor: ThreadPoolExecutor) -> None:
    async def ask() -> None:
        engine = FakeEngine()
        engine.fails = True
        batcher = Batcher(engine.run, 8, 0.02, executor)
        found = await asyncio.gather(*map(batcher.submit, parts(1, 2)), return_exceptions=True)
        assert [str(error) for error in found] == ["no", "no"]
        engine.fails = False
        (images,) = parts(1)
        assert (await batcher.submit(images))[1] == 1

    asyncio.run(ask())
