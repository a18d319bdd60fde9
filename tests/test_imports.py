"""Imports touch no GPU and no optional dependency, follow the layers, and have no cycles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("exporter/vp_exporter", "kernels/vp_kernels", "engines/vp_engines", "benchmarks")

HEAVY = [
    "torch",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "pydantic",
    "PIL",
    "matplotlib",
    "typer",
    "rich",
    "jinja2",
    "triton",
    "cuda",
]


@pytest.mark.parametrize("package", ["vp_exporter", "vp_kernels", "vp_engines", "vp_engines.backends"])
def test_import_is_light(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_engines_do_not_know_the_exporter() -> None:
    """vp_engines does not import the exporter; every backend module can be imported without its engine."""
    code = (
        "import sys, importlib, pkgutil, vp_engines\n"
        f"for name in {HEAVY!r}:\n"
        "    sys.modules[name] = None if name not in ('pydantic', 'PIL') else sys.modules.get(name)\n"
        "    if sys.modules[name] is None and name in ('pydantic', 'PIL'): del sys.modules[name]\n"
        "for module in pkgutil.walk_packages(vp_engines.__path__, 'vp_engines.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([name for name in sys.modules if name.startswith(('vp_exporter', 'vp_kernels'))])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml on the packages of a tree."""
    code = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    places = [str((tree / package).parent) for package in PACKAGES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree, env=environment)


def test_imports_keep_to_their_floors() -> None:
    found = lint_imports(ROOT)
    assert found.returncode == 0, found.stdout
    assert "5 kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("exporter/vp_exporter/reducers/ops.py", "import vp_exporter.plan.masks", "The floors of vp_exporter"),
        (
            "exporter/vp_exporter/searching/scoring.py",
            "import vp_exporter.searching.mask.ppo",
            "The floors of the search",
        ),
        ("exporter/vp_exporter/methods/options.py", "import vp_exporter.methods.table", "No two neighbours"),
        ("engines/vp_engines/atomic.py", "import vp_kernels.errors", "vp_kernels and vp_engines know nothing"),
        ("exporter/vp_exporter/api/plans.py", "import vp_engines.command_line", "Only commands speak in options"),
        ("benchmarks/gpu/runs.py", "import benchmarks.gpu.dry", "No two neighbours"),
    ],
)
def test_an_arrow_upwards_is_found(file: str, line: str, broken: str, tmp_path: Path) -> None:
    """Even inside a function, where it would do no harm at run time."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a") as source:
        source.write(f"\n\ndef _upwards() -> None:\n    {line}\n")
    found = lint_imports(tmp_path)
    assert found.returncode == 1, found.stdout
    assert [row for row in found.stdout.splitlines() if row.startswith(broken) and row.endswith(" BROKEN")]
