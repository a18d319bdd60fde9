"""TensorRT and TensorRT-RTX, both through Polygraphy. The artefact is a serialised engine, model.engine.

Builds run in a child process: Polygraphy selects one of the two flavours per process, TensorRT has one logger per
process and prints to standard output, and a crash inside it must not end the export.

Networks are strongly typed, so the precision is that of the ONNX file. In fp16 and bf16, TensorRT fuses an ONNX
Attention (4-D, with or without an additive mask) or fails to build, so if the parsed network has the expected number of
attentions, all of them are fused. fp32 has no fused kernel: attentions are marked decomposable there.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vp_engines.backends import tensorrt_plugins
from vp_engines.backends.base import (
    Availability,
    Backend,
    BuildOptions,
    BuildResult,
    BuildSource,
    Precision,
    Runner,
    RunOptions,
    TensorSpec,
    first_line,
    require,
    version_tuple,
)
from vp_engines.backends.recording import RecordedRun
from vp_engines.backends.recording_runner import RecordingRunner
from vp_engines.backends.tensorrt_build import in_child, load_plugins, select
from vp_engines.errors import (
    BuildError,
    BundleCorruptError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
)
from vp_engines.extras import install_hint, installed

if TYPE_CHECKING:
    import numpy as np

ARTEFACT = "model.engine"


class _Polygraphy(Backend):
    """Shared by the two flavours. `module` is the Python package; `rtx` selects the flavour in Polygraphy."""

    source = "onnx"
    opset = 23
    precisions: ClassVar[tuple[Precision, ...]] = ("fp16", "bf16", "fp32")
    devices: ClassVar[tuple[Literal["cpu", "cuda"], ...]] = ("cuda",)
    fixed_batch_range = True
    module: ClassVar[str]
    rtx: ClassVar[bool]
    tied: ClassVar[int]  # number of version parts that an engine is tied to
    where: ClassVar[str]

    def available(self, purpose: Literal["build", "run"] = "run") -> Availability:
        for module in (self.module, "polygraphy"):
            if not installed(module):
                return Availability(False, f"{module} is not installed: {install_hint(self.extra)}{self.where}")
        if (purpose == "run" or not self.rtx) and gpu_capability() is None:
            return Availability(False, "no NVIDIA GPU with a driver is visible here")
        return Availability(True, f"{self.module} is installed")

    def version(self) -> str:
        return str(require(self.module, self.name, self.extra).__version__)

    def check_options(self, options: BuildOptions) -> None:
        super().check_options(options)
        self._target(options)

    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        self.check_source(source)
        ready = self.available("build")
        if not ready.ok:
            raise EngineUnavailableError(f"engine '{self.name}' cannot build: {ready.reason}")
        batch = [options.min_batch, options.opt_batch, options.max_batch]
        if batch != sorted(batch) or batch[0] < 1:
            raise BuildError(f"batch profile min, opt, max = {batch}", expected="1 <= min <= opt <= max")
        target = self._target(options)
        request = {
            "rtx": self.rtx,
            "onnx": str(source.onnx),
            "engine": str(out / ARTEFACT),
            "profile": {spec.name: [[size, *spec.shape[1:]] for size in batch] for spec in source.inputs},
            "compute_capability": target if self.rtx else None,
            "decomposable": source.precision == "fp32",
            "attention_blocks": source.attention_blocks,
            "timing_cache": str(options.timing_cache) if options.timing_cache and not self.rtx else None,
            "plugins": None,
            "plugin_nodes": source.plugin_nodes,
        }
        plugins = tensorrt_plugins.chosen() if source.plugin_nodes else None
        if plugins is not None:
            request["plugins"] = str(plugins)
        answer = in_child(request)
        notes = list(answer["notes"])
        if self.rtx and options.timing_cache:
            notes.append("TensorRT-RTX tunes its kernels on the GPU when it runs: it has no timing cache")
        if self.rtx:
            notes.append("kernels are compiled on the GPU when the engine is first loaded there, which takes a moment")
        if source.precision == "fp32" and source.attention_blocks:
            notes.append("fp32 has no fused attention in TensorRT: fp16 or bf16 is much faster")
        requirements = {self.module: answer["version"], "compute_capability": target, "batch": batch, "device": "cuda"}
        if plugins is not None:
            requirements["plugins"] = tensorrt_plugins.requirement(plugins)
        return BuildResult(ARTEFACT, (ARTEFACT,), requirements, tuple(notes))

    def _target(self, options: BuildOptions) -> str:
        """Compute capability to build for, as "8.9".

        Raises:
            BuildError: if it is not given and there is no GPU, is malformed, or (TensorRT) is not this machine's.
        """
        here = gpu_capability()
        target = options.compute_capability or here
        if target is None:
            raise BuildError(
                "no compute capability given and no GPU here to ask", fix="say it, as in `compute_capability=8.9`"
            )
        if not re.fullmatch(r"\d{1,2}\.\d", target):
            raise BuildError(f"compute capability '{target}'", expected="two numbers, as in 8.9")
        if not self.rtx and target != here:
            raise BuildError(
                f"compute capability {target}",
                expected=f"{here}, this machine's GPU: TensorRT builds for no other",
                fix="build on the target machine, or use `engine=trt-rtx`",
            )
        return target

    def needs(self, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
        parts = version_tuple(str(requirements.get(self.module, "")))[: self.tied]
        return {**requirements, self.module: ".".join(map(str, parts)) + ".*"}

    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        if options.device == "cpu":
            raise EngineUnavailableError(f"engine '{self.name}' runs on NVIDIA GPUs only", fix="leave out the device")
        # Compare everything before deserialising: an engine is executable code.
        ready = self.available("run")
        if not ready.ok:
            raise EngineUnavailableError(f"engine '{self.name}' cannot run: {ready.reason}")
        built, here = str(requirements.get(self.module)), self.version()
        if version_tuple(built)[: self.tied] != version_tuple(here)[: self.tied]:
            raise BundleIncompatibleError(
                f"{self.module} {here} is installed", expected=built, fix="install that version, or export again"
            )
        target, gpu = requirements.get("compute_capability"), gpu_capability()
        if target != gpu:
            raise BundleIncompatibleError(
                f"this GPU has compute capability {gpu}", expected=str(target), fix="export again for this GPU"
            )
        wanted = requirements.get("plugins")
        plugins = tensorrt_plugins.required(wanted) if wanted else None
        require("polygraphy", self.name, self.extra)
        select(self.rtx)
        if plugins is not None:
            load_plugins(plugins)
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        try:
            runner = TrtRunner(EngineFromBytes(files[artefact]))
            runner.activate()
        except PolygraphyException as error:
            raise BundleCorruptError(f"TensorRT cannot load '{artefact}': {first_line(error)}") from error
        layers = _watch(runner) if options.profile else None
        sizes = requirements["batch"]
        return TensorRtRunner(runner, int(sizes[0]), int(sizes[2]), inputs, outputs, layers)


class TensorRtBackend(_Polygraphy):
    """TensorRT: builds for, and runs on, one kind of GPU."""

    name = "trt"
    extra = "trt"
    module = "tensorrt"
    rtx = False
    tied = 3  # an engine is tied to the patch release
    where = " (from NVIDIA's index, on a machine with an NVIDIA GPU)"

    def runs_kernels(self, options: BuildOptions) -> Availability:
        if tensorrt_plugins.chosen() is None:
            return Availability(False, f"no library of TensorRT plugins: {tensorrt_plugins.HOW}, docs/plugins.md")
        return Availability(True, "there is a library of TensorRT plugins")


class TensorRtRtxBackend(_Polygraphy):
    """TensorRT-RTX: builds for RTX GPUs on any machine, and runs on them."""

    name = "trt-rtx"
    extra = "trt-rtx"
    module = "tensorrt_rtx"
    rtx = True
    tied = 2
    where = ""

    def runs_kernels(self, options: BuildOptions) -> Availability:
        return Availability(False, "TensorRT-RTX takes no plugins")


class TensorRtRunner(RecordingRunner):
    """Polygraphy's TrtRunner, with one execution context and one stream: one run at a time."""

    concurrent = False

    def __init__(
        self,
        runner: Any,
        min_batch: int,
        max_batch: int,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        layers: list[tuple[str, float]] | None = None,
    ) -> None:
        super().__init__(inputs, outputs, profile=layers is not None)
        self._runner, self._min_batch, self._max_batch = runner, min_batch, max_batch
        self._layers = layers

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if not self._min_batch <= len(images) <= self._max_batch:
            raise InputError(
                f"a batch of {len(images)}",
                expected=f"{self._min_batch} to {self._max_batch}, which this engine was built for",
                fix="split the batch, or export again with another batch range",
            )
        results = self._runner.infer({self.inputs[0].name: images})
        if self._layers is not None and self._runs is not None:
            self._runs.append(RecordedRun.in_sequence((name, "", 1000 * ms) for name, ms in self._layers))
            self._layers.clear()
        return {spec.name: results[spec.name].copy() for spec in self.outputs}  # the runner reuses its buffers

    def _close(self) -> None:
        self._runner.deactivate()


def _watch(runner: Any) -> list[tuple[str, float]]:
    """Attach TensorRT's IProfiler to a runner; the returned list receives (layer, milliseconds) for each run."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt, layers = lazy_import_trt(), list[tuple[str, float]]()

    class Watch(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            layers.append((layer_name, ms))

    runner.context.profiler = runner.vp_profiler = Watch()  # keep a reference: the context does not
    return layers


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, as "8.9", or None without a GPU or driver.

    Asks the driver library, without torch or TensorRT.
    """
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; every call returns 0 on success.
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else f"{major.value}.{minor.value}"
