"""The extras match pyproject.toml, and the errors for missing ones."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from vp_engines.errors import EXIT_ENGINE_UNAVAILABLE, PackageMissingError
from vp_engines.extras import EXTRAS, install_hint, installed, missing_package, require_packages

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
# For packages whose name differs from that of their module.
MODULES = {
    "pillow": "PIL", "onnxruntime-gpu": "onnxruntime", "tensorrt-rtx-cu13": "tensorrt_rtx",
    "tritonclient[grpc]": "tritonclient.grpc", "ray[serve]": "ray.serve",
}  # fmt: skip


def _modules(requirements: list[str]) -> set[str]:
    names = {re.split(r"[<>=!~;]", text.partition(";")[0])[0].strip() for text in requirements}
    # triton is torch's own dependency on Linux, never imported directly by a command.
    return {MODULES.get(name, name) for name in names if not name.startswith("vp-export") and name != "triton"}


def test_the_extras_are_those_of_the_project() -> None:
    declared = {"": _modules(PROJECT["dependencies"])}
    tools = ("test", "docs")
    declared |= {name: _modules(found) for name, found in PROJECT["optional-dependencies"].items() if name not in tools}
    assert {name: set(modules) for name, modules in EXTRAS.items()} == declared


def test_the_line_that_installs() -> None:
    assert install_hint("search") == "pip install 'vp-export[search]'"
    assert install_hint("export", "cpu", "export", "") == "pip install 'vp-export[export,cpu]'"
    assert install_hint("") == "pip install vp-export"


def test_installed_imports_nothing_and_survives_broken_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert installed("json.decoder")
    assert not installed("scipy")
    assert not installed("scipy.optimize")
    assert not installed("no_such_package.inner")
    assert not installed("json.decoder.inner")


def test_everything_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PackageMissingError) as caught:
        require_packages("vp-export", "export", ["torch", "json", "timm"], also=["cpu"])
    assert (
        str(caught.value) == "vp-export needs torch, timm, which are not installed; pip install 'vp-export[export,cpu]'"
    )
    assert caught.value.exit_code == EXIT_ENGINE_UNAVAILABLE
    with pytest.raises(PackageMissingError, match="needs timm, which is not installed"):
        require_packages("vp-export", "export", ["timm"])


@pytest.mark.parametrize(
    "text",
    ["import no_such_lib", "raise OSError('libcudart.so.13: cannot\\nopen')", "raise AttributeError('_ARRAY_API')"],
)
def test_a_broken_package_is_said_to_be_broken(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vpbroken.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    require_packages("vp-x", "export", ["vpbroken"], load=False)
    with pytest.raises(
        PackageMissingError, match=r"^vp-x needs vpbroken, which is installed but does not import \(.+\); "
    ) as caught:
        require_packages("vp-x", "export", ["vpbroken"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("scipy.optimize", "scipy is not installed; pip install 'vp-export[search]'"),
        ("matplotlib", "matplotlib is not installed; pip install 'vp-export[search]'"),
        ("tritonclient", "tritonclient is not installed; pip install 'vp-export[serve]'"),
        ("jinja2", "jinja2 is not installed; pip install vp-export"),
        ("some_thing", "some_thing is not installed; pip install some-thing"),
        ("lzma", "this Python has no module lzma; use a Python that is built with it"),
    ],
)
def test_an_import_that_failed_unforeseen(module: str, line: str) -> None:
    assert str(missing_package(ModuleNotFoundError("No module", name=module))) == line


def test_an_import_that_is_our_own_fault() -> None:
    assert missing_package(ModuleNotFoundError("No module", name="vp_exporter.nothing")) is None
    assert missing_package(ImportError("cannot import name 'x'", name="vp_engines.errors")) is None
    assert "numpy, which is installed but does not import (cannot import" in str(
        missing_package(ImportError("cannot import name 'x'", name="numpy"))
    )
