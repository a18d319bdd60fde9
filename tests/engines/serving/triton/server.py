"""A real Triton Inference Server on the CPU, from nvidia-pytriton's wheel (make tritonserver)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.optional import missing
from tests.ports import free_ports
from tests.waiting import LONG, until

ROOT = Path(__file__).parents[4]
VENV = ROOT / "build" / "tritonserver"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Server:
    """Addresses of a running server, and its output so far."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def packages() -> Path:
    """Folder with the server's packages; skips the test if they are not installed."""
    found = VENV / "lib" / f"python{PYTHON}" / "site-packages"
    if not (found / "pytriton").is_dir():
        missing("there is no Triton Inference Server: make tritonserver", "VP_REQUIRE_TRITON")
    return found


@contextmanager
def running(repository: Path, work: Path, *arguments: str) -> Iterator[Server]:
    """Start the server on loopback, wait until it is ready, and stop it afterwards."""
    site = packages()
    server, backend = site / "pytriton" / "tritonserver", work / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(server / "python_backend_stubs" / PYTHON / "triton_python_backend_stub", backend)
    program = work / "tritonserver"
    shutil.copy(server / "bin" / "tritonserver", program)
    for file in (program, backend / "triton_python_backend_stub"):
        file.chmod(0o755)
    # Only what `pip install vp-export[cpu]` installs, not the packages of this process.
    environment = {
        **{key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ},
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        "PYTHONPATH": f"{ROOT / 'engines'}:{site}",
        "OMP_NUM_THREADS": "1",
    }
    http, grpc = free_ports(2)
    log = work / "server.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [
                str(program), "--model-repository", str(repository), "--backend-directory", str(work / "backends"),
                "--http-address", "127.0.0.1", "--http-port", str(http), "--grpc-address", "127.0.0.1",
                "--grpc-port", str(grpc), "--allow-metrics", "false", "--exit-timeout-secs", "5", *arguments,
            ],
            env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=work,
        )  # fmt: skip
    found = Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    try:
        _wait(found)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(LONG)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    def ready() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=60):
            return True
        return server.process.poll() is not None

    until(ready, server.said)
    assert server.process.poll() is None, f"the server did not start:\n{server.said()[-4000:]}"
