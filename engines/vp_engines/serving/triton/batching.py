"""Which batch sizes a server should form, from what the bundle's report measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GAIN = 1.02  # a larger batch is preferred where it does at least so many times the images per second
UNMEASURED = 8  # largest batch of an engine that takes any, where none was measured


def throughput(report: bytes | None, variant: str) -> dict[int, float]:
    """Images per second by batch size, smallest first; {} where nothing was measured.

    Args:
        report: the bundle's report.json.
        variant: "reduced" or "dense".
    """
    rows: list[Mapping[str, Any]] = (json.loads(report).get("latency") or []) if report else []
    found = {int(row["batch"]): float(row[variant]["images_per_second"]) for row in rows if variant in row}
    return dict(sorted(found.items()))


def largest(measured: Mapping[int, float], built_for: int | None) -> tuple[int, str]:
    """The largest batch to form, and why: what the engine was built for, else what was measured."""
    if built_for is not None:
        return built_for, "what the engine was built for"
    if measured:
        return max(measured), "the largest that the bundle's report timed; the engine takes any"
    return UNMEASURED, "nothing was timed; the engine takes any"


def preferred(measured: Mapping[int, float], most: int) -> list[int]:
    """Batch sizes up to `most` that are faster by the image than every smaller measured one; () where none is."""
    sizes, best = [], 0.0
    for size, rate in sorted(measured.items()):
        if size > most:
            break
        if size > 1 and best and rate >= GAIN * best:
            sizes.append(size)
        best = max(best, rate)
    return sizes
