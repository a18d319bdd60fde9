"""Write a search report: search.json, and search.html, a single page without scripts or network access."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vp_exporter.searching.checkpoint import write_atomically
from vp_exporter.searching.report import pictures
from vp_exporter.searching.report.comparison import from_rows
from vp_exporter.validation.charts import plain

if TYPE_CHECKING:
    import jinja2

FORMAT, VERSION = "vp-search", 1
OUTCOMES = {  # verdict -> colour in the report's style, and heading
    "better": ("passed", "Better than every baseline"),
    "worse": ("failed", "A baseline is better"),
    "unproven": ("measured", "No gain proven"),
}


@dataclass(frozen=True)
class Picture:
    """A plot on the page: `name` of its file, without .png; `text` is the caption; `alt` the alternative text."""

    name: str
    title: str
    text: str
    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_page(folder: str | Path, result: Mapping[str, Any]) -> list[Path]:
    """Write search.html, search.json and a PNG for each plot into an existing folder, replacing existing files.

    Everything is rendered before anything is written, and each file is written atomically.

    Args:
        result: Content; sections whose key is missing or None are left out. Must not contain local paths.
            title, model, method, budget: One line each.
            verdict: From `SearchVerdict.to_dict`; derived from the rows if missing.
            facts: [name, value] pairs.
            stages: Rows {"name", "macs_share" (0 to 1 of dense), "kl" (nats), "agreement" (percent), "evaluations",
                "seconds", "accepted" (bool), "winner" (bool)}, measured on the held-out images; baselines: the same.
            grid: Rows and columns of patches; needed by the next three unless it is square.
            importance: [depth, patches]; life: int [patches], or mask: [depth, patches]; key_scales: [depth, patches],
                0 or NaN for dropped patches.
            tokens: {"counts": {name: tokens at the attention of each block}, "dense": tokens}.
            trace: Rows of `Trace`; front: points of `pictures.front`.
            warnings: One line each.

    Returns:
        The files written.

    Raises:
        PackageMissingError: if matplotlib is not installed.
        SearchError: if the folder cannot be written.
    """
    folder, drawn = Path(folder), _pictures(result)
    body = plain({"format": FORMAT, "version": VERSION, **result})
    files = {f"{picture.name}.png": picture.png for picture in drawn}
    files["search.json"] = (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    files["search.html"] = _html(result, drawn).encode()
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]


def _pictures(result: Mapping[str, Any]) -> list[Picture]:
    drawn: list[Picture] = []

    def draw(name: str, title: str, text: str, alt: str, make: Callable[[], bytes]) -> None:
        drawn.append(Picture(name, title, text, alt, make()))

    get = result.get
    kept = get("mask") if get("mask") is not None else get("life")
    if kept is not None:
        kept = np.asarray(kept)
        depth = len(get("importance", ())) or None
        draw(
            "kept", "Which patches survive", "The choice is the same for every image. Blocks with the same patches "
            "share a map.", "Maps of the patch grid: patches kept, leaving and gone, by block",
            lambda: pictures.kept_sets(kept, _grid(result, kept), depth),
        )  # fmt: skip
    if tokens := get("tokens"):
        draw(
            "tokens", "Tokens per block", "Counts include prefix tokens.",
            "Tokens that enter the attention of each block",
            lambda: pictures.tokens_per_block(tokens["counts"], int(tokens["dense"])),
        )  # fmt: skip
    if get("front"):
        draw(
            "front", "Accuracy against work", "Measured on the held-out images. Lower is better on the left, higher on "
            "the right; grey marks what is shown to compare with.",
            "KL and agreement with the dense model against multiply-accumulates",
            lambda: pictures.front(result["front"]),
        )  # fmt: skip
    if get("trace"):
        draw(
            "progress", "How the search went", "Measured on the images that were searched on, so lower than on the "
            "held-out ones.", "Loss of each candidate and the best so far, by stage",
            lambda: pictures.progress(result["trace"]),
        )  # fmt: skip
    if get("importance") is not None:
        importance = np.asarray(result["importance"])
        draw(
            "importance", "Importance of patches", "What removing a patch from a block on would cost, by the Fisher "
            "information of the dense model. One colour scale for all blocks.", "Heat maps of importance, by block",
            lambda: pictures.importance_maps(importance, _grid(result, importance)),
        )  # fmt: skip
    if get("key_scales") is not None:
        scales = np.asarray(result["key_scales"], dtype=np.float64)
        draw(
            "key_scales", "Tuned key scales", "How much more (above 1) or less a kept patch is attended to, to make up "
            "for those that are gone.", "Maps of key scales, by block",
            lambda: pictures.key_bias_map(scales, _grid(result, scales)),
        )  # fmt: skip
    return drawn


def _grid(result: Mapping[str, Any], values: np.ndarray) -> tuple[int, int]:
    """The patch grid as given, else a square, else a single row."""
    patches = values.shape[-1]
    if result.get("grid") is not None:
        rows, columns = (int(side) for side in result["grid"])
        if rows * columns != patches:
            raise ValueError(f"a grid of {rows} x {columns} does not hold {patches} patches")
        return rows, columns
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


def _html(result: Mapping[str, Any], drawn: Sequence[Picture]) -> str:
    text = {key: "" if result.get(key) is None else str(result[key]) for key in ("title", "model", "method", "budget")}
    stages, baselines = ([_cells(row) for row in result.get(key) or ()] for key in ("stages", "baselines"))
    verdict = result.get("verdict")
    if verdict is None and (found := from_rows(result.get("stages") or (), result.get("baselines") or ())):
        verdict = found.to_dict()
    _mark(stages, baselines, verdict)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            **text,
            verdict=verdict,
            outcome=OUTCOMES[verdict["outcome"]] if verdict else None,
            figures=_figures(result),
            tables=[
                ("Stages", "each starts from the best plan so far, and is kept if it does better on them", stages),
                ("Baselines", "plans of the same work, chosen without searching", baselines),
            ],
            facts=[(str(name), str(value)) for name, value in result.get("facts") or ()],
            warnings=[str(line) for line in result.get("warnings") or ()],
            pictures=drawn,
        )
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    import jinja2

    here = Path(__file__).parent
    return jinja2.Environment(
        # shares the style of the validation report
        loader=jinja2.FileSystemLoader([here, here.parents[1] / "validation"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Format a table row; "–" for missing figures."""
    accepted = row.get("accepted")
    return {
        "name": str(row.get("name", "")),
        "macs": _number(row.get("macs_share"), "{:.1f}%", 100),
        "kl": _number(row.get("kl"), "{:.4f}"),
        "agreement": _number(row.get("agreement"), "{:.2f}%"),
        "evaluations": _number(row.get("evaluations"), "{:,.0f}"),
        "seconds": _number(row.get("seconds"), "{:,.1f}"),
        "accepted": "" if accepted is None else "kept" if accepted else "rejected",
        "mark": "winner" if row.get("winner") else "",
    }


