"""Common style of our plots: colours, size, and rendering to PNG.

matplotlib is imported inside functions only, and its global state is never changed.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from vp_engines.extras import require_packages
from vp_exporter.utils.required_packages import PICTURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
WIDTH = 8.4  # inches; the width of a column in reports
INK, MUTED, LINE = "#1b1f24", "#6b7580", "#dfe3e7"


def require_matplotlib() -> None:
    """Check for matplotlib before long work that ends in a plot.

    Raises:
        PackageMissingError: if matplotlib is not installed.
    """
    require_packages("a picture", "profile", PICTURES)


def plain_text(name: str) -> str:
    """Escape a name for matplotlib: dollars would start a formula, a leading underscore hides it from the legend."""
    text = " ".join(str(name).split()).replace("$", r"\$")
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"\u200b{text}" if text.startswith("_") else text


def png(figure: Figure) -> bytes:
    """Render a figure, without a date and program name, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing glyphs are drawn as boxes
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
