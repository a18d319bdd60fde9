"""OpenVINO on the CPU. The artefact is OpenVINO's IR: model.xml and model.bin.

Precision: by default the CPU plugin computes in bf16 if the processor supports it. An fp32 bundle must compute in fp32,
so the precision hint is always set to the bundle's precision; precision bf16 selects the fast path. A processor
without bf16 (or, for fp16, without AVX512-FP16 or AMX-FP16) computes such a bundle in fp32: correct, but no faster,
with half the file size. fp16 is never requested if unsupported, since the plugin would use bf16, with three bits less.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
from vp_engines.errors import BuildError, BundleCorruptError, BundleIncompatibleError, EngineUnavailableError
from vp_engines.extras import install_hint, installed

if TYPE_CHECKING:
    import numpy as np

ARTEFACT, WEIGHTS = "model.xml", "model.bin"
_HINT = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


class OpenVinoBackend(Backend):
    """Runs the model with OpenVINO's CPU plugin, tuned for latency."""

    name = "openvino"
    source = "onnx"
    opset = 23
    devices: ClassVar[tuple[Literal["cpu", "cuda"], ...]] = ("cpu",)
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "fp16")
    extra = "openvino"

    def available(self, purpose: Literal["build", "run"] = "run") -> Availability:
        if not installed("openvino"):
            return Availability(False, f"openvino is not installed: {install_hint(self.extra)}")
        return Availability(True, "openvino is installed")

    def version(self) -> str:
        # From "2026.4.1-22982-e213a147257-releases/2026/4", keep the version number.
        return str(require("openvino", self.name, self.extra).__version__).split("-")[0]

    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        self.check_source(source)
        ov = require("openvino", self.name, self.extra)
        core = ov.Core()
        try:
            model = core.read_model(str(source.onnx))
            _make_stable(model)
            # Without compress_to_fp16=False, fp32 weights are silently saved as fp16.
            ov.save_model(model, str(out / ARTEFACT), compress_to_fp16=False)
            hint = _within(core, _HINT[source.precision])
            core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        except RuntimeError as error:
            raise BuildError(f"OpenVINO {self.version()} refuses the model: {_reason(error)}") from error
        notes = []
        if hint != _HINT[source.precision]:
            notes.append(f"this CPU has no {source.precision}: OpenVINO computes in fp32 on it, at the speed of fp32")
        if options.device != "cpu":
            notes.append("OpenVINO bundles run on the CPU only")
        # IR can be read by any later version, not necessarily by earlier ones.
        oldest = ".".join(map(str, version_tuple(self.version())[:2]))
        requirements = {"openvino_min": oldest, "device": "cpu", "precision_hint": _HINT[source.precision]}
        return BuildResult(ARTEFACT, (ARTEFACT, WEIGHTS), requirements, tuple(notes))

    def needs(self, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
        rest = {key: value for key, value in requirements.items() if not key.startswith("openvino")}
        return {"openvino": f">= {_oldest(requirements)}", **rest}

    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        if options.device not in (None, "cpu"):
            raise EngineUnavailableError(
                f"engine 'openvino' was asked for device {options.device}", expected="cpu", fix="use another `engine`"
            )
        ov = require("openvino", self.name, self.extra)
        oldest = _oldest(requirements)
        if version_tuple(self.version())[:2] < version_tuple(oldest)[:2]:
            raise BundleIncompatibleError(
                f"openvino {self.version()} is installed", expected=f">= {oldest}", fix=install_hint(self.extra)
            )
        hint = str(requirements.get("precision_hint", "f32"))
        if hint not in _HINT.values():
            raise BundleIncompatibleError(f"precision hint '{hint}'", expected=f"one of {', '.join(_HINT.values())}")
        weights = next((content for name, content in files.items() if name.rsplit("/")[-1] == WEIGHTS), None)
        if weights is None:
            raise BundleCorruptError(f"no {WEIGHTS} beside '{artefact}'")
        core = ov.Core()
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _within(core, hint)}
        if options.threads is not None:
            config["INFERENCE_NUM_THREADS"] = options.threads
        if options.profile:
            config["PERF_COUNT"] = True
        try:
            model = core.read_model(files[artefact], weights)
            compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise BundleCorruptError(f"OpenVINO {self.version()} cannot load '{artefact}': {_reason(error)}") from error
        found = [sorted(port.names) for port in (*compiled.inputs, *compiled.outputs)]
        wanted = [spec.name for spec in (*inputs, *outputs)]
        if len(found) != len(wanted) or not all(name in names for name, names in zip(wanted, found, strict=True)):
            raise BundleCorruptError(f"'{artefact}' has inputs and outputs {found}", expected=f"{wanted}")
        again = (lambda: core.compile_model(model, "CPU", config)) if options.profile else None
        return OpenVinoRunner(compiled, inputs, outputs, again)


