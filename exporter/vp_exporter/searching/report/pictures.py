"""Plots of a search, as PNG. Blocks are numbered from 0, as in plans.

matplotlib is imported inside functions only, and its global state is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vp_exporter.searching.mask.encoding import mask_of
from vp_exporter.utils.plotting import DPI, INK, LINE, MUTED, WIDTH, plain_text, png, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe palette; yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GONE = "#e9ecef"
GONE_DARK = "#b4bcc4"  # on colour maps whose middle is nearly white
MARKERS = "osD^vPX"
MAX_POINTS = 5000  # dots in the progress plot; more are not readable


def importance_maps(importance: np.ndarray, grid: tuple[int, int]) -> bytes:
    """Heat maps over the patch grid, one per block, with a common logarithmic colour scale.

    Args:
        importance: [depth, patches], nats squared, 0 or more.
        grid: Rows and columns of patches.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.colors import LogNorm, Normalize

    values = np.ma.masked_invalid(np.asarray(importance, dtype=np.float64))
    positive = values[values > 1e-30].compressed()  # smaller values would underflow float32
    norm: Normalize = Normalize(0, 1)
    if len(positive):
        # Keep a few unimportant patches from stretching the scale.
        high = float(positive.max())
        low = min(max(float(np.quantile(positive, 0.01)), 1e-6 * high), high / 2)
        norm = LogNorm(low, high, clip=True)
    maps = [(f"{block}", np.ma.maximum(row, float(norm.vmin or 0)).reshape(grid)) for block, row in enumerate(values)]
    return _heat_maps(maps, grid, "cividis", norm, "importance (nats², log scale)")


def key_bias_map(scales: np.ndarray, grid: tuple[int, int]) -> bytes:
    """Maps of the tuned key scales, one per tuned block (blocks with all scales 1 are left out).

    Args:
        scales: [depth, patches]: factor of each patch's exponentiated attention logit, above 0; 0 or NaN for dropped
            patches.
        grid: Rows and columns of patches.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.colors import Normalize

    scales = np.asarray(scales, dtype=np.float64)
    with np.errstate(all="ignore"):
        logs = np.ma.masked_invalid(np.where(scales > 0, np.log2(scales), np.nan))
    reach = max(float(np.abs(logs).max()) if logs.count() else 0.0, 0.05)
    tuned = [block for block, row in enumerate(logs) if row.count() and np.abs(row).max() > 0]
    maps = [(f"{block}", logs[block].reshape(grid)) for block in (tuned or range(len(logs)))]
    label = "key scale (log scale; grey: gone)"
    return _heat_maps(maps, grid, "PuOr", Normalize(-reach, reach), label, lambda v, _: f"{2**v:.3g}", GONE_DARK)


def kept_sets(kept: np.ndarray, grid: tuple[int, int], depth: int | None = None) -> bytes:
    """Maps of the patches kept in each block; consecutive blocks with equal sets share one.

    Args:
        kept: A mask [depth, patches] (positive is kept), or lifetimes int [patches].
        grid: Rows and columns of patches.
        depth: Number of blocks, for lifetimes; defaults to their maximum.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.colors import ListedColormap, to_hex
    from matplotlib.patches import Patch

    kept = np.asarray(kept)
    mask = mask_of(kept, depth or max(1, int(kept.max(initial=1)))) if kept.ndim == 1 else kept > 0
    starts = [b for b in range(len(mask)) if b == 0 or not np.array_equal(mask[b], mask[b - 1])]
    ends = [*starts[1:], len(mask)]
    titles, states = [], []
    before = np.ones(mask.shape[1], dtype=bool)
    for start, end in zip(starts, ends, strict=True):
        now = mask[start]
        blocks = f"Block {start}" if end == start + 1 else f"Blocks {start}–{end - 1}"
        titles.append(f"{blocks}\n{int(now.sum())} of {now.size} kept")
        states.append(np.where(now, 2, np.where(before, 1, 0)))
        before = now
    figure, axes, _ = _grid_of_axes(len(states), grid, title_height=0.42, bottom=0.42)
    colours = ListedColormap([GONE, COLOURS[4], COLOURS[0]])
    for axis, title, state in zip(axes, titles, states, strict=True):
        _tiles(axis, state.reshape(grid), cmap=colours, vmin=0, vmax=2)
        axis.set_title(title, fontsize=8.5, color=INK, pad=3)
    names = ("gone before", "leaves here", "kept")
    patches = [Patch(color=to_hex(colours(i)), label=name) for i, name in enumerate(names)]
    figure.legend(
        handles=patches[::-1], loc="lower left", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(0.0, 0.0)
    )
    return png(figure)


