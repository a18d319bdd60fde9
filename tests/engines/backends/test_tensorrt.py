"""The TensorRT and TensorRT-RTX backends. Building for TensorRT-RTX needs no GPU; runs are tested if there is one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.engines.backends import tiny_vit
from tests.engines.backends.tiny_vit import BLOCKS, INPUTS, OUTPUTS
from vp_engines.backends import tensorrt, tensorrt_build
from vp_engines.backends.base import BuildOptions, BuildResult, BuildSource, RunOptions
from vp_engines.backends.recording import Operation, RecordedRun
from vp_engines.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend, TensorRtRunner
from vp_engines.errors import (
    BuildError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
)

RTX, TRT = TensorRtRtxBackend(), TensorRtBackend()
GPU = tensorrt.gpu_capability()
OPTIONS = BuildOptions(compute_capability="8.9")
needs_rtx = pytest.mark.skipif(not RTX.available("build").ok, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def built(fp16: BuildSource, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, dict[str, bytes]]:
    if not RTX.available("build").ok:
        pytest.skip("TensorRT-RTX is not installed")
    out = tmp_path_factory.mktemp("rtx")
    result = RTX.build(fp16, out, OPTIONS)
    return result, tiny_vit.contents(result, out)


@pytest.mark.slow
def test_build_for_a_gpu_that_is_not_here(
    built: tuple[BuildResult, dict[str, bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    result, files = built
    assert result.artefact == "model.engine"
    assert len(files["model.engine"]) > 500_000  # half a million fp16 weights
    assert result.requirements["compute_capability"] == "8.9"
    assert result.requirements["batch"] == [1, 8, 64]
    assert result.requirements["tensorrt_rtx"] == RTX.version()
    assert capfd.readouterr().out == ""


@needs_rtx
def test_wrong_number_of_attentions(fp16: BuildSource, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=rf"sees {BLOCKS} attention operators; expected {BLOCKS + 1}, one for each"):
        RTX.build(replace(fp16, attention_blocks=BLOCKS + 1), tmp_path, OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_rtx
def test_fp32_attention_builds_and_bf16_too(fp32: BuildSource, bf16: BuildSource, tmp_path: Path) -> None:
    """By default, TensorRT rejects an fp32 Attention: "not supported by a dedicated kernel"."""
    result = RTX.build(fp32, tmp_path, OPTIONS)
    assert any("fp32 has no fused attention" in note for note in result.notes)
    RTX.build(bf16, tmp_path, replace(OPTIONS, compute_capability="12.0"))
    with pytest.raises(BuildError, match=r"TensorRT-RTX cannot build: .*sm75.*datatypes"):
        RTX.build(bf16, tmp_path, replace(OPTIONS, compute_capability="7.5"))


@needs_rtx
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compute_capability": "9.0"},
            r"cannot build .* 9\.0; expected one of 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1",
        ),
        ({"compute_capability": "ada"}, "compute capability 'ada'; expected two numbers"),
        ({"compute_capability": None}, "no compute capability given and no GPU here"),
        ({"min_batch": 9}, r"batch profile min, opt, max = \[9, 8, 64\]"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, object], message: str, fp16: BuildSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "gpu_capability", lambda: None)
    with pytest.raises(BuildError, match=message):
        RTX.build(fp16, tmp_path, replace(OPTIONS, **options))  # type: ignore[arg-type]


@needs_rtx
def test_model_that_is_not_onnx(fp16: BuildSource, tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x08noise")
    with pytest.raises(BuildError, match=r"TensorRT-RTX cannot build: \S") as caught:
        RTX.build(replace(fp16, onnx=path), tmp_path, OPTIONS)
    assert "Traceback" not in str(caught.value)


@needs_rtx
def test_corrupt_timing_cache_is_started_afresh(fp16: BuildSource, tmp_path: Path) -> None:
    """TensorRT-RTX has the API of TensorRT's cache (without an effect), so the code can be tested here."""
    cache = tmp_path / "timing.cache"
    request = {
        "rtx": True,
        "onnx": str(fp16.onnx),
        "engine": str(tmp_path / "model.engine"),
        "profile": {"images": [[size, 3, 32, 32] for size in (1, 8, 64)]},
        "compute_capability": "8.9",
        "decomposable": False,
        "attention_blocks": BLOCKS,
        "timing_cache": str(cache),
    }
    assert tensorrt_build.in_child(request)["notes"] == []
    cache.write_bytes(b"not a timing cache")
    assert "started afresh" in tensorrt_build.in_child(request)["notes"][0]
    assert cache.read_bytes() != b"not a timing cache"


@needs_rtx
def test_timing_cache_is_not_for_rtx(fp16: BuildSource, tmp_path: Path) -> None:
    result = RTX.build(fp16, tmp_path, replace(OPTIONS, timing_cache=tmp_path / "timing.cache"))
    assert any("has no timing cache" in note for note in result.notes)
    assert not (tmp_path / "timing.cache").exists()


def test_a_child_that_dies_is_a_build_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "sys", _Sys("/bin/false"))
    with pytest.raises(BuildError, match="TensorRT cannot build: the process died without a word"):
        tensorrt_build.in_child({"rtx": False})


class _Sys:
    def __init__(self, executable: str) -> None:
        self.executable, self.path = executable, sys.path


