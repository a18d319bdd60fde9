"""The AOTInductor backend."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor
from torch import nn
from torch._inductor.exc import CppCompileError
from torch.utils import cpp_extension

from tests.engines.backends import tiny_vit
from tests.engines.backends.tiny_vit import INPUTS, OUTPUTS
from vp_engines.backends import aoti
from vp_engines.backends.aoti import AotInductorBackend
from vp_engines.backends.base import BuildOptions, BuildResult, BuildSource, Runner, RunOptions
from vp_engines.errors import BuildError, BundleCorruptError, BundleIncompatibleError, EngineUnavailableError

BACKEND = AotInductorBackend()
Built = tuple[BuildResult, dict[str, bytes]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def source(vit: nn.Module) -> BuildSource:
    return BuildSource("fp32", INPUTS, OUTPUTS, program=tiny_vit.export(vit))


@pytest.fixture(scope="session")
def built(source: BuildSource, tmp_path_factory: pytest.TempPathFactory) -> Built:
    if not BACKEND.available("build").ok:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("aoti")
    result = BACKEND.build(source, out, BuildOptions())
    return result, tiny_vit.contents(result, out)


def open_(built: Built, options: RunOptions | None = None, **changes: Any) -> Runner:
    result, files = built
    requirements: Mapping[str, Any] = {**result.requirements, **changes}
    return BACKEND.open(result.artefact, files, INPUTS, OUTPUTS, requirements, options or RunOptions())


def test_same_answers_as_pytorch(built: Built, vit: nn.Module) -> None:
    with open_(built) as runner:
        tiny_vit.check_outputs(runner, vit)
        tiny_vit.check_threads(runner, vit)
        tiny_vit.check_bad_inputs(runner)
        read_only = tiny_vit.some_images(2)
        read_only.flags.writeable = False
        runner.run(read_only)
        tiny_vit.check_closed(runner)


def test_two_engines_at_once_and_closing_one(built: Built, vit: nn.Module) -> None:
    first, second = open_(built), open_(built)
    first.close()
    tiny_vit.check_outputs(second, vit)
    second.close()


def test_private_folder_that_goes_away(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti.tempfile, "tempdir", str(tmp_path))
    runner = open_(built)
    (folder,) = tmp_path.glob("vp-aoti-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    runner.close()
    assert not folder.exists()
    with pytest.raises(BundleCorruptError):
        open_((built[0], {"model.pt2": b""}))
    assert not list(tmp_path.glob("vp-aoti-*"))


def test_opens_without_the_compiler_of_torch(built: Built, vit: nn.Module, tmp_path: Path) -> None:
    """Importing torch._inductor takes seconds; it is only the fallback if torch has no direct loader."""
    code = (
        "import sys; from pathlib import Path; from vp_engines.backends.aoti import AotInductorBackend, _machine;"
        "from vp_engines.backends.base import RunOptions; import torch; artefact = Path(sys.argv[1]).read_bytes();"
        "AotInductorBackend().open('a', {'a': artefact}, (), (), _machine(torch, 'cpu'), RunOptions()).close();"
        "assert 'torch._inductor' not in sys.modules"
    )
    path = tmp_path / "model.pt2"
    path.write_bytes(built[1]["model.pt2"])
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    old_way = aoti._load(SimpleNamespace(_C=None), str(path))
    images = torch.from_numpy(tiny_vit.some_images(2))
    with torch.no_grad():
        torch.testing.assert_close(old_way(images), vit(images), atol=1e-4, rtol=0)


def test_threads(built: Built) -> None:
    before = torch.get_num_threads()
    try:
        with open_(built, RunOptions(threads=1)):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch": "1.0.0"}, "torch 1.0.0, here "),
        ({"platform": "windows-arm64"}, "platform windows-arm64, here "),
        ({"cpu_flags": ["avx2048"]}, "a CPU with avx2048"),
        ({"compute_capability": "9.0"}, "compute_capability 9.0, here None"),
    ],
)
def test_another_machine_is_refused_before_loading(built: Built, change: dict[str, Any], reason: str) -> None:
    result, _ = built
    with pytest.raises(BundleIncompatibleError, match=reason):
        open_((result, {"model.pt2": b"never looked at"}), **change)


def test_requirements_of_this_machine(built: Built) -> None:
    requirements = built[0].requirements
    assert requirements["torch"] == torch.__version__
    assert requirements["device"] == "cpu"
    assert "compute_capability" not in requirements
    assert requirements["cpu_flags"] == sorted(requirements["cpu_flags"])


def test_device_that_it_was_not_compiled_for(built: Built) -> None:
    with pytest.raises(BundleIncompatibleError, match="compiled for cpu and cuda was asked for"):
        open_(built, RunOptions(device="cuda"))
    if not torch.cuda.is_available():
        with pytest.raises(EngineUnavailableError, match="torch finds none here"):
            open_(built, device="cuda")


def test_damaged_artefact(built: Built) -> None:
    result, files = built
    for broken in tiny_vit.damaged(files, result.artefact):
        with pytest.raises(BundleCorruptError, match="torch cannot load"):
            open_((result, broken))


def test_build_without_what_it_needs(source: BuildSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EngineUnavailableError, match="no CUDA device"):
            BACKEND.build(source, tmp_path, BuildOptions(device="cuda"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler: install g++" in BACKEND.available("build").reason
    assert BACKEND.available("run").ok
    with pytest.raises(EngineUnavailableError, match="no C\\+\\+ compiler"):
        BACKEND.build(source, tmp_path, BuildOptions())


def test_build_says_why_it_failed(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="AOTInductor cannot compile the model: "):
        BACKEND.build(BuildSource("fp32", INPUTS, OUTPUTS, program="not a program"), tmp_path, BuildOptions())


class Compiler:
    """Stands in for torch's compiler: fails a given number of times, then writes a file or compiles for real."""

    def __init__(self, refusals: int, error: Exception, real: Callable[..., Any] | None = None) -> None:
        self.refusals, self.error, self.real = refusals, error, real
        self.widths: list[int | None] = []

    def __call__(self, program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        self.widths.append(inductor_configs.get("cpp.simdlen"))
        if len(self.widths) <= self.refusals:
            raise self.error
        if self.real is None:
            Path(package_path).write_bytes(b"compiled")
        else:
            self.real(program, package_path=package_path, inductor_configs=inductor_configs)


def refused(wrapped: bool = False) -> Exception:
    error = CppCompileError(
        ["g++"], "error: no match for 'operator<' (operand types are 'VectorizedN<long, 2>', 'long')"
    )
    if wrapped:
        outer = RuntimeError("the backend failed")
        outer.__cause__ = error
        return outer
    return error


@pytest.mark.parametrize(
    ("refusals", "widths", "bits", "note"),
    [
        (0, [None], 512, ()),
        (1, [None, 256], 256, ("with 256-bit vectors",)),
        (2, [None, 256, 1], 0, ("without vectors",)),
    ],
)
def test_code_that_the_compiler_refuses_is_written_anew_with_narrower_vectors(
    refusals: int, widths: list[int | None], bits: int, note: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compiler = Compiler(refusals, refused(wrapped=refusals == 2))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    monkeypatch.setattr(aoti, "_vector_bits", lambda: [512, 256, 0])
    built = BACKEND.build(BuildSource("fp32", INPUTS, OUTPUTS, program="a program"), tmp_path, BuildOptions())
    assert compiler.widths == widths
    assert built.requirements["vector_bits"] == bits
    refusal = "the C++ compiler refuses torch's code with 512-bit vectors"
    assert built.notes == tuple(f"compiled {width}: {refusal}" for width in note)


def test_what_no_width_helps_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = BuildSource("fp32", INPUTS, OUTPUTS, program="a program")
    monkeypatch.setattr(aoti, "_vector_bits", lambda: [512, 256, 0])
    for error, tries in ((refused(), 3), (ValueError("no such operator"), 1)):
        compiler = Compiler(9, error)
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
        with pytest.raises(BuildError, match="AOTInductor cannot compile the model: "):
            BACKEND.build(source, tmp_path, BuildOptions())
        assert len(compiler.widths) == tries


def test_the_widths_are_those_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    widths = aoti._vector_bits()
    assert widths == sorted(set(widths), reverse=True)
    assert widths[-1] == 0
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # torch also respects it when compiling
    assert aoti._vector_bits() == [0]


def test_narrower_code_gives_the_same_answers(
    source: BuildSource, vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real compiler, after a failure at the best width."""
    best = aoti._vector_bits()
    if len(best) < 2 or not BACKEND.available("build").ok:
        pytest.skip("no vectors, or no C++ compiler")
    compiler = Compiler(1, refused(), torch._inductor.aoti_compile_and_package)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    result = BACKEND.build(source, tmp_path, BuildOptions())
    assert result.requirements["vector_bits"] == best[1]
    assert len(result.notes) == 1
    with open_((result, tiny_vit.contents(result, tmp_path))) as runner:
        tiny_vit.check_outputs(runner, vit)


class Doubled(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.softmax(2 * images, dim=-1)


def test_a_space_in_the_paths_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space in the paths of the temporary folder and of torch, which torch's compiler commands do not quote."""
    if not BACKEND.available("build").ok:
        pytest.skip("no C++ compiler")
    spaced = tmp_path / "a b"
    spaced.mkdir()
    libraries = spaced / "lib"
    libraries.symlink_to(cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(libraries))
    monkeypatch.setattr(tempfile, "tempdir", str(spaced))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = set(Path("/tmp").glob("vp-inductor-*"))
    program = torch.export.export(Doubled(), (torch.zeros(2, 3, 32, 32),))
    result = BACKEND.build(BuildSource("fp32", INPUTS, OUTPUTS, program=program), spaced, BuildOptions())
    assert result.notes == ()  # no retry
    assert (spaced / result.artefact).stat().st_size > 1000
    assert str(libraries) == cpp_extension.TORCH_LIB_PATH
    assert "vp-inductor-" not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # torch sets it if it is not set
    assert set(Path("/tmp").glob("vp-inductor-*")) <= before


def test_its_profiler(built: Built) -> None:
    with open_(built) as plain, open_(built, RunOptions(profile=True)) as profiled:
        runs = tiny_vit.check_recorded(plain, profiled)
    names = [operation.name for operation in runs[1].operations]
    assert sum("attention" in name for name in names) == tiny_vit.BLOCKS
    assert any("cpp_fused" in name and "layer_norm" in name for name in names)
