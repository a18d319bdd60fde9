"""Diagnose this machine: engines, commands, packages, CPU and GPUs. Needs the standard library only.

Every package is imported in a process of its own, so that a broken one, even if it crashes, is just a line of the
report.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vp_engines.backends import ENGINES, get_backend
from vp_engines.backends.base import Backend
from vp_engines.backends.tensorrt import gpu_capability
from vp_engines.extras import EXTRAS, install_hint, installed
from vp_exporter.utils.required_packages import EXPORT, MODEL, ONNX_LOWERING, PICTURES, SEARCH

TIMEOUT = 120  # seconds for one package
# Printed by a child after importing the package: details for a bug report, besides the version.
_DETAILS = {
    "torch": "'CUDA %s, %s' % (module.version.cuda, 'a GPU' if module.cuda.is_available() else 'no GPU')",
    "onnxruntime": "', '.join(each.removesuffix('ExecutionProvider') for each in module.get_available_providers())",
    "openvino": "', '.join(module.Core().available_devices)",
}
_CHILD = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
print("\\n" + json.dumps({"details": str(DETAILS), "version": str(getattr(module, "__version__", ""))}))
"""
# CPU features that engines and compilers use, as spelled in /proc/cpuinfo.
FEATURES = {
    "avx2": {"avx2"},
    "avx512": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "fphp"},
    "amx": {"amx_tile"},
    "neon": {"asimd"},
    "sve": {"sve"},
}
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Package:
    """A package used by some command or engine.

    Attributes:
        module: Import name.
        version: Version of the distributions that provide it; "" if not installed.
        problem: Why it cannot be used, one line; "" if it can be imported.
        details: What it reports about this machine.
    """

    module: str
    version: str = ""
    problem: str = ""
    details: str = ""


@dataclass(frozen=True)
class Works:
    """Whether something works here; `why_not` is one line, with what to do."""

    ok: bool
    why_not: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The complete diagnosis. `engines` has (build, run) by name; keys of `commands` are command names."""

    version: str
    system: dict[str, str]
    gpus: list[str]
    engines: dict[str, tuple[Works, Works]]
    commands: dict[str, Works]
    packages: list[Package]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        engines = {name: {"build": asdict(build), "run": asdict(run)} for name, (build, run) in self.engines.items()}
        return {**asdict(self), "engines": engines}


def diagnose() -> Diagnosis:
    """Diagnose this machine. Takes as long as importing every package; never raises for a broken one."""
    import vp_engines

    modules = dict.fromkeys(module for extra, its in EXTRAS.items() for module in its if extra != "demo")
    with ThreadPoolExecutor(min(4, usable_cores())) as pool:
        packages = {package.module: package for package in pool.map(look_at, modules)}
    engines = {name: _engine(get_backend(name), packages) for name in ENGINES}
    return Diagnosis(
        version=vp_engines.__version__,
        system=system(),
        gpus=gpus(),
        engines=engines,
        commands=_commands(engines, packages),
        packages=list(packages.values()),
    )


def look_at(module: str) -> Package:
    """Check one package by importing it in a process of its own."""
    version = _version(module)
    if not installed(module):
        return Package(module, "", "not installed")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD.replace("DETAILS", _DETAILS.get(module, "''")), module],
            capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Package(module, version, f"does not import within {TIMEOUT} s")
    except OSError as error:
        return Package(module, version, f"cannot be tried: {error.strerror or error}")
    if done.returncode < 0:
        return Package(module, version, f"importing it ends Python by signal {-done.returncode}")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Package(module, version, "does not import: " + anonymous(lines[-1] if lines else "no message")[:300])
    return Package(module, version or found["version"] or "unknown", _too_old(module), found["details"])


def anonymous(text: str) -> str:
    """Remove paths that identify the user."""
    for path, name in sorted({(sys.prefix, "ENV"), (str(Path.home()), "~")}, key=lambda pair: -len(pair[0])):
        if len(path) > 1:
            text = text.replace(path, name)
    return " ".join(text.split())


def _distributions(module: str) -> dict[str, str]:
    """Version by name of the distributions that provide a module."""
    found = {}
    try:
        for name in metadata.packages_distributions().get(module.split(".")[0], ()):
            found[name] = metadata.version(name)
    except Exception:  # partly removed packages may raise anything
        pass
    return found


def _version(module: str) -> str:
    """Version of a module; lists all distributions that provide it (e.g. onnxruntime and onnxruntime-gpu)."""
    found = _distributions(module)
    return next(iter(found.values())) if len(found) == 1 else ", ".join(map(" ".join, sorted(found.items())))


def _too_old(module: str) -> str:
    """Why an installed version is outside the range that vp-export declares; "" if it is not, or if unknown."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""
    try:
        declared = [Requirement(text) for text in metadata.requires("vp-export") or ()]
    except (metadata.PackageNotFoundError, ValueError):
        return ""
    for name, here in _distributions(module).items():
        for wanted in declared:
            if wanted.name.lower() == name.lower() and not wanted.specifier.contains(here, prereleases=True):
                return f"vp-export needs {wanted.specifier}"
    return ""


