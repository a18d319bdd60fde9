"""ONNX Runtime's own profile of lowered models: which nodes took how long, and how much of it a plan has added."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from common import session_options

from vp_engines.backends.ort import runs_in_profile

WARM_UP = 3
# What a plan adds: its reducers, the mask that proportional attention gives to Attention, the gathers of static steps.
ADDED = re.compile(r"blocks\.\d+(\.(statistics|see|reduce)/|/(Unsqueeze|Expand|Gather)\.)|embed/Gather\.")
MASK = re.compile(r"blocks\.\d+(/(Unsqueeze|Expand)\.|\.reduce/Log\.)")
Kernel = tuple[str, str, float]  # node, operator, milliseconds
Run = list[Kernel]


def profile(paths: Sequence[Path], images: np.ndarray, counts: Mapping[int, int]) -> list[dict[int, list[Run]]]:
    """For each model, by batch size, the kernels of each run; the models take turns.

    Args:
        paths: ONNX files; the profiler's logs lie beside them for a moment.
        images: float32 [n, 3, H, W], repeated or cut to each batch size.
        counts: batch size -> runs, after a few that warm up.
    """
    sessions = []
    for path in paths:
        options = session_options()
        options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
        sessions.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    for batch, count in counts.items():
        inputs = np.resize(images, (batch, *images.shape[1:]))
        for _ in range(WARM_UP + count):
            for session in sessions:
                session.run(None, {"images": inputs})
    found = []
    for session in sessions:
        log = Path(session.end_profiling())
        runs = iter(_runs(json.loads(log.read_text())))
        log.unlink()
        found.append({batch: list(islice(runs, WARM_UP + count))[WARM_UP:] for batch, count in counts.items()})
    return found


def _runs(events: list[dict[str, Any]]) -> list[Run]:
    runs = runs_in_profile(events)
    return [[(each.name, each.kind, each.duration / 1000) for each in run.operations] for run in runs]


def kinds(run: Run) -> Counter[tuple[str, str]]:
    """How often each (name with its numbers blotted out, operator) stands among the nodes that no plan has added."""
    return Counter((re.sub(r"\d+", "N", name), op) for name, op, _ in run if not ADDED.match(name))


def spent(runs: list[Run], *, op: str | None = None, name: re.Pattern[str] | None = None) -> np.ndarray:
    """Milliseconds of each run in the nodes of an operator, or with such a name."""
    return np.array(
        [sum(ms for n, o, ms in run if op in (None, o) and (name is None or name.match(n))) for run in runs]
    )


def added_work(runs: list[Run]) -> dict[str, Any]:
    """What ADDED matches: milliseconds a run and percent of all kernels' time (medians), nodes, the three costliest."""
    ours, operators = spent(runs, name=ADDED), {op for name, op, _ in runs[0] if ADDED.match(name)}
    each = {op: float(np.median(spent(runs, op=op, name=ADDED))) for op in sorted(operators)}
    return {
        "ms": float(np.median(ours)),
        "share": float(np.median(100 * ours / spent(runs))),
        "nodes": sum(1 for name, *_ in runs[0] if ADDED.match(name)),
        "costliest": sorted(each.items(), key=lambda item: -item[1])[:3],
    }
