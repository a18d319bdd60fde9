"""The section on Triton Inference Server in docs/embedding.md."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.embedding import blocks, replaced
from tests.engines.serving.triton.samples import write_linear
from tests.engines.serving.triton.server import running
from tests.waiting import LONG


@pytest.mark.built
def test_triton(tmp_path: Path) -> None:
    write_linear(tmp_path / "deit_s.vpe", name="deit_s")
    write, serve = blocks("Triton Inference Server", "bash")
    program, *arguments = shlex.split(write)
    assert program == "vp-serve"
    command = [sys.executable, "-m", "vp_exporter.cli.serve", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    _, option, repository = shlex.split(serve)
    assert option == "--model-repository"
    (work := tmp_path / "work").mkdir()
    (client,) = blocks("Triton Inference Server", "python")
    with running(tmp_path / repository, work) as server:
        client = replaced(client, {"127.0.0.1:8000": server.http, "224, 224": "4, 4"})
        done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, timeout=LONG)
    assert done.stdout == "(2, 2)\n", done.stderr[-2000:]
