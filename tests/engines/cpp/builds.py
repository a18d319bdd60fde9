"""Builds of the C++ loader for its tests; `make loader` creates them in advance."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.embedding import blocks, words
from tests.waiting import LONG

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "cpp"


def missing() -> str:
    """Missing requirements for building the loader ("make cpp-deps" installs them), or ""."""
    tools = [name for name in ("cmake", "ninja", "g++") if shutil.which(name) is None]
    headers = ["nlohmann/json.hpp", "openssl/evp.h", "gtest/gtest.h"]
    return ", ".join(tools + [name for name in headers if not Path("/usr/include", name).exists()])


def call(*command: str | Path, timeout: float = LONG) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def build(name: str, *options: str) -> Path:
    folder = BUILD / name
    common = ["-G", "Ninja", "-DCMAKE_UNITY_BUILD=ON", f"-DPython3_EXECUTABLE={sys.executable}"]  # JSON is parsed once
    call("cmake", "-S", ROOT, "-B", folder, *common, *options)
    call("cmake", "--build", folder)
    return folder


def build_sanitized() -> Path:
    """Build the loader and its tests with ASan and UBSan. -O0: otherwise compiling takes longer than all the tests."""
    options = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0", "-DVP_ENGINE_SANITIZE=ON", "-DVP_ENGINE_AOTI=ON"]
    return build("sanitized", *options)


def build_light() -> Path:
    """Build the loader without libtorch."""
    return build("light", "-DCMAKE_BUILD_TYPE=None", "-DVP_ENGINE_AOTI=OFF", "-DBUILD_TESTING=OFF")


def install(prefix: Path) -> Path:
    """Install the loader as a user does, by the commands in docs/embedding.md; returns the prefix."""
    places = {"build/loader": str(BUILD / "release"), "/opt/vp_engine": str(prefix), ".venv/bin/python": sys.executable}
    text = blocks("C and C++", "bash")[0]
    assert all(place in text for place in places)
    lines = [words(line, {old: new for old, new in places.items() if old in line}) for line in text.splitlines()]
    configure, *others = lines
    configure[configure.index(".")] = str(ROOT)
    # Faster to build, and sufficient for the tests.
    quick = ["-DCMAKE_UNITY_BUILD=ON", "-DBUILD_TESTING=OFF", "-DVP_ENGINE_AOTI=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    for command in ([*configure, *quick], *others):
        call(*command)
    return prefix


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"the C++ loader is not built: it needs {lacking}" if os.environ.get("VP_REQUIRE_CPP") else 0)
    build_sanitized()
    build_light()
    install(BUILD / "prefix")
