"""Shared by the benchmarks: the flowers model and photographs in ../shared, and writing results files."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vp_engines.preprocess import preprocess
from vp_exporter.model.loading import LoadedModel, ModelRequest, load_model
from vp_exporter.model.preprocessing import PreprocessingOverrides, preprocessing_of
from vp_exporter.validation.latency import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "models" / "flowers_vits16.safetensors"
VAL = SHARED / "data" / "flowers" / "val"
MODEL = "vit_small_patch16_224"
MEAN, STD, CROP_PCT = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875  # photographs are stored at 256 pixels
THREADS = 2


def need_shared() -> None:
    """Exit if ../shared is missing.

    Raises:
        SystemExit: with the reason.
    """
    if not WEIGHTS.is_file() or not VAL.is_dir():
        raise SystemExit("the flowers model and photographs are not in ../shared: nothing to measure")


def load_flowers() -> LoadedModel:
    """The fine-tuned ViT-S/16, fp32."""
    return load_model(ModelRequest(MODEL, weights=WEIGHTS))


def preparation(model: LoadedModel) -> Callable[[Path], np.ndarray]:
    """The model's preprocessing: photograph -> float32 [3, 224, 224]."""
    spec = preprocessing_of(model.vit, model.description, PreprocessingOverrides(CROP_PCT, None, MEAN, STD))
    return lambda path: preprocess([path], spec)[0]


def spread(count: int, wanted: int = 16) -> list[int]:
    """`wanted` of `count` indices, evenly spaced so that every class is covered; all if there are fewer."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


def session_options() -> Any:
    """ONNX Runtime session options as in our backend (vp_engines.backends.ort), for sessions that it cannot open.

    Spinning is off there too: threads of an idle session would take the other's cores in an interleaved run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def command_line(script: str) -> str:
    """The command that reproduces a results file, without local paths."""
    given = re.sub(r" --(cache[ =]\S+|measured)", "", " ".join(["", *sys.argv[1:]]))
    return f"python benchmarks/{script}.py" + re.sub(r"--out[ =]\S+", f"--out docs/results/{script}.md", given)


def machine(date: str | None = None) -> str:
    """Description of the machine, one line.

    Args:
        date: Date of the measurements; None for today.
    """
    facts = environment(threads=THREADS)
    return (
        f"Machine: {facts['cpu']}, {facts['cores']} cores, {THREADS} threads, no GPU; {facts['platform']}, Python "
        f"{facts['python']}. Date: {date or facts['date'][:10]}. Shared machine: read the ratios, not the milliseconds."
    )


def prose(text: str) -> str:
    """Wrap a paragraph."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def span(found: Mapping[str, float], digits: int, scale: float = 1.0) -> str:
    """Format an interval, as "0.97 (0.95-0.98)"."""
    value, low, high = (f"{found[key] * scale:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, followed by an empty one."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


class Cache:
    """Measurements made with the given settings, stored in a file if one is named, so that a run can be resumed."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            kept = json.loads(path.read_text())
            if kept["settings"] == settings:
                self.rows = kept["rows"]
            else:
                print("the cache is of other settings, code or versions: starting over", flush=True)

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key, with the "date" of its measurement; measured if missing."""
        if key not in self.rows:
            start = time.perf_counter()
            self.rows[key] = {**measure(), "date": datetime.now(UTC).date().isoformat()}
            print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
            if self.path is not None:
                partial = self.path.with_name(self.path.name + ".tmp")
                partial.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
                os.replace(partial, self.path)
        return self.rows[key]
