"""The code that AOTInductor writes for every reducer compiles, also for vectors that this processor does not have: the
compiler reads it, and nothing runs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch._inductor import config, cpu_vec_isa
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

from tests.exporter.reducers.test_export import EVERY_REDUCER, Steps, lower, make
from vp_engines.backends import get_backend
from vp_engines.backends.base import BuildOptions

# The second step meets tokens of several sizes and merges all that can: an empty list, rows that fill no vector whole.
ALL_MERGE: Steps = [("tome", {"r": 20}), ("tome", {"r": 20})]


def refused(package: Path, isa: cpu_vec_isa.VecISA, folder: Path) -> list[str]:
    """What the C++ compiler says against the sources of a package."""
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)
    sources = sorted(folder.rglob("*.cpp"))
    assert sources
    said = []
    for source in sources:
        builder = CppBuilder("code", [str(source)], CppTorchOptions(vec_isa=isa, warning_all=False), str(folder))
        command = [*shlex.split(builder.get_command_line()), "-fsyntax-only"]
        done = subprocess.run(command, capture_output=True, text=True)
        said += [line for line in done.stderr.splitlines() if "error:" in line] if done.returncode else []
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "arguments", "isa"),
    [
        (ALL_MERGE, {"img_size": (80, 48), "depth": 3}, cpu_vec_isa.VecAVX512()),
        pytest.param(EVERY_REDUCER, {}, cpu_vec_isa.VecAVX512VNNI(), marks=pytest.mark.exhaustive),
        pytest.param(EVERY_REDUCER, {}, cpu_vec_isa.VecAVX2(), marks=pytest.mark.exhaustive),
    ],
    ids=["all-merge-avx512", "every-avx512-vnni", "every-avx2"],
)
def test_the_code_of_every_reducer_compiles(
    steps: Steps, arguments: dict[str, Any], isa: cpu_vec_isa.VecISA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    flags = [*shlex.split(isa.build_arch_flags()), "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(["g++", *flags], input="", text=True, capture_output=True).returncode:
        pytest.skip(f"g++ cannot compile for {isa}")
    real = torch._inductor.aoti_compile_and_package

    def written(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        """Sources instead of a library."""
        sources = {**inductor_configs, "aot_inductor.package_cpp_only": True}
        real(program, package_path=package_path, inductor_configs=sources)

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: [isa])
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", written)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    with config.patch({"cpp.vec_isa_ok": True, "force_disable_caches": True}):
        source = lower(make(steps, **arguments), "aoti", tmp_path)
        built = get_backend("aoti").build(source, tmp_path, BuildOptions())
        assert built.requirements["vector_bits"] == isa.bit_width()
        assert refused(tmp_path / built.artefact, isa, tmp_path / "sources") == []
