"""docs/extending.md: adding a reducer or an engine takes one file and its test, shown on a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
SOURCES = ("exporter/vp_exporter", "kernels/vp_kernels", "engines/vp_engines")
CODE = re.compile(r"`((?:exporter|tests)/[\w/]+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in (*SOURCES, "tests/engines", "tests/exporter"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*(ROOT / "tests").glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    return tmp_path


def run(copy: Path, *tests: str) -> None:
    """Run pytest on the copy and its packages."""
    places = [str(copy), *(str((copy / source).parent) for source in SOURCES)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(places)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_a_reducer_is_one_file_and_its_test(copy: Path) -> None:
    files = CODE.findall(PAGE)
    assert len(files) == 2
    for name, text in files:
        assert not (copy / name).exists()
        (copy / name).write_text(text)
    run(
        copy,
        files[1][0],
        "tests/exporter/methods/test_methods.py::test_every_reducer_can_be_asked_for_by_name",
        "tests/exporter/reducers/test_bad_plans.py::test_every_reducer_is_in_the_table",
        "tests/exporter/reducers/test_export.py::test_every_reducer_is_here",
        "tests/exporter/rewrite/test_fused_block.py::test_every_reducer_is_here",
    )


@pytest.mark.slow
def test_an_engine_is_one_file_and_its_test(copy: Path) -> None:
    shutil.copy(HERE / "engine.py", copy / "engines/vp_engines/backends/reference.py")
    shutil.copy(HERE / "engine_check.py", copy / "tests/engines/backends/test_reference.py")
    run(copy, "tests/engines/backends/test_reference.py", "tests/engines/backends/test_base.py")


def test_every_file_of_the_checklists_exists() -> None:
    named = {name for name in re.findall(r"`([\w./]+/[\w./]*)`", PAGE) if not re.search(r"NAME|KIND", name)}
    code = {name for name, _ in CODE.findall(PAGE)} | {f"{name}/" for name in SOURCES}
    missing = [name for name in named - code if not (ROOT / name).exists() and "/" in name]
    rooms = ("exporter/vp_exporter/", "kernels/vp_kernels/", "tests/exporter/reducers/")
    assert not [name for name in missing if not any((ROOT / room / name).exists() for room in rooms)]