def tokens_per_block(counts: Mapping[str, Sequence[int]], dense: int) -> bytes:
    """Step plot of token counts over the blocks, one line per name.

    Args:
        counts: name -> tokens that enter the attention of each block.
        dense: Tokens of the dense model.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    depth = max((len(row) for row in counts.values()), default=1)
    figure, axis = _axes(3.4)
    axis.axhline(dense, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="dense")
    for i, (name, row) in enumerate(counts.items()):
        # Steps rather than points: a count applies to a whole block.
        axis.stairs(
            np.asarray(row, dtype=np.float64), np.arange(len(row) + 1) - 0.5, baseline=None, label=plain_text(name),
            color=COLOURS[i % len(COLOURS)], linewidth=2.0, linestyle="-" if i < len(COLOURS) else "--",
        )  # fmt: skip
    axis.set_xlim(-0.5, depth - 0.5)
    axis.set_xticks(range(0, depth, math.ceil(depth / 24)))
    axis.set_ylim(0, 1.08 * max([dense, *(max(row, default=0) for row in counts.values())]))
    axis.set_xlabel("block")
    axis.set_ylabel("tokens at the attention")
    _legend_below(figure, axis)
    return png(figure)


def progress(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot the loss of every candidate as a dot, and the best of its stage as a line.

    Args:
        rows: Of `vp_exporter.searching.limits.Trace`.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    figure, axis = _axes(3.4)
    stages = list(dict.fromkeys(str(row["stage"]) for row in rows))
    all_losses = [float(row[key]) for row in rows for key in ("loss", "best")]
    for i, stage in enumerate(stages):
        own = [row for row in rows if str(row["stage"]) == stage]
        colour = COLOURS[i % len(COLOURS)]
        where = np.array([row["evaluation"] for row in own], dtype=np.float64)
        losses, best = (_positive([float(row[key]) for row in own]) for key in ("loss", "best"))
        some = np.unique(np.linspace(0, len(own) - 1, min(len(own), MAX_POINTS)).astype(int))
        axis.scatter(where[some], losses[some], s=9, color=colour, alpha=0.3, linewidths=0)
        marker = "o" if len(own) == 1 else None
        axis.step(
            where, best, where="post", color=colour, linewidth=2.0, label=plain_text(stage), marker=marker,
            markersize=4, linestyle="-" if i < len(COLOURS) else "--",
        )  # fmt: skip
    _log_axis(axis, all_losses)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axis.set_xlabel("candidates evaluated")
    axis.set_ylabel("loss (mean root of softened KL)")
    if rows:
        _legend_below(figure, axis, title="best so far (dots: each candidate)")
    return png(figure)


def front(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot KL and agreement against multiply-accumulates; points of one name are joined.

    Args:
        points: {"name", "macs_share" (0 to 1 of the dense model), "kl" (nats), "agreement" (percent)}, and "baseline":
            true for points shown for comparison. Figures that are None or missing are not drawn.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    figure, (left, right) = _axes(3.8, columns=2)
    names = list(dict.fromkeys(str(point["name"]) for point in points))
    own = base = 0
    for name in names:
        mine = sorted((p for p in points if str(p["name"]) == name), key=lambda p: float(p["macs_share"]))
        baseline = all(p.get("baseline") for p in mine)
        if baseline:
            style = {"color": MUTED, "marker": MARKERS[base % len(MARKERS)], "markerfacecolor": "white", "zorder": 2}
            base += 1
        else:
            style = {"color": COLOURS[own % len(COLOURS)], "marker": MARKERS[own % len(MARKERS)], "zorder": 3}
            own += 1
        for axis, key in ((left, "kl"), (right, "agreement")):
            known = [p for p in mine if p.get(key) is not None]
            values = [float(p[key]) for p in known]
            axis.plot(
                [100 * float(p["macs_share"]) for p in known], _positive(values) if key == "kl" else values,
                label=plain_text(name), linewidth=1.0 if baseline else 1.8, markersize=6, **style,
            )  # fmt: skip
    _log_axis(left, [float(p["kl"]) for p in points if p.get("kl") is not None])
    left.set_ylabel("KL to the dense model (nats)")
    right.set_ylabel("agreement with the dense model (%)")
    for axis in (left, right):
        axis.set_xlabel("multiply-accumulates (% of dense)")
        axis.margins(x=0.08)
    if names:
        _legend_below(figure, left)
    return png(figure)


def _heat_maps(
    maps: Sequence[tuple[str, np.ndarray]],
    grid: tuple[int, int],
    colours: str,
    norm: Normalize,
    label: str,
    tick: Callable[[float, Any], str] = lambda value, _: f"{value:.3g}",
    gone: str = GONE,
) -> bytes:
    """Maps side by side with a common colour bar."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    palette = matplotlib.colormaps[colours].with_extremes(bad=gone)
    figure, axes, bottom = _grid_of_axes(len(maps), grid, title_height=0.24, bottom=0.62)
    for axis, (title, values) in zip(axes, maps, strict=True):
        _tiles(axis, values, cmap=palette, norm=norm)
        axis.set_title(f"Block {title}", fontsize=8.5, color=INK, pad=3)
    height = figure.get_size_inches()[1]
    bar = figure.add_axes((0.045, (bottom - 0.20) / height, 0.405, 0.12 / height))
    drawn = figure.colorbar(ScalarMappable(norm, palette), cax=bar, orientation="horizontal")
    if isinstance(norm, LogNorm):
        drawn.ax.xaxis.set_major_locator(LogLocator(numticks=6))
        drawn.ax.xaxis.set_minor_formatter(NullFormatter())
        if float(norm.vmax or 1) < 20 * float(norm.vmin or 1):  # less than about a decade: label the ends
            drawn.ax.xaxis.set_ticks(np.geomspace(float(norm.vmin or 1), float(norm.vmax or 1), 3))
    else:
        drawn.ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 5, 10]))
    drawn.ax.xaxis.set_major_formatter(FuncFormatter(tick))
    drawn.outline.set_visible(False)
    drawn.ax.tick_params(labelsize=8, colors=MUTED, length=3)
    figure.text(0.47, (bottom - 0.14) / height, label, fontsize=9, color=INK, va="center")
    return png(figure)


