"""Selection of the TensorRT plugin library, and that a bundle requires the one that it was built with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.engines.backends.tiny_vit import INPUTS, OUTPUTS
from vp_engines.backends import get_backend, tensorrt, tensorrt_plugins
from vp_engines.backends.base import Availability, BuildOptions, BuildResult, BuildSource, RunOptions
from vp_engines.errors import BuildError, BundleIncompatibleError

TRT, RTX = get_backend("trt"), get_backend("trt-rtx")
CUDA = BuildOptions(device="cuda")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "libvp_plugins.so"
    path.write_bytes(b"\x7fELF and more")
    monkeypatch.setenv("VP_PLUGINS", str(path))
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that TensorRT and a GPU are available, up to the point of using them."""
    monkeypatch.setattr(tensorrt, "gpu_capability", lambda: "9.0")
    monkeypatch.setattr(tensorrt._Polygraphy, "available", lambda self, purpose="run": Availability(True, ""))
    monkeypatch.setattr(tensorrt._Polygraphy, "version", lambda self: "10.14.1.48")


def test_without_a_library_the_bodies_are_used_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VP_PLUGINS", raising=False)
    found = TRT.runs_kernels(CUDA)
    assert found == (
        False,
        "no library of TensorRT plugins: set VP_PLUGINS to the path of libvp_plugins.so, docs/plugins.md",
    )
    assert not TRT.takes_plugin_nodes(CUDA)


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VP_PLUGINS", "nowhere.so")
    with pytest.raises(BuildError, match=r"VP_PLUGINS is nowhere\.so, which is no file; expected libvp"):
        TRT.runs_kernels(CUDA)


@pytest.mark.usefixtures("library")
def test_plugins_are_for_tensorrt_alone() -> None:
    assert TRT.runs_kernels(CUDA).ok
    assert TRT.takes_plugin_nodes(CUDA)
    for other in (RTX, get_backend("ort"), get_backend("openvino")):
        assert not other.runs_kernels(CUDA).ok
        assert not other.takes_plugin_nodes(CUDA)


@pytest.mark.usefixtures("gpu")
def test_a_build_keeps_the_library_in_its_requirements(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def child(request: dict[str, object]) -> dict[str, object]:
        asked.append(request)
        return {"version": "10.14.1.48", "notes": []}

    monkeypatch.setattr(tensorrt, "in_child", child)
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"")

    def built(nodes: int) -> BuildResult:
        return TRT.build(BuildSource("fp16", INPUTS, OUTPUTS, onnx=onnx, plugin_nodes=nodes), tmp_path, CUDA)

    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert built(7).requirements["plugins"] == {"library": "libvp_plugins.so", "sha256": digest}
    assert (asked[-1]["plugins"], asked[-1]["plugin_nodes"]) == (str(library), 7)
    assert "plugins" not in built(0).requirements  # a portable model loads no library
    assert asked[-1]["plugins"] is None


@pytest.mark.usefixtures("gpu")
def test_a_bundle_wants_the_library_that_it_was_built_with(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported before anything is loaded or deserialised."""
    requirements = {
        "tensorrt": "10.14.1.48", "compute_capability": "9.0", "batch": [1, 8, 64], "device": "cuda",
        "plugins": tensorrt_plugins.requirement(library),
    }  # fmt: skip

    def opened() -> None:
        TRT.open("model.engine", {"model.engine": b"never looked at"}, INPUTS, OUTPUTS, requirements, RunOptions())

    library.write_bytes(b"\x7fELF and other")
    with pytest.raises(BundleIncompatibleError, match=r"has sha256 \w{12}\.\.\.; expected .*; set VP_PLUGINS"):
        opened()
    monkeypatch.setenv("VP_PLUGINS", "nowhere.so")
    with pytest.raises(BundleIncompatibleError, match=r"VP_PLUGINS is nowhere\.so, which is no file; expected libvp"):
        opened()
    monkeypatch.delenv("VP_PLUGINS")
    with pytest.raises(BundleIncompatibleError, match="no library of TensorRT plugins is given; expected libvp"):
        opened()
