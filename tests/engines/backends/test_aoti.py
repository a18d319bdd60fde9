"""The AOTInductor backend."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

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
    """Importing torch._inductor takes seconds; where torch has no direct loader, it is still the way."""
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


def test_its_profiler(built: Built) -> None:
    with open_(built) as plain, open_(built, RunOptions(profile=True)) as profiled:
        runs = tiny_vit.check_recorded(plain, profiled)
    names = [operation.name for operation in runs[1].operations]
    assert sum("attention" in name for name in names) == tiny_vit.BLOCKS
    assert any("cpp_fused" in name and "layer_norm" in name for name in names)
