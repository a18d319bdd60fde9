"""Export a profile as a Chrome trace, for chrome://tracing and Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vp_exporter.profiling.measure import Profile


def chrome_trace(profiles: Sequence[Profile]) -> bytes:
    """JSON of the typical run of each profile: a process per engine, a thread per batch size, times in microseconds.

    The format is Google's "Trace Event Format": complete events ("X") with names for processes and threads ("M").
    """
    labels = list(dict.fromkeys(profile.label for profile in profiles))
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": label}} for pid, label in enumerate(labels)
    ]
    for profile in profiles:
        where = {"pid": labels.index(profile.label), "tid": profile.batch}
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": f"batch {profile.batch}"}})
        for time, operation in zip(profile.operations, profile.typical.operations, strict=True):
            about = {"kind": time.kind, "block": time.block, "median_ms": round(time.milliseconds, 6)}
            events.append(
                {"ph": "X", "name": operation.name, "cat": time.group, "ts": round(operation.start, 3),
                 "dur": round(operation.duration, 3), **where, "args": about}
            )  # fmt: skip
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}).encode()
