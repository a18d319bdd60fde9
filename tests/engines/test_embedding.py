"""The Python service in docs/embedding.md. (Triton, Ray and C++ are tested in their own folders.)"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.embedding import blocks, replaced, words
from tests.engines.serving.triton.samples import write_linear
from tests.ports import free_ports
from tests.waiting import until


def test_python_service(tmp_path: Path) -> None:
    write_linear(tmp_path / "deit_s.vpe")
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "cat.jpg")
    (port,) = free_ports()
    (program,) = blocks("Python service", "python")
    (tmp_path / "service.py").write_text(replaced(program, {"8080": str(port), "threads=4": "threads=1"}))
    start, ask = blocks("Python service", "bash")
    command = words(start, {"python": sys.executable})
    ask = replaced(ask, {"8080": str(port)})
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as service:
        try:
            until(lambda: service.poll() is not None or _curl(ask, tmp_path).returncode != 7)  # 7: no connection yet
            done = _curl(ask, tmp_path)
            assert done.stdout.split()[0] in ("0", "1")
            (tmp_path / "cat.jpg").write_bytes(b"no image")
            assert "400" in _curl(ask, tmp_path).stderr
        finally:
            service.kill()


def _curl(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*shlex.split(command), "-sS"], cwd=folder, capture_output=True, text=True)
