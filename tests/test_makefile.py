"""`make test` if an optional requirement cannot be set up."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

PIP = "echo 'WARNING: Retrying' >&2; echo 'ERROR: No matching distribution found' >&2; exit 1"


def make(target: str, variable: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build `target` in a separate folder, with a Python that can create venvs but not download anything."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && {{ {PIP}; }}\nmkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n')
    python.chmod(0o755)
    command = ["make", "-s", target, f"{variable}={tmp_path / 'venv'}", f"PYTHON={python}"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VP_REQUIRE", "MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**clean, **environment})


@pytest.mark.parametrize(
    ("target", "variable", "what", "required"),
    [
        ("tritonserver", "SERVER", "Triton Inference Server", "VP_REQUIRE_TRITON"),
        ("ray", "RAY", "Ray Serve", "VP_REQUIRE_RAY"),
    ],
)
def test_what_cannot_be_installed_is_one_line(
    target: str, variable: str, what: str, required: str, tmp_path: Path
) -> None:
    """The tests continue, unless it is required, as in continuous integration."""
    done = make(target, variable, tmp_path)
    assert done.returncode == 0
    line = f"the tests of {what} are skipped, it cannot be installed: ERROR: No matching distribution found\n"
    assert done.stderr == line
    assert not (tmp_path / "venv").exists()  # no partial result: the tests check for its existence
    demanded = make(target, variable, tmp_path, **{required: "1"})
    assert demanded.returncode == 2
    assert line in demanded.stderr


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()
    done = make("ray", "RAY", tmp_path, VP_REQUIRE_RAY="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