def test_cause_is_the_last_error_line() -> None:
    output = "[I] hello\n\x1b[38;5;1m[E] first\x1b[0m\n[E] the cause\n[!] Invalid Engine.\nTraceback\n  boom"
    assert tensorrt_build.cause(output) == "the cause"
    assert tensorrt_build.cause("[!] only polygraphy") == "only polygraphy"
    assert tensorrt_build.cause("Traceback\nValueError: x\n") == "ValueError: x"


@pytest.mark.skipif(GPU is not None, reason="a GPU is here")
def test_no_gpu(built: tuple[BuildResult, dict[str, bytes]]) -> None:
    assert RTX.available("build").ok
    assert RTX.available("run") == (False, "no NVIDIA GPU with a driver is visible here")
    assert not TRT.available("build").ok
    assert not TRT.available("run").ok
    result, files = built
    for backend in (RTX, TRT):
        with pytest.raises(EngineUnavailableError, match=f"engine '{backend.name}' cannot run: "):
            backend.open(result.artefact, files, INPUTS, OUTPUTS, result.requirements, RunOptions())
    with pytest.raises(EngineUnavailableError, match="NVIDIA GPUs only"):
        RTX.open(result.artefact, files, INPUTS, OUTPUTS, result.requirements, RunOptions(device="cpu"))


@needs_rtx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt_rtx": "1.2.0"}, r"is installed; expected 1\.2\.0"),
        ({"compute_capability": "12.0"}, r"this GPU has compute capability 8\.9; expected 12\.0"),
    ],
)
def test_requirements_are_checked_before_loading(
    change: dict[str, str],
    message: str,
    built: tuple[BuildResult, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt, "gpu_capability", lambda: "8.9")
    requirements = {**built[0].requirements, **change}
    with pytest.raises(BundleIncompatibleError, match=message):
        RTX.open("model.engine", {"model.engine": b"never looked at"}, INPUTS, OUTPUTS, requirements, RunOptions())


def test_one_flavour_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("polygraphy.config")
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", True)
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", object())
    tensorrt_build.select(True)
    with pytest.raises(
        EngineUnavailableError, match=r"already uses engine 'trt-rtx'.*load the 'trt' bundle in another"
    ):
        tensorrt_build.select(False)


def test_runner_checks_its_batch_range_and_copies_what_polygraphy_reuses() -> None:
    buffer = np.zeros((2, 10), np.float32)

    class Polygraphy:
        closed = 0

        def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            buffer[:] = feed["images"].mean((1, 2, 3))[:, None]
            return {"logits": buffer}

        def deactivate(self) -> None:
            self.closed += 1

    polygraphy = Polygraphy()
    runner = TensorRtRunner(polygraphy, 2, 4, INPUTS, OUTPUTS)
    first = runner.run(np.ones((2, 3, 32, 32), np.float32))["logits"]
    runner.run(np.zeros((2, 3, 32, 32), np.float32))
    assert (first == 1).all()
    for batch in (1, 5):
        with pytest.raises(InputError, match=f"a batch of {batch}; expected 2 to 4"):
            runner.run(np.ones((batch, 3, 32, 32), np.float32))
    runner.close()
    runner.close()
    assert polygraphy.closed == 1


def test_requirements_go_into_a_manifest(built: tuple[BuildResult, dict[str, bytes]]) -> None:
    assert json.loads(json.dumps(built[0].requirements)) == built[0].requirements


@pytest.mark.gpu
@pytest.mark.skipif(GPU is None, reason="needs a GPU")
@pytest.mark.parametrize("backend", [RTX, TRT], ids=lambda backend: backend.name)
def test_same_answers_as_pytorch(
    backend: TensorRtBackend | TensorRtRtxBackend, fp16: BuildSource, vit: nn.Module, tmp_path: Path
) -> None:
    if not backend.available("build").ok:
        pytest.skip(backend.available("build").reason)
    try:
        result = backend.build(fp16, tmp_path, BuildOptions(max_batch=8))
    except BuildError as error:
        pytest.skip(f"not on this GPU: {error}")
    files = tiny_vit.contents(result, tmp_path)
    with backend.open(result.artefact, files, INPUTS, OUTPUTS, result.requirements, RunOptions()) as runner:
        tiny_vit.check_outputs(runner, vit, tiny_vit.TOLERANCES["fp16"])
        tiny_vit.check_threads(runner, vit, tiny_vit.TOLERANCES["fp16"])
        tiny_vit.check_bad_inputs(runner)
        tiny_vit.check_closed(runner)


def test_layers_of_each_run_in_their_order() -> None:
    """Layers reported by TensorRT's IProfiler during `infer`; uses a fake runner, for lack of a GPU."""
    layers: list[tuple[str, float]] = []

    class Polygraphy:
        def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            layers.extend([("blocks.0/MatMul.0", 0.5), ("{ForeignNode[...]}", 0.25)])
            return {"logits": np.zeros((len(feed["images"]), 10), np.float32)}

    runner = TensorRtRunner(Polygraphy(), 1, 4, INPUTS, OUTPUTS, layers)
    for _ in range(2):
        runner.run(tiny_vit.some_images(1))
    first, second = runner.recorded()
    assert (
        first
        == second
        == RecordedRun(
            (Operation("blocks.0/MatMul.0", "", 0.0, 500.0), Operation("{ForeignNode[...]}", "", 500.0, 250.0))
        )
    )
    with pytest.raises(InputError, match="nothing is recorded"):
        runner.recorded()
