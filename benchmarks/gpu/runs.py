"""Measure rows once each in child processes that may hang or die, and store them as they finish.

On leased devices a command ends after ten minutes, and a faulty kernel kills its process. So every row is written at
once, a dying child loses one row, and a later command continues from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.setup import first_line

RESTART = 75  # exit code of a child whose GPU context is lost: the rest needs a new process
GRACE = 25.0  # seconds after the deadline for a row in progress
STUCK = 45.0  # a row killed after this many seconds is marked as failed; a younger one is retried by the next command
FORMAT = "vp-gpu-bench-1"


class PostponedError(Exception):
    """A row that waits for another one: neither measured nor failed."""


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        part: "machine", "kernels-check", ...
        key: Readable name, unique in the part.
        sources: Fingerprint of the code that determines it.
        seconds: Estimated duration; not started if less time is left.
        measure: Performs the measurement; returns JSON values.
        group: Rows of a group share an expensive set-up.
    """

    part: str
    key: str
    sources: str
    seconds: float
    measure: Callable[[], dict[str, Any]]
    group: str = ""

    @property
    def name(self) -> str:
        return f"{self.part}: {self.key}"


class Results:
    """Finished rows by name, in a file that is rewritten after every row.

    Args:
        path: None keeps them in memory.
        mirror: Second copy, e.g. in a folder that is transferred back from a device machine.
    """

    def __init__(self, path: Path | None, mirror: Path | None = None) -> None:
        self.path, self.mirror = path, mirror
        self.rows: dict[str, dict[str, Any]] = _read(path)

    def fresh(self, row: Row, *, retry: bool = False) -> dict[str, Any] | None:
        """The row if it was measured with the same sources, else None (also, with `retry`, if it failed)."""
        found = self.rows.get(row.name)
        if found is None or found.get("sources") != row.sources or (retry and "error" in found):
            return None
        return found

    def put(self, row: Row, found: Mapping[str, Any], seconds: float) -> None:
        """Store a row and write the file."""
        entry = {"part": row.part, "key": row.key, "group": row.group, "sources": row.sources}
        self.rows[row.name] = {**entry, **found, "seconds": round(seconds, 2), "date": _now()}
        self.write()

    def absorb(self, path: Path) -> int:
        """Merge newer rows of another file; returns how many."""
        new = 0
        for name, row in _read(path).items():
            mine = self.rows.get(name)
            if mine is None or mine.get("date", "") < row.get("date", ""):
                self.rows[name], new = row, new + 1
        if new:
            self.write()
        return new

    def write(self) -> None:
        text = json.dumps({"format": FORMAT, "rows": self.rows}, indent=1)
        for path in filter(None, (self.path, self.mirror)):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".tmp")
            partial.write_text(text)
            os.replace(partial, path)

    def of(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.rows.values() if row["part"] == part]


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
        rows: dict[str, dict[str, Any]] = data["rows"] if data["format"] == FORMAT else {}
    except (ValueError, KeyError, TypeError):
        rows = {}
        print(f"{path} is no results file of this script: starting over", flush=True)
    return rows


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def run_rows(
    rows: Iterable[Row],
    results: Results,
    *,
    deadline: float,
    current: Path | None = None,
    retry: bool = False,
    healthy: Callable[[], bool] = lambda: True,
    now: Callable[[], float] = time.time,
    say: Callable[[str], None] = print,
) -> int:
    """Measure missing rows; a failing row is recorded and does not stop the others.

    Args:
        deadline: Epoch seconds; rows that would end later are not started.
        current: File that names the row in progress, in case this process dies.
        healthy: Whether the device still works after a failure.

    Returns:
        0, or RESTART if the process cannot continue.
    """
    for row in rows:
        if results.fresh(row, retry=retry) is not None or now() + row.seconds > deadline:
            continue
        if current is not None:
            current.write_text(json.dumps({"name": row.name, "sources": row.sources, "start": now()}))
        start, sick = now(), False
        try:
            found = row.measure()
        except PostponedError as error:
            if current is not None:
                current.unlink(missing_ok=True)
            say(f"{row.name}: later: {error}")
            continue
        except Exception as error:  # compilers, drivers and kernels raise many types
            found, sick = {"error": first_line(error)}, not healthy()
        results.put(row, found, now() - start)
        if current is not None:
            current.unlink(missing_ok=True)
        say(f"{row.name}: {found.get('error') or found.get('say') or 'done'} [{now() - start:.1f} s]")
        if sick:
            say("the GPU does not answer this process any more: going on in a new one")
            return RESTART
    return 0


@dataclass
class Child:
    """A process that measures a share of the rows and writes them to a file.

    Attributes:
        rows: Its rows by name.
    """

    command: Sequence[str]
    shard: Path
    rows: Mapping[str, Row]
    environment: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 8
    process: subprocess.Popen[bytes] | None = None

    @property
    def current(self) -> Path:
        return self.shard.with_name(self.shard.name + ".current")

    def start(self) -> None:
        self.current.unlink(missing_ok=True)
        env = {**os.environ, **self.environment}
        self.process = subprocess.Popen(list(self.command), env=env, start_new_session=True)

    def kill(self) -> None:
        """Kill the process and its children (compilers), which form a session."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def blame(self, results: Results, why: str, *, older_than: float = 0.0) -> bool:
        """Record the row in progress as failed; False if there is none (or only a young one)."""
        try:
            found = json.loads(self.current.read_text())
        except (OSError, ValueError):
            return False
        age = time.time() - found["start"]
        row = self.rows.get(found["name"])
        if row is None or age < older_than:
            return False
        results.put(row, {"error": why}, age)
        print(f"{row.name}: {why}", flush=True)
        return True


def supervise(
    children: Sequence[Child], results: Results, *, deadline: float, late_is_failure: bool = True, poll: float = 0.3
) -> bool:
    """Run children side by side until all are done or time is up, collecting their rows in `results`.

    Args:
        late_is_failure: Record a row that is running at the deadline as failed. Builds are merely slow, and are
            retried.

    Returns:
        Whether every child ended by itself.
    """
    for child in children:
        child.start()
    waiting = list(children)
    clean = True
    try:
        while waiting:
            time.sleep(poll)
            for child in list(waiting):
                results.absorb(child.shard)
                assert child.process is not None
                code = child.process.poll()
                if code is None:
                    if time.time() > deadline + GRACE:
                        child.kill()
                        results.absorb(child.shard)
                        if late_is_failure:
                            child.blame(results, "did not end in time and was stopped", older_than=STUCK)
                        waiting.remove(child)
                        clean = False
                    continue
                results.absorb(child.shard)
                dead = code not in (0, RESTART)
                blamed = dead and child.blame(results, f"its process died ({_why(code)})")
                if code != 0 and (blamed or code == RESTART) and child.restarts > 0 and time.time() < deadline:
                    child.restarts -= 1
                    child.start()
                    continue
                clean &= code == 0
                waiting.remove(child)
    finally:
        for child in waiting:
            if child.process is not None and child.process.poll() is None:
                child.kill()
        for child in children:
            results.absorb(child.shard)
            child.shard.unlink(missing_ok=True)
            child.current.unlink(missing_ok=True)
    return clean


def _why(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
