"""Findings of vp-doctor on this machine, and with packages missing, outdated or broken."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from vp_engines.backends import ENGINES
from vp_engines.extras import EXTRAS
from vp_exporter import doctor
from vp_exporter.doctor import Package, look_at

MODULES = tuple(dict.fromkeys(module for extra in EXTRAS.values() for module in extra))
BROKEN = {
    "raises": ("raise RuntimeError('no good\\nat all')", "does not import: RuntimeError: no good at all"),
    "library": ("raise OSError('libfoo.so: cannot open')", "does not import: OSError: libfoo.so: cannot open"),
    "crashes": ("import os; os.kill(os.getpid(), 11)", "importing it ends Python by signal 11"),
    "leaves": ("import sys; sys.exit(3)", "does not import: no message"),
    "hangs": ("import time; time.sleep(600)", "does not import within 2 s"),
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for packages, and a home folder beside it."""
    monkeypatch.setattr(doctor, "TIMEOUT", 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_a_line(name: str, packages: Path) -> None:
    code, line = BROKEN[name]
    if name == "raises":
        line = "does not import: at all"  # the last line of Python's traceback
    (packages / f"vp_fake_{name}.py").write_text(code)
    found = look_at(f"vp_fake_{name}")
    assert found.problem == line
    assert "\n" not in found.problem


def test_no_home_is_told(packages: Path) -> None:
    (packages / "vp_fake_home.py").write_text(
        f"raise OSError({str(packages / 'lib.so')!r} + ': cannot open ' + {sys.prefix!r})"
    )
    assert look_at("vp_fake_home").problem == "does not import: OSError: ~/site/lib.so: cannot open ENV"


def test_a_sound_package_and_an_absent_one() -> None:
    assert look_at("numpy") == Package("numpy", metadata.version("numpy"))
    assert look_at("no_such_package.inner") == Package("no_such_package.inner", "", "not installed")
    found = look_at("onnxruntime")
    assert "CPU" in found.details


def test_a_version_that_vp_export_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=99", "onnx; extra == 'export'"])
    assert look_at("numpy").problem == "vp-export needs >=99"


def _with(monkeypatch: pytest.MonkeyPatch, bad: dict[str, Package]) -> doctor.Diagnosis:
    """Diagnose a machine with a GPU and everything installed except as given by `bad`."""
    monkeypatch.setattr(doctor, "look_at", lambda module: bad.get(module, Package(module, "1.0")))
    for backend in ("base", "ort", "openvino", "aoti", "tensorrt"):
        monkeypatch.setattr(
            f"vp_engines.backends.{backend}.installed", lambda module: not (module in bad and not bad[module].version),
            raising=False,
        )  # fmt: skip
    monkeypatch.setattr("vp_engines.backends.tensorrt.gpu_capability", lambda: "8.9")
    monkeypatch.setattr("vp_engines.backends.aoti._compiler", lambda: "g++")
    return doctor.diagnose()


def test_where_everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _with(monkeypatch, {})
    assert set(found.engines) == set(ENGINES)
    assert all(works.ok for both in found.engines.values() for works in both)
    assert all(works.ok for works in found.commands.values())


def test_a_server_with_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {*EXTRAS[""], "onnxruntime"}
    found = _with(monkeypatch, {name: Package(name, "", "not installed") for name in MODULES if name not in have})
    build, run = found.engines["ort"]
    assert run.ok
    assert not build.ok
    assert "pip install 'vp-export[export]'" in build.why_not
    for name in ENGINES[1:]:
        assert all(not works.ok and "pip install 'vp-export[" in works.why_not for works in found.engines[name])
    works = {name for name, found in found.commands.items() if found.ok}
    assert works == {"vp-inspect", "vp-validate", "vp-profile"}
    for name, extra in {
        "vp-export": "export", "vp-search": "search", "vp-profile --out": "profile", "vp-serve triton": "serve",
        "vp-serve ray": "ray", "vp-inspect --model": "export", "vp-search --page": "search",
    }.items():  # fmt: skip
        assert found.commands[name].why_not.endswith(f"pip install 'vp-export[{extra}]'")


def test_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _with(monkeypatch, {name: Package(name, "", "not installed") for name in MODULES if name not in EXTRAS[""]})
    assert not found.commands["vp-validate"].ok
    assert "pip install 'vp-export[cpu]'" in found.commands["vp-validate"].why_not
    assert found.commands["vp-inspect"].ok


def test_a_broken_package_breaks_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _with(monkeypatch, {"onnxruntime": Package("onnxruntime", "1.31", "does not import: OSError: libgomp")})
    for works in found.engines["ort"]:
        assert not works.ok
        assert "onnxruntime 1.31: does not import: OSError: libgomp" in works.why_not
    assert found.engines["openvino"][1].ok
    assert found.commands["vp-validate"].ok  # with another engine
    found = _with(monkeypatch, {"jinja2": Package("jinja2", "", "not installed")})
    assert {works.why_not for works in found.commands.values()} == {"jinja2 is not installed: pip install vp-export"}


def test_the_system_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/cpuinfo": "processor : 0\nmodel name : A CPU\nflags : fpu avx2 avx512f avx512_vnni\n",
        "/proc/meminfo": "MemTotal:       25165824 kB\n",
    }
    monkeypatch.setattr(doctor, "_text", lambda path: texts[path])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = doctor.system()
    assert found["CPU"].startswith("A CPU, ")
    assert found["CPU has"] == "avx2, avx512, vnni; not bf16, fp16, amx"
    assert found["memory"] == "24 GiB"
    assert found["compiler"].startswith("none")
    assert "OMP_NUM_THREADS=3" in found["variables"]
    texts["/proc/cpuinfo"] = "Features : fp asimd sve bf16\n"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert doctor.system()["CPU has"] == "bf16, neon, sve; not fp16"
    monkeypatch.setattr(doctor, "_text", lambda path: "")
    assert "CPU has" not in doctor.system()