def _missing(what: str, modules: Iterable[str], extras: Sequence[str], packages: Mapping[str, Package]) -> Works:
    """Whether all of these modules can be imported."""
    bad = [packages[module] for module in modules if packages[module].problem]
    if not bad:
        return Works(True)
    absent = [package.module.split(".")[0] for package in bad if not package.version]
    if absent:
        is_not = "is not" if len(absent) == 1 else "are not"
        return Works(False, f"{', '.join(absent)} {is_not} installed: {install_hint(*extras)}")
    return Works(False, f"{what} {bad[0].module} {bad[0].version}: {bad[0].problem}".strip())


def _engine(backend: Backend, packages: Mapping[str, Package]) -> tuple[Works, Works]:
    """Whether an engine can (build, run)."""
    found = []
    for purpose in ("build", "run"):
        ready = backend.available(purpose)
        works = Works(ready.ok, "" if ready.ok else ready.reason)
        if works.ok:
            works = _missing("", backend.packages, [backend.extra], packages)
        if works.ok and purpose == "build":
            needs = [*EXPORT, *(ONNX_LOWERING if backend.source == "onnx" else ())]
            works = _missing("", needs, ["export"], packages)
        found.append(works)
    return found[0], found[1]


def _commands(engines: Mapping[str, tuple[Works, Works]], packages: Mapping[str, Package]) -> dict[str, Works]:
    def needs(modules: Iterable[str], *extras: str) -> Works:
        core = _missing("", EXTRAS[""], [], packages)
        return _missing("", modules, extras, packages) if core.ok else core

    def engine(step: int, works: Works) -> Works:
        if not works.ok or any(each[step].ok for each in engines.values()):
            return works
        return Works(False, f"no engine {('builds', 'runs')[step]} here: {install_hint('cpu')} brings ONNX Runtime")

    return {
        "vp-inspect": needs(()),
        "vp-inspect --model": needs(MODEL, "export"),
        "vp-validate": engine(1, needs(())),
        "vp-profile": engine(1, needs(())),
        "vp-profile --out": engine(1, needs(PICTURES, "profile")),
        "vp-serve triton": needs(EXTRAS["serve"], "serve"),
        "vp-serve ray": engine(1, needs(EXTRAS["ray"], "ray")),
        "vp-export": engine(0, needs(EXPORT, "export")),
        "vp-search": needs(SEARCH, "search"),
        "vp-search --page": needs((*SEARCH, *PICTURES), "search"),
    }


def usable_cores() -> int:
    """Number of cores available to this process, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroups v2, or "max"
        pass
    return cores


def system() -> dict[str, str]:
    """Python, processor, memory and compiler, in readable form. No host name, user or path."""
    facts = {"Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}"}
    libc = " ".join(platform.libc_ver()).strip()
    if libc:
        facts["Python"] += f", {libc}"
    info = _text("/proc/cpuinfo")
    name = _field(info, "model name") or platform.processor() or "unknown"
    facts["CPU"] = f"{name}, {usable_cores()} of {os.cpu_count()} cores"
    flags = set((_field(info, "flags") or _field(info, "Features")).split())
    if flags:
        other = {"avx2", "avx512", "vnni", "amx"} if platform.machine() in ("aarch64", "arm64") else {"neon", "sve"}
        names = [name for name in FEATURES if name not in other]
        have = [name for name in names if FEATURES[name] & flags]
        lack = [name for name in names if name not in have]
        facts["CPU has"] = (", ".join(have) or "none of them") + (f"; not {', '.join(lack)}" if lack else "")
    if kilobytes := _field(_text("/proc/meminfo"), "MemTotal").split():
        facts["memory"] = f"{int(kilobytes[0]) / 2**20:.0f} GiB"
    facts["compiler"] = _compiler()
    if given := [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]:
        facts["variables"] = ", ".join(given)
    return facts


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _field(text: str, key: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _compiler() -> str:
    """The C++ compiler that AOTInductor would use."""
    name = os.environ.get("CXX") or next((each for each in ("g++", "clang++") if shutil.which(each)), "")
    if not name or shutil.which(name) is None:
        return "none (g++ is needed to build aoti engines)"
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return f"{Path(name).name}, which does not run"
    return anonymous((done.stdout.splitlines() or [Path(name).name])[0])


def gpus() -> list[str]:
    """One line per GPU, from NVML, without torch or a CUDA context."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            raise OSError
    except OSError:
        capability = gpu_capability()
        return [] if capability is None else [f"compute capability {capability}"]
    count, driver = ctypes.c_uint(), ctypes.create_string_buffer(96)
    nvml.nvmlSystemGetDriverVersion(driver, 96)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    lines = []
    for index in range(count.value):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        major, minor, memory = ctypes.c_int(), ctypes.c_int(), (ctypes.c_uint64 * 3)()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            continue
        nvml.nvmlDeviceGetName(handle, name, 96)
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        lines.append(
            f"{name.value.decode(errors='replace')}, compute capability {major.value}.{minor.value}, "
            f"{memory[0] / 2**30:.0f} GiB, driver {driver.value.decode(errors='replace')}"
        )
    nvml.nvmlShutdown()
    return lines
