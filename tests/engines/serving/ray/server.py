"""`python -m vp_engines.serving.ray` on a cluster of two nodes, in Ray's environment (make ray)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.optional import missing
from tests.waiting import LONG, until

ROOT = Path(__file__).parents[4]
PYTHON = Path(os.environ.get("VP_RAY_VENV", ROOT / "build" / "ray")) / "bin" / "python"
MARK = "VP_RAY_TEST"  # set in the environment of all processes of a cluster, to identify them
_SHORT = 40  # characters of a folder: Ray adds about 65 for its sockets, whose paths are limited to 107


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    address: str
    environment: dict[str, str]

    def replicas(self, application: str) -> dict[int, int]:
        """Process ids of an application's replicas, and of their parents, the raylets of their nodes."""
        mark = f"{MARK}={self.environment[MARK]}".encode()
        title, found = f"ray::ServeReplica:{application}:".encode(), {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError, IndexError):  # processes start and end at any time
                if not folder.name.isdecimal() or not (folder / "cmdline").read_bytes().startswith(title):
                    continue
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                    found[int(folder.name)] = int(parent)
        return found


@dataclass(frozen=True)
class Server:
    """The serving command, its output, and its address."""

    process: subprocess.Popen[str]
    http: str
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def environment(work: Path, scratch: Path) -> dict[str, str]:
    """Environment of a node: Ray, the engine and vp_engines; no telemetry, and no files outside `scratch`."""
    if not PYTHON.is_file():
        missing("there is no Ray: make ray", "VP_REQUIRE_RAY")
    return {
        **{key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ},
        "PYTHONPATH": str(ROOT / "engines"),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(scratch),
        "TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        # On a busy machine a Ray process may need more than the default of five seconds.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        MARK: str(work),
    }


@contextmanager
def cluster(work: Path) -> Iterator[Cluster]:
    """Run two nodes; removes them and all that they started and wrote afterwards."""
    base = tempfile.gettempdir()
    scratch = Path(tempfile.mkdtemp(prefix="vr", dir=base if len(base) < _SHORT else "/tmp"))
    found = environment(work, scratch)
    log = work / "cluster.log"
    try:
        with open(log, "w") as errors:
            process = subprocess.Popen(
                [str(PYTHON), str(Path(__file__).with_name("cluster.py"))],
                env=found, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=work,
            )  # fmt: skip
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, f"the cluster did not start:\n{log.read_text()[-4000:]}"
            yield Cluster(address, found)
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=LONG)
            _reap(found[MARK])
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _reap(mark: str) -> None:
    """Kill remaining processes of a cluster."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def command(bundle: Path, *arguments: str) -> list[str]:
    return [str(PYTHON), "-m", "vp_engines.serving.ray", str(bundle), *arguments]


@contextmanager
def serving(bundle: Path, nodes: Cluster, work: Path, port: int, *arguments: str, route: str = "/") -> Iterator[Server]:
    """Serve a bundle on a cluster, wait until it is ready, and stop it afterwards."""
    log = work / f"serve-{route.strip('/')}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command(
                bundle, "--address", nodes.address, "--port", str(port), "--route", route, "--proxies", "head",
                "--threads", "1", "--fronts", "1", *arguments,
            ),
            env=nodes.environment, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=work,
        )  # fmt: skip
    found = Server(process, f"127.0.0.1:{port}{route.rstrip('/')}", log)
    try:
        until(lambda: "serving " in found.said() or process.poll() is not None, found.said)
        assert process.poll() is None, found.said()
        yield found
    finally:
        process.terminate()
        try:
            process.wait(LONG)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
