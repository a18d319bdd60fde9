"""Missing packages are named before any work, with the install command, and never reported as a bug."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.exporter.cli.samples import call, check_error
from vp_exporter.cli import console, export, inspect, profile, search, serve, validate

# None of these files exists: reading any of them first would give exit code 2.
MODEL = ("--model", "deit_small_patch16_224", "--weights", "no.safetensors")
SEARCH = (*MODEL, "--data", "no-folder", "--target-macs", "0.65", "--out", "plan.json")
NOT_HERE = "which is not installed; pip install"
EXPORT = (*MODEL, "--plan", "no.json", "--data", "no-folder", "--out", "a.vpe")


class Case(NamedTuple):
    app: Any
    words: tuple[str, ...]
    missing: tuple[str, ...]
    line: str

    @property
    def id(self) -> str:
        return f"{self.app.__name__.rpartition('.')[2]}-{'-'.join(self.missing)}"


CASES = [
    *(
        Case(export, EXPORT, (name,), f"vp-export needs {name}, {NOT_HERE} 'vp-export[export]'")
        for name in ("torch", "timm", "onnx", "onnxscript", "safetensors")
    ),
    Case(export, EXPORT, ("torch", "onnxruntime"),
         "vp-export needs torch, which is not installed; pip install 'vp-export[export,cpu]'"),
    Case(export, (*EXPORT, "--engine", "openvino"), ("timm", "openvino"),
         "vp-export needs timm, which is not installed; pip install 'vp-export[export,openvino]'"),
    *(
        Case(search, SEARCH, (name,), f"vp-search needs {name}, {NOT_HERE} 'vp-export[search]'")
        for name in ("scipy", "torch", "timm", "safetensors")
    ),
    Case(search, (*SEARCH, "--page", "page"), ("matplotlib",),
         "vp-search needs matplotlib, which is not installed; pip install 'vp-export[search]'"),
    Case(search, (*MODEL, "--data", "no", "--target-latency", "0.7", "--out", "p.json"), ("onnxruntime",),
         "vp-search needs onnxruntime, which is not installed; pip install 'vp-export[search,cpu]'"),
    Case(search, (*MODEL, "--data", "no", "--target-latency", "0.7", "--out", "p.json"), ("onnxscript",),
         "vp-search needs onnxscript, which is not installed; pip install 'vp-export[search,cpu]'"),
    Case(profile, ("no.vpe", "--out", "profile"), ("matplotlib",),
         "vp-profile --out needs matplotlib, which is not installed; pip install 'vp-export[profile]'"),
    Case(inspect, ("--method", "tome", "--r", "13", "--model", "deit_small_patch16_224"), ("torch", "timm"),
         "--model needs torch, timm, which are not installed; pip install 'vp-export[export]'"),
    Case(serve, ("triton", "no.vpe", "--out", "models"), ("tritonclient.grpc",), "pip install 'vp-export[serve]'"),
]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_it_is_found_before_any_work(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in case.missing:
        monkeypatch.setitem(sys.modules, name, None)
    found = call(case.app.app, *case.words)
    check_error(found, 3, "")
    assert case.line in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_search_without_pictures_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_error(call(search.app, *SEARCH, "--quiet"), 2, "no.safetensors")


def test_images_shared_by_processes_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "torch", None)
    for visible in (None, "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", raising=False
        )
        found = call(validate.app, tmp_path / "no.vpe")
        check_error(found, 3, r"several processes needs torch, .*; pip install 'vp-export\[export\]'")


def _imports(statement: str) -> Callable[[], int]:
    def body() -> int:
        exec(statement, {})
        return 0

    return body


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("import scipy.special", 3, "error: scipy is not installed; pip install 'vp-export[search]'"),
        ("import no_such_package.inner", 3, "error: no_such_package is not installed; pip install no-such-package"),
        ("from json import nothing", 3, "error: this command needs json, which is installed but does not import"),
        ("import vp_exporter.nothing", 70, "error: unexpected ModuleNotFoundError: No module named 'vp_exporter"),
    ],
)
def test_an_import_that_nobody_foresaw(
    statement: str, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert console.run(_imports(statement)) == code
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1
    assert ("this is a bug" in told) == (code == 70)
