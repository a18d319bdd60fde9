"""Stacked bar chart of the time that each engine spends in each part of the model."""

from __future__ import annotations

from collections.abc import Sequence

from vp_exporter.profiling.groups import ATTENTION, EMBEDDING, GROUPS, HEAD, MLP, NORM, REDUCTION, RUNTIME
from vp_exporter.profiling.measure import Profile
from vp_exporter.utils.plotting import DPI, INK, LINE, MUTED, WIDTH, plain_text, png, require_matplotlib

# Okabe and Ito's colour-blind safe palette; the most prominent colour is for token reduction.
COLOURS = {
    EMBEDDING: "#56B4E9", ATTENTION: "#0072B2", MLP: "#009E73", NORM: "#E69F00", REDUCTION: "#D55E00",
    HEAD: "#CC79A7", RUNTIME: "#b4bcc4",
}  # fmt: skip


def stacked_bars(profiles: Sequence[Profile]) -> bytes:
    """Draw a PNG with a panel per batch size, a bar per engine, and a tick at the time without the profiler.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(profile.batch for profile in profiles))
    labels = list(dict.fromkeys(profile.label for profile in profiles))
    height = 0.75 + len(batches) * (0.55 + 0.42 * len(labels))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    for axis, batch in zip(figure.subplots(len(batches), 1, squeeze=False)[:, 0], batches, strict=True):
        bars = [next(each for each in profiles if (each.label, each.batch) == (label, batch)) for label in labels]
        for row, bar in enumerate(bars):
            left = 0.0
            for group in GROUPS:
                axis.barh(row, bar.groups[group], left=left, height=0.62, color=COLOURS[group],
                          label=group if row == 0 else None)  # fmt: skip
                left += bar.groups[group]
            axis.plot([bar.timing.median_ms] * 2, [row - 0.4, row + 0.4], color=INK, linewidth=1.6)
            axis.annotate(f"{bar.timing.median_ms:.3g} ms", (max(left, bar.timing.median_ms), row), (6, 0),
                          textcoords="offset points", va="center", fontsize=8.5, color=INK)  # fmt: skip
        axis.set_yticks(range(len(bars)), [plain_text(bar.label) for bar in bars], fontsize=9, color=INK)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.set_title(f"batch {batch}", fontsize=9.5, color=INK, loc="left")
        axis.set_xlabel("milliseconds", fontsize=8.5, color=MUTED)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(MUTED)
        axis.tick_params(colors=MUTED, labelsize=8.5, left=False)
        axis.tick_params(axis="y", labelcolor=INK)
        axis.grid(axis="x", color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
    handles, names = figure.axes[0].get_legend_handles_labels()
    shown = [i for i, name in enumerate(names) if any(profile.groups[name] > 0 for profile in profiles)]
    figure.legend([handles[i] for i in shown], [names[i] for i in shown], loc="outside lower left", ncols=7,
                  frameon=False, fontsize=8.5, handlelength=1.0, columnspacing=1.2)  # fmt: skip
    return png(figure)
