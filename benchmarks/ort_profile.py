"""ONNX Runtime's profile of lowered models: time of each node, and the share of nodes added by a plan."""

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
# Nodes added by a plan: reducers, the mask of proportional attention, the gathers of static steps.
ADDED = re.compile(r"blocks\.\d+(\.(statistics|see|reduce)/|/(Unsqueeze|Expand|Gather)\.)|embed/Gather\.")
MASK = re.compile(r"blocks\.\d+(/(Unsqueeze|Expand)\.|\.reduce/Log\.)")
Kernel = tuple[str, str, float]  # node, operator, milliseconds
Run = list[Kernel]


def profile(paths: Sequence[Path], images: np.ndarray, counts: Mapping[int, int]) -> list[dict[int, list[Run]]]:
    """Kernels of each run, for each model by batch size; the models take turns.

    Args:
        paths: ONNX files; the profiler temporarily writes its logs beside them.
        images: float32 [n, 3, H, W], repeated or cut to each batch size.
        counts: Batch size -> runs, after a few for warm-up.
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
    """Count (name with its numbers masked, operator) among the nodes that are not added by a plan."""
    return Counter((re.sub(r"\d+", "N", name), op) for name, op, _ in run if not ADDED.match(name))


def spent(runs: list[Run], *, op: str | None = None, name: re.Pattern[str] | None = None) -> np.ndarray:
    """Milliseconds of each run in nodes of an operator, or with a matching name."""
    return np.array(
        [sum(ms for n, o, ms in run if op in (None, o) and (name is None or name.match(n))) for run in runs]
    )


def added_work(runs: list[Run]) -> dict[str, Any]:
    """Nodes matching ADDED: milliseconds per run and percent of all kernel time (medians), count, the three slowest."""
    ours, operators = spent(runs, name=ADDED), {op for name, op, _ in runs[0] if ADDED.match(name)}
    each = {op: float(np.median(spent(runs, op=op, name=ADDED))) for op in sorted(operators)}
    return {
        "ms": float(np.median(ours)),
        "share": float(np.median(100 * ours / spent(runs))),
        "nodes": sum(1 for name, *_ in runs[0] if ADDED.match(name)),
        "costliest": sorted(each.items(), key=lambda item: -item[1])[:3],
    }
