"""Geometry of the report's charts, drawn by the template as inline SVG.

Only numbers and plain text, no markup: the template escapes the text.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vp_exporter.validation.baseline import DENSE, Baseline
from vp_exporter.validation.latency import LatencyRow

WIDTH, NARROW = 800.0, 340.0  # user units, about the pixel widths of a page and of a phone
THUMBNAIL = 160
MAX_SAMPLES = 6
MAX_STAGES = 6


@dataclass(frozen=True)
class Bar:
    """A bar in user units, with its kind and label ("" for none)."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str = ""


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class TokenChart:
    """Bar chart over blocks: tokens at attention and at MLP, in front of the dense model's."""

    width: float
    height: float
    left: float
    bottom: float
    bars: list[Bar]
    blocks: list[Tick]
    counts: list[Tick]
    description: str


def token_chart(tokens: Sequence[Mapping[str, int]], dense: int, width: float = WIDTH) -> TokenChart:
    """Chart of `tokens` ({"block", "attention", "mlp"} per block, prefix tokens included) against `dense` tokens."""
    height, left, top, bottom = 250.0, 44.0, 22.0, 212.0
    top_count = max([dense, *(max(row["attention"], row["mlp"]) for row in tokens)])
    page, step = width, (width - left) / len(tokens)
    bars, blocks, before = [], [], None

    def rise(count: float) -> float:
        return (bottom - top) * count / top_count

    every = math.ceil(len(tokens) / (width / 33))
    for i, row in enumerate(tokens):
        x, width = left + i * step, step * 0.78
        x += (step - width) / 2
        bars.append(Bar(x, bottom - rise(dense), width, rise(dense), "dense"))
        for j, kind in enumerate(("attention", "mlp")):
            count, half = row[kind], width / 2
            # Label counts where they change.
            label = str(count) if count != before and (half >= 24 or (j == 0 and step >= 26)) else ""
            bars.append(Bar(x + j * half, bottom - rise(count), half, rise(count), kind, label))
            before = count
        if i % every == 0:
            blocks.append(Tick(left + (i + 0.5) * step, str(row["block"])))
    counts = [Tick(bottom - rise(count), str(count)) for count in _ticks(top_count)]
    first, last = tokens[0], tokens[-1]
    description = (
        f"Tokens per block. Dense: {dense} everywhere. Reduced: {first['attention']} at the attention of block "
        f"{first['block']}, {last['mlp']} at the MLP of block {last['block']}. The table below holds every count."
    )
    return TokenChart(page, height, left, bottom, bars, blocks, counts, description)


@dataclass(frozen=True)
class LatencyLine:
    """One engine at one batch size: a bar to the median, a tick at p90, a whisker to p99.

    Attributes:
        text_y: Text baseline of name and label: next to the bar, or above it on a narrow page.
        kind: "dense" (the baseline) or "reduced"; sets the colour.
        name: Name of the engine.
    """

    y: float
    text_y: float
    kind: str
    name: str
    median: float
    p90: float
    p99: float
    clipped: bool
    label: str


@dataclass(frozen=True)
class LatencyPanel:
    y: float
    title: str
    lines: list[LatencyLine]


@dataclass(frozen=True)
class LatencyChart:
    """One panel per batch size.

    Attributes:
        stacked: Place text above the bars, for a narrow page.
    """

    stacked: bool
    width: float
    height: float
    left: float
    bar: float
    panels: list[LatencyPanel]
    description: str


def latency_chart(rows: Sequence[LatencyRow], baseline: Baseline = DENSE, *, narrow: bool = False) -> LatencyChart:
    """Bars from zero, in one panel per batch size with its own scale (batch 8 takes far longer than batch 1)."""
    names = [_shortened(name, 18 if narrow else 24) for name in (baseline.label, baseline.own)]
    if narrow:
        width, left, right, bar, above, panel = NARROW, 0.0, NARROW - 6, 16.0, 22.0, 124.0
    else:
        width, right, bar, above, panel = WIDTH, WIDTH - 190, 22.0, 0.0, 100.0
        left = max(76.0, 7.5 * max(map(len, names)) + 12)
    panels, words = [], []
    for i, row in enumerate(rows):
        # Clip the scale, so that an outlying p99 does not shrink the medians.
        median = max(row.dense.median_ms, row.reduced.median_ms)
        full = min(max(row.dense.p99_ms, row.reduced.p99_ms), 1.6 * median)
        y, lines = i * panel, []
        sides = (("dense", names[0], row.dense), ("reduced", names[1], row.reduced))
        for j, (kind, name, timing) in enumerate(sides):
            p90, p99 = (min(left + (right - left) * value / full, right) for value in (timing.p90_ms, timing.p99_ms))
            at = y + 30 + above + j * (bar + 8 + above)
            lines.append(
                LatencyLine(
                    at,
                    at - 6 if narrow else at + bar / 2 + 5,
                    kind,
                    name,
                    left + (right - left) * timing.median_ms / full,
                    p90,
                    p99,
                    timing.p99_ms > full,
                    f"{milliseconds(timing.median_ms)} ms (p99 {milliseconds(timing.p99_ms)})",
                )
            )
            words.append(f"{name} at batch {row.batch} {milliseconds(timing.median_ms)} ms")
        found = f"{row.speedup.value:.2f}×" if row.finite else "outputs not finite"
        panels.append(LatencyPanel(y, f"batch {row.batch}: {found}", lines))
    return LatencyChart(
        narrow, width, panel * len(rows), left, bar, panels, "Median latency: " + ", ".join(words) + "."
    )


