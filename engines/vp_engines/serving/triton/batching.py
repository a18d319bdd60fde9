"""Choose batch sizes for a server from the measurements in the bundle's report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GAIN = 1.02  # minimum gain in images per second for a larger batch to be preferred
UNMEASURED = 8  # largest batch of an engine that supports any, without measurements


def throughput(report: bytes | None, variant: str) -> dict[int, float]:
    """Images per second by batch size, ascending; empty if nothing was measured.

    Args:
        report: The bundle's report.json.
        variant: "reduced" or "dense".
    """
    rows: list[Mapping[str, Any]] = (json.loads(report).get("latency") or []) if report else []
    found = {int(row["batch"]): float(row[variant]["images_per_second"]) for row in rows if variant in row}
    return dict(sorted(found.items()))


def largest(measured: Mapping[int, float], built_for: int | None) -> tuple[int, str]:
    """Largest batch to form, and why: the one that the engine was built for, else from measurements."""
    if built_for is not None:
        return built_for, "what the engine was built for"
    if measured:
        return max(measured), "the largest that the bundle's report timed; the engine takes any"
    return UNMEASURED, "nothing was timed; the engine takes any"


def preferred(measured: Mapping[int, float], most: int) -> list[int]:
    """Batch sizes up to `most` with more images per second than every smaller measured one; may be empty."""
    sizes, best = [], 0.0
    for size, rate in sorted(measured.items()):
        if size > most:
            break
        if size > 1 and best and rate >= GAIN * best:
            sizes.append(size)
        best = max(best, rate)
    return sizes
