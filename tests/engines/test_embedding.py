"""docs/embedding.md: the Python service, as it stands there. (Triton, Ray and C++: in their own folders.)"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.embedding import blocks, replaced
from tests.engines.serving.triton.samples import write_linear
from tests.ports import free_ports


def test_python_service(tmp_path: Path) -> None:
    write_linear(tmp_path / "deit_s.vpe")
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "cat.jpg")
    (port,) = free_ports()
    (program,) = blocks("Python service", "python")
    (tmp_path / "service.py").write_text(replaced(program, {"8080": str(port), "threads=4": "threads=1"}))
    start, ask = blocks("Python service", "bash")
    command = shlex.split(replaced(start, {"python ": f"{sys.executable} "}))
    ask = replaced(ask, {"8080": str(port)})
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as service:
        try:
            until = time.monotonic() + 60
            while (done := _curl(ask, tmp_path)).returncode == 7:  # no connection yet
                assert service.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            assert done.stdout.split()[0] in ("0", "1")
            (tmp_path / "cat.jpg").write_bytes(b"no image")
            assert "400" in _curl(ask, tmp_path).stderr
        finally:
            service.kill()


def _curl(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*shlex.split(command), "-sS"], cwd=folder, capture_output=True, text=True)
