"""Environments created from the wheel as the install commands in the docs would.

`linked` links the files of exactly those distributions that pip would install, from the environments that run the
tests: takes seconds, without network. `fresh` uses pip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections import Counter
from collections.abc import Sequence
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCES = ("exporter", "kernels", "engines")
# In the tests, Ray has its own virtual environment (Makefile).
RAY = ROOT / "build" / "ray"


def build_wheel(out: Path) -> Path:
    """Build the wheel from a copy of the sources: a build leaves files behind that would affect the next one."""
    tree = out / "tree"
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", str(out)]
    # required by pyproject.toml; otherwise pip downloads it
    if int(metadata.version("setuptools").split(".")[0]) >= 77:
        command.append("--no-build-isolation")
    subprocess.run([*command, str(tree)], check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    return wheel


# Run commands in sequence, each forked from a process that has already imported slow packages.
FORKING = """
import json, os, runpy, shlex, sys, traceback
from importlib import import_module
for name in ("torch", "timm", "onnxscript", "torch.onnx._internal.exporter._core"):
    try:
        import_module(name)
    except ImportError:
        pass
folder = sys.argv[1]
codes = []
for number, command in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        code = 1
        try:
            program, *sys.argv[1:] = shlex.split(command)
            sys.argv[0] = os.path.join(os.path.dirname(sys.executable), program)
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if codes[-1]:
        break
print(json.dumps(codes))
"""


class Environment:
    """A virtual environment; `run` starts a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"

    @property
    def packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, command: str, cwd: Path, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
        return self._run(["sh", "-c", command], cwd, timeout)

    def run_each(
        self, commands: Sequence[str], cwd: Path, timeout: float = 1800
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run installed commands in sequence, up to the first that fails."""
        with tempfile.TemporaryDirectory() as folder:
            words = [str(self.bin / "python"), "-c", FORKING, folder]
            done = self._run(words, cwd, timeout, json.dumps(list(commands)))
            assert done.returncode == 0, done.stderr
            codes = json.loads(done.stdout)
            return [
                subprocess.CompletedProcess(
                    command, code, *(Path(folder, f"{number}.{stream}").read_text() for stream in ("out", "err"))
                )
                for number, (command, code) in enumerate(zip(commands, codes, strict=False))
            ]

    def _run(
        self, words: list[str], cwd: Path, timeout: float, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        keep = ("OMP_NUM_THREADS", "LANG", "TMPDIR")
        env = {name: os.environ[name] for name in keep if name in os.environ}
        env |= {"PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(cwd), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            words, cwd=cwd, env=env, input=given, capture_output=True, text=True, timeout=timeout, check=False
        )


def fresh(folder: Path, wheel: Path, extras: tuple[str, ...]) -> Environment:
    """Create with pip, as a user does. VP_FRESH_FIRST names packages to install first, such as a CPU build of torch."""
    venv.create(folder, with_pip=True)
    made = Environment(folder)
    pip = [made.bin / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    first = os.environ.get("VP_FRESH_FIRST", "").split()
    for wanted in ([first] if first and {"export", "search", "aoti"} & set(extras) else []) + [[_spec(wheel, extras)]]:
        subprocess.run([*pip, *wanted], check=True, capture_output=True, text=True, timeout=3000)
    return made


def _spec(wheel: Path, extras: tuple[str, ...]) -> str:
    return f"vp-export[{','.join(extras)}] @ {wheel.resolve().as_uri()}"


def linked(folder: Path, wheel: Path, extras: tuple[str, ...]) -> Environment | None:
    """Create by linking installed files; None if a required distribution is not installed anywhere."""
    places = [path for path in sys.path if path and not path.startswith(str(ROOT / "tests"))]
    ray = [str(path) for path in RAY.glob("lib/python*/site-packages")]
    places = [*ray, *places] if "ray" in extras else places
    closure = _closure(wheel, extras, places)
    if closure is None:
        return None
    venv.create(folder, symlinks=True)
    made = Environment(folder)
    tops = {dist: sorted({path.parts[0] for path in dist.files or () if path.parts[0] != ".."}) for dist in closure}
    claimed = _claimed(places)
    for dist, names in tops.items():
        for name in names:
            if name in ("__pycache__",):
                continue
            if claimed[name] == 1:
                _link(Path(str(dist.locate_file(name))), made.packages / name)
            else:  # a folder shared by several distributions: link only this one's files
                for path in dist.files or ():
                    if path.parts[0] == name and "__pycache__" not in path.parts:
                        _link(Path(str(dist.locate_file(path))), made.packages / path)
    _install(wheel, made)
    return made


def _link(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def _claimed(places: list[str]) -> Counter[str]:
    """Number of distributions with files below each name in site-packages."""
    found: Counter[str] = Counter()
    for dist in metadata.distributions(path=places):
        found.update({path.parts[0] for path in dist.files or ()})
    return found


def _closure(wheel: Path, extras: tuple[str, ...], places: list[str]) -> list[metadata.Distribution] | None:
    """Distributions that pip would install besides the wheel."""
    installed: dict[str, metadata.Distribution] = {}
    for dist in metadata.distributions(path=places):
        installed.setdefault(canonicalize_name(dist.metadata["Name"]), dist)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        own = metadata.PathDistribution(zipfile.Path(wheel, name.rpartition("/")[0] + "/"))
        requires = {"vp-export": own.requires or []}
    todo = [("vp-export", extra) for extra in ("", *extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name not in requires:
            if name not in installed:
                return None
            requires[name] = installed[name].requires or []
        for text in requires[name]:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(wanted.name), each) for each in ("", *sorted(wanted.extras))]
    return [installed[name] for name in sorted({name for name, _ in seen} - {"vp-export"})]


def _install(wheel: Path, made: Environment) -> None:
    """Install the wheel's files and commands."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made.packages)
    (entries,) = made.packages.glob("vp_export-*.dist-info/entry_points.txt")
    parser = ConfigParser()
    parser.read(entries)
    for name, target in parser["console_scripts"].items():
        module, function = target.split(":")
        script = made.bin / name
        lines = (
            f"#!{made.bin / 'python'}",
            "import sys",
            f"from {module} import {function}",
            f"sys.exit({function}())",
        )
        script.write_text("\n".join(lines) + "\n")
        script.chmod(0o755)
