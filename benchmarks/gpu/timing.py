"""Timing on a GPU: CUDA graphs, interleaved rounds, medians. The loop itself knows no GPU and is tested without one."""

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
    """Times work."""

    def sample(self, call: Call, calls: int) -> float:
        """Seconds of one call, over `calls` of them in a row, started on an idle device and ended when all are done."""
        ...


class CudaClock:
    """By events. Started on an idle device, so that no variant hides its host time behind another one's backlog."""

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
    """By the host's clock: for dry runs."""

    def sample(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Timing:
    """What a variant took, in seconds: the median and the quartiles over rounds."""

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
    """Time variants round by round, each once a round in an order drawn anew.

    Args:
        variants: name -> one call of it.
        rounds: samples of each.
        sample_seconds: about how long a sample lasts: calls are repeated up to it.
    """
    calls: dict[str, int] = {}
    for name, call in variants.items():
        clock.sample(call, 1)  # warms up: first calls load modules and allocate
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
    """Calls captured in one CUDA graph; calling it replays them.

    Many launches share one graph, so that the gap between two replays does not count. What the calls return is kept
    alive, a slot each, so that as much memory is written as buffers are rotated (and not one block that stays in L2).

    Args:
        calls: captured in order, `launches` of them, starting over at the end.
        launches: how many; replaying costs this many calls.
    """

    def __init__(self, calls: Sequence[Call], launches: int) -> None:
        import torch

        self.launches = launches
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and just-in-time kernels set themselves up outside the capture
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
        """What the calls returned: tensors that the last replay wrote."""
        return self._kept

    def __call__(self) -> None:
        self._graph.replay()


def per_launch(timings: Mapping[str, Timing], launches: int) -> dict[str, Timing]:
    """Of one launch, where a call was a graph of many."""
    return {
        name: Timing(found.median / launches, found.low / launches, found.high / launches, found.rounds)
        for name, found in timings.items()
    }


def buffers_for(size: int, l2: int, low: int = 2, high: int = 24) -> int:
    """How many sets of `size` bytes hold three times the L2 cache, so that no launch finds its input there."""
    return max(low, min(high, math.ceil(3 * l2 / max(1, size))))