class OpenVinoRunner(RecordingRunner):
    """A compiled model with one infer request per thread, since a request holds its inputs and outputs.

    OpenVINO's profiler reports, per operation, the mean over all runs of a compiled model. When profiling, each batch
    size therefore gets a compiled model of its own.

    Args:
        again: Compiles the model once more, for recording; None disables recording.
    """

    def __init__(
        self,
        compiled: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        again: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(inputs, outputs, profile=again is not None)
        self._compiled, self._again = compiled, again
        self._local, self._lock = threading.local(), threading.Lock()
        self._of_batch: dict[int, Any] = {}

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        compiled, local = self._compiled, self._local
        self._check_open()  # may have been closed since the first check
        requests: dict[int, Any] = local.__dict__.setdefault("requests", {})
        key = 0 if self._again is None else len(images)
        if key not in requests:
            requests[key] = self._model_of(compiled, key).create_infer_request()
        request = requests[key]
        # share_outputs=False copies: this thread's next run overwrites the request's buffers.
        results = request.infer({0: images}, share_inputs=True, share_outputs=False)
        runs = self._runs  # another thread may stop the recording
        if runs is not None:
            runs.append(_recorded_run(request))
        return {spec.name: results[index] for index, spec in enumerate(self.outputs)}

    def _model_of(self, compiled: Any, batch: int) -> Any:
        """Compiled model for a batch size (0: any)."""
        if self._again is None:
            return compiled
        with self._lock:
            if batch not in self._of_batch:
                self._of_batch[batch] = self._again() if self._of_batch else compiled
            return self._of_batch[batch]

    def _close(self) -> None:
        self._compiled, self._of_batch = None, {}
        self._local = threading.local()


def _recorded_run(request: Any) -> RecordedRun:
    """Profile of the last run of `request`. Operations folded away are not listed."""
    return RecordedRun.in_sequence(
        (entry.node_name, f"{entry.node_type} {entry.exec_type}", entry.real_time.total_seconds() * 1e6)
        for entry in request.profiling_info
        if entry.status.name == "EXECUTED"
    )


def _oldest(requirements: Mapping[str, Any]) -> str:
    """Oldest OpenVINO for a bundle; early bundles record the full version that they were built with."""
    return str(requirements.get("openvino_min", requirements.get("openvino", "0")))


def _within(core: Any, hint: str) -> str:
    """Precision to request: the bundle's, or fp32 if the processor does not support it."""
    return hint if _CAPABILITY[hint] in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def _reason(error: Exception) -> str:
    """Reason of an OpenVINO error: messages start with source locations, the last line with text has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("Exception from", "Check '", "While "))]
    return first_line(useful[-1] if useful else error)


def _make_stable(model: Any) -> None:
    """Break ties of every TopK by the lowest index, as ONNX requires; OpenVINO's reader does not (2026.4).

    Integer TopKs are left alone: they sort indices, without ties, and the stable kernel is slower.
    """
    for node in model.get_ops():
        if node.get_type_name() == "TopK" and node.input(0).get_element_type().is_real():
            node.set_attribute("stable", True)
