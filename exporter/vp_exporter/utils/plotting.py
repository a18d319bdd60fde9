"""What our pictures share: their colours of ink, their size, and how they become PNG.

matplotlib is imported inside the functions only, and no picture touches its global state.
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
WIDTH = 8.4  # inches; a page shows pictures as wide as its column
INK, MUTED, LINE = "#1b1f24", "#6b7580", "#dfe3e7"


def require_matplotlib() -> None:
    """Ask this before long work whose end is a picture.

    Raises:
        PackageMissingError: matplotlib is not installed.
    """
    require_packages("a picture", "profile", PICTURES)


def plain_text(name: str) -> str:
    """A name as it is: dollars would start a formula, and a leading underscore would hide it from the legend."""
    text = " ".join(str(name).split()).replace("$", r"\$")
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"\u200b{text}" if text.startswith("_") else text


def png(figure: Figure) -> bytes:
    """The picture, without the time and the program that drew it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box; nobody can act on that
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
