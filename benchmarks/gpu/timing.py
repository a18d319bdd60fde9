"""Timing on a GPU: CUDA graphs, interleaved rounds, medians. The loop itself is independent of the GPU, for testing."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Call = Callable[[], object]
MOST_CALLS = 2000


class Clock(Protocol):
    """Times calls."""

    def sample(self, call: Call, calls: int) -> float:
        """Seconds per call, over `calls` consecutive calls, from an idle device until all are done."""
        ...


class CudaClock:
    """Times with CUDA events, starting on an idle device so that host time is not hidden by an earlier backlog."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, call: Call, calls: int) -> float:
        self._torch.cuda.synchronize()
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3 / calls


class CpuClock:
    """Times with the host's clock, for dry runs."""

    def sample(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Timing:
    """Time of a variant in seconds: median and quartiles over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        if len(ordered) < 2:
            return cls(ordered[0], ordered[0], ordered[0], len(ordered))
        low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(middle, low, high, len(ordered))

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "rounds": self.rounds}


def interleave(
    variants: Mapping[str, Call], clock: Clock, *, rounds: int, sample_seconds: float, seed: int = 0
) -> dict[str, Timing]:
    """Time variants in rounds, each once per round in random order.

    Args:
        variants: name -> function to call.
        rounds: Number of samples per variant.
        sample_seconds: Approximate duration of a sample; calls are repeated to fill it.
    """
    calls: dict[str, int] = {}
    for name, call in variants.items():
        clock.sample(call, 1)  # warm-up: first calls load modules and allocate
        once = max(clock.sample(call, 2), 1e-9)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(sample_seconds / once)))
        clock.sample(call, calls[name])
    order, draw = list(variants), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(clock.sample(variants[name], calls[name]))
    return {name: Timing.of(found) for name, found in samples.items()}


class Graph:
    """Several calls captured in one CUDA graph; calling it replays them.

    Many launches share a graph, so that the gap between replays does not matter. The results of all calls are kept
    alive, so that each writes to memory of its own (rather than to one block that stays in L2).

    Args:
        calls: Captured in order, `launches` of them, starting over at the end.
        launches: Number of calls per replay.
    """

    def __init__(self, calls: Sequence[Call], launches: int) -> None:
        import torch

        self.launches = launches
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and just-in-time kernels initialise outside the capture
            for call in calls:
                call()
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._kept: list[Any] = [None] * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(launches):
                self._kept[i % len(calls)] = calls[i % len(calls)]()

    @property
    def results(self) -> list[Any]:
        """Results of the calls: tensors written by the last replay."""
        return self._kept

    def __call__(self) -> None:
        self._graph.replay()


def per_launch(timings: Mapping[str, Timing], launches: int) -> dict[str, Timing]:
    """Convert timings of graphs of many launches to timings of one launch."""
    return {
        name: Timing(found.median / launches, found.low / launches, found.high / launches, found.rounds)
        for name, found in timings.items()
    }


def buffers_for(size: int, l2: int, low: int = 2, high: int = 24) -> int:
    """Number of buffers of `size` bytes that fill the L2 cache three times, so that no launch finds its input there."""
    return max(low, min(high, math.ceil(3 * l2 / max(1, size))))
