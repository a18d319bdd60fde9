"""Importing a package touches no GPU and no optional dependency."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    """Arrows run one way; and every backend module can be imported where no engine is installed."""
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