def _grid_of_axes(
    count: int, grid: tuple[int, int], title_height: float, bottom: float
) -> tuple[Figure, list[Axes], float]:
    """Axes in rows, each in the shape of the patch grid, with room for a line below (`bottom` inches)."""
    columns = min(count, 6)
    lines = math.ceil(count / columns)
    gap = 0.14
    width = min(
        (WIDTH - gap) / max(columns, 4) - gap, max(0.95, 2.0 * grid[1] / grid[0])
    )  # limits the height of tall grids
    high = width * grid[0] / grid[1]
    height = bottom + lines * (high + title_height + gap)
    figure = _figure(WIDTH, height)
    axes = []
    for i in range(count):
        line, column = divmod(i, columns)
        y = height - (line + 1) * (high + title_height + gap) + gap
        x = gap + column * (width + gap)
        axes.append(figure.add_axes((x / WIDTH, y / height, width / WIDTH, high / height)))
    return figure, axes, bottom


def _tiles(axis: Axes, values: np.ndarray, **style: Any) -> None:
    axis.imshow(values, interpolation="nearest", aspect="auto", **style)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(LINE)
    if max(values.shape) <= 40:  # grid lines between patches, unless they would hide them
        rows, columns = values.shape
        axis.autoscale(False)
        axis.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, colors="white", linewidth=0.4)
        axis.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, colors="white", linewidth=0.4)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def _axes(height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = _figure(WIDTH, height)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(colors=MUTED, labelsize=9)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.grid(axis="y", color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _legend_below(figure: Figure, axis: Axes, title: str | None = None) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(len(labels), 4, int(110 / (6 + max(len(label) for label in labels)))))
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9, title=title,
        alignment="left", title_fontsize=9,
    )  # fmt: skip


def _log_axis(axis: Axes, values: Sequence[float]) -> None:
    """Logarithmic axis with plain numbers; a range of less than a decade gets labels between powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known:
        return
    axis.set_yscale("log")
    decades = math.log10(max(known) / min(known))
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=12))
    if decades < 0.5:
        middle = math.sqrt(max(known) * min(known))
        axis.set_ylim(min(min(known) * 0.93, middle / 1.8), max(max(known) * 1.07, middle * 1.8))
        axis.yaxis.set_major_locator(LogLocator(subs=tuple(range(1, 10)), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _positive(values: Sequence[float]) -> np.ndarray:
    """Values for a logarithmic axis: NaN where not positive or not finite."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array) & (array > 0), array, np.nan)