@dataclass(frozen=True)
class Stage:
    """Patches that enter `block`, as SVG paths with one unit per patch.

    Attributes:
        kept: Number of patches kept.
        dropped_path: Area of the dropped patches.
        hatch_path: A diagonal across each dropped patch.
        border_path: Border between dropped and kept patches.
    """

    block: int
    kept: int
    dropped_path: str
    hatch_path: str
    border_path: str


def stages(kept_stages: Sequence[tuple[int, Sequence[int]]], grid: tuple[int, int]) -> list[Stage]:
    """Stages where the kept set changes, at most `MAX_STAGES` of them, including the first and the last.

    Args:
        kept_stages: (block, kept positions in the original grid, row by row), in order of blocks.
        grid: Rows and columns of patches.
    """
    changes, before = [], set(range(grid[0] * grid[1]))
    for block, positions in kept_stages:
        now = {int(position) for position in positions}
        if now != before:
            changes.append((int(block), now))
        before = now
    if len(changes) > MAX_STAGES:
        chosen = np.linspace(0, len(changes) - 1, MAX_STAGES).round().astype(int)
        changes = [changes[i] for i in chosen]
    return [
        Stage(block, len(kept), _dropped_path(kept, grid), _hatch_path(kept, grid), _border_path(kept, grid))
        for block, kept in changes
    ]


def _dropped_path(kept: set[int], grid: tuple[int, int]) -> str:
    """One rectangle per run of dropped patches in a row."""
    rows, columns = grid
    path = []
    for row in range(rows):
        column = 0
        while column < columns:
            start = column
            while column < columns and row * columns + column not in kept:
                column += 1
            if column > start:
                path.append(f"M{start} {row}h{column - start}v1h-{column - start}z")
            column = max(column, start + 1)
    return "".join(path)


def _hatch_path(kept: set[int], grid: tuple[int, int]) -> str:
    """A diagonal across every dropped patch; those of neighbours connect."""
    dropped = (divmod(at, grid[1]) for at in range(grid[0] * grid[1]) if at not in kept)
    return "".join(f"M{column} {row + 1}l1-1" for row, column in dropped)


def _border_path(kept: set[int], grid: tuple[int, int]) -> str:
    """Edges between a dropped and a kept patch."""
    rows, columns = grid
    path = []
    for at in range(rows * columns):
        row, column = divmod(at, columns)
        if column + 1 < columns and (at in kept) != (at + 1 in kept):
            path.append(f"M{column + 1} {row}v1")
        if row + 1 < rows and (at in kept) != (at + columns in kept):
            path.append(f"M{column} {row + 1}h1")
    return "".join(path)


def thumbnail(image: np.ndarray) -> str:
    """Encode an image uint8 [H, W, 3] as a JPEG data URI, at most 160 pixels a side."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _shortened(name: str, most: int = 24) -> str:
    """Shorten a long name in the middle, for a chart. The tables show it in full."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"


def milliseconds(value: float) -> str:
    """Format with three significant digits: 0.123, 1.23, 12.3, 123."""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def _ticks(top: int) -> list[int]:
    """About four round numbers from 0 to at most `top`."""
    rough = max(1.0, top / 4)
    power = 10 ** math.floor(math.log10(rough))
    step = next(int(power * m) for m in (1, 2, 2.5, 5, 10) if power * m >= rough and power * m == int(power * m))
    return list(range(0, top + 1, step))


def plain(value: Any) -> Any:
    """Convert numpy scalars and arrays, tuples and mappings to JSON values; NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