def _mark(
    stages: Sequence[dict[str, str]], baselines: Sequence[dict[str, str]], verdict: Mapping[str, Any] | None
) -> None:
    """Mark the stage of the final plan (by default the last accepted one), and the best baseline."""
    kept = [row for row in stages if row["accepted"] != "rejected" and row["kl"] != "–"]
    if kept and not any(row["mark"] for row in stages):
        kept[-1]["mark"] = "winner"
    for row in [*stages, *baselines]:
        if verdict is not None and not row["mark"] and row["name"] == verdict["baseline"]:
            row["mark"] = "best baseline"


def _figures(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, detail) of the last accepted stage."""
    kept = [row for row in result.get("stages") or () if row.get("accepted") in (True, None)]
    if not kept:
        return []
    cells = _cells(kept[-1])
    figures = [
        ("Multiply-accumulates", cells["macs"], "of the dense model"),
        ("KL to the dense model", cells["kl"], "nats, on held-out images"),
        ("Agreement with dense", cells["agreement"], "same answer on held-out images"),
        ("Search time", _duration(sum(float(row.get("seconds") or 0) for row in result["stages"])), "over all stages"),
    ]
    return [figure for figure in figures if figure[1] != "–"]


def _number(value: Any, form: str, factor: float = 1) -> str:
    return "–" if value is None or not math.isfinite(float(value)) else form.format(factor * float(value))


def _duration(seconds: float) -> str:
    if seconds <= 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
