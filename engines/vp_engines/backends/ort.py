"""ONNX Runtime: the default engine. The artefact is the ONNX file itself, so it runs wherever ONNX Runtime does.

Measured with ViT-S/16 at 224 px (88 MB, fp32): a session opens in 0.2-0.3 s at any optimization level, with or without
prepacking. Storing an optimized model saves nothing and ties the file to one version, so the file is stored as lowered
and optimized when opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from types import ModuleType
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
from vp_engines.backends.ort_versions import OLDEST, least_version, opset_of
from vp_engines.backends.recording import Operation, RecordedRun, nothing_recorded
from vp_engines.errors import BuildError, BundleCorruptError, BundleIncompatibleError, EngineUnavailableError
from vp_engines.extras import install_hint, installed

if TYPE_CHECKING:
    import numpy as np

ARTEFACT = "model.onnx"
# Other domains would need a custom operator library, which a bundle does not carry.
DOMAINS = frozenset({"", "ai.onnx", "vp", "com.microsoft"})
_KERNEL = "_kernel_time"  # suffix of node names in ONNX Runtime's profile
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend(Backend):
    """Runs the ONNX file on the CPU, or on a GPU with onnxruntime-gpu."""

    name = "ort"
    source = "onnx"
    opset = 23
    oldest_opset = 18
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "fp16")  # no bf16: the CPU has no kernels for it
    extra = "cpu"
    attention_form = "packed"
    onnx_functions = True

    def available(self, purpose: Literal["build", "run"] = "run") -> Availability:
        if not installed("onnxruntime"):
            return Availability(False, f"onnxruntime is not installed: {install_hint(self.extra)}")
        too_old = _too_old(_installed_version())
        if too_old is not None:
            return Availability(False, str(too_old))
        if purpose == "build" and not installed("onnx"):
            return Availability(False, f"onnx is not installed: {install_hint('export')}")
        return Availability(True, "onnxruntime is installed")

    def version(self) -> str:
        return str(_onnxruntime(self).__version__)

    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        self.check_source(source)
        assert source.onnx is not None
        onnx = require("onnx", self.name, "export")
        # Load the graph alone: large weights need not pass through protobuf.
        try:
            onnx.checker.check_model(str(source.onnx))
            model = onnx.load(str(source.onnx), load_external_data=False)
        except Exception as error:  # onnx's own classes, protobuf's DecodeError, ValueError
            raise BuildError(f"{source.onnx} is not a valid ONNX model: {first_line(error)}") from error
        _check_operators(onnx, model)
        weights = _external_files(onnx, model, source.onnx)
        shutil.copyfile(source.onnx, out / ARTEFACT)
        for name in weights:
            shutil.copyfile(source.onnx.parent / name, out / name)
        # A server may read the file directly, so record the graph's own minimum; we require a safe version ourselves.
        needed = least_version(onnx, model, self.version())
        requirements = {
            "onnxruntime_min": max(needed, OLDEST, key=version_tuple),
            "onnxruntime_min_graph": needed,
            "opset": opset_of(model),
            "providers": [_PROVIDERS[options.device]],
        }
        files = (ARTEFACT, *weights)
        notes = []
        if options.device == "cpu":
            # A valid graph may still lack kernels: fail here, not on the user's server.
            contents = {name: (out / name).read_bytes() for name in files}
            try:
                self.open(ARTEFACT, contents, source.inputs, source.outputs, requirements, RunOptions("cpu")).close()
            except (BundleCorruptError, BundleIncompatibleError) as error:
                raise BuildError(f"ONNX Runtime {self.version()} cannot run the model: {error}") from error
            if source.precision == "fp16":
                notes.append("fp16 on the CPU is for checking: ONNX Runtime converts to fp32 there and is slower")
        return BuildResult(ARTEFACT, files, requirements, tuple(notes))

    def needs(self, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
        oldest = max(str(requirements.get("onnxruntime_min", OLDEST)), OLDEST, key=version_tuple)
        rest = {key: value for key, value in requirements.items() if not key.startswith("onnxruntime")}
        return {"onnxruntime": f">= {oldest}", **rest}

    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        ort = _onnxruntime(self)
        oldest = str(requirements.get("onnxruntime_min", OLDEST))
        if version_tuple(ort.__version__) < version_tuple(oldest):
            raise BundleIncompatibleError(
                f"onnxruntime {ort.__version__} is installed", expected=f">= {oldest}", fix=install_hint(self.extra)
            )
        provider = _PROVIDERS[options.device or "cpu"]
        if provider not in ort.get_available_providers():
            raise _no_cuda(ort.__version__)
        profile = tempfile.mkdtemp(prefix="vp-ort-profile-") if options.profile else None
        try:
            session = _session(ort, artefact, files, provider, options.threads, profile)
            if session.get_providers()[0] != provider:  # ONNX Runtime falls back to the CPU if CUDA fails to start
                raise _no_cuda(ort.__version__)
            found = [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
            wanted = [spec.name for spec in inputs], [spec.name for spec in outputs]
            if found != wanted:
                raise BundleCorruptError(f"'{artefact}' has inputs and outputs {found}", expected=f"{wanted}")
        except Exception:
            _forget(profile)
            raise
        return OnnxRuntimeRunner(session, inputs, outputs, profile)


def _onnxruntime(backend: OnnxRuntimeBackend) -> ModuleType:
    """Import ONNX Runtime with telemetry disabled, unless the user has set it otherwise.

    Its wheels carry telemetry, which leaves a file in the temporary folder on import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    module = require("onnxruntime", backend.name, backend.extra)
    too_old = _too_old(str(module.__version__))
    if too_old is not None:
        raise too_old
    return module


def _too_old(version: str | None) -> EngineUnavailableError | None:
    """The error if this ONNX Runtime is too old to open bundles with, else None."""
    if version is None or version_tuple(version) >= version_tuple(OLDEST):
        return None
    return EngineUnavailableError(
        f"onnxruntime {version} is installed, which reads files outside of the bundle",
        expected=f">= {OLDEST}",
        fix="pip install --upgrade onnxruntime",
    )


def _installed_version() -> str | None:
    """Version of ONNX Runtime, without importing it; None if no package of a known name is installed."""
    if "onnxruntime" in sys.modules:
        return str(sys.modules["onnxruntime"].__version__)
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


class OnnxRuntimeRunner(Runner):
    """A thread-safe InferenceSession.

    Args:
        profile: Folder for its profile, removed on close; None disables profiling.
    """

    def __init__(
        self,
        session: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        profile: str | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        self._session, self._profile = session, profile

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        session = self._session
        self._check_open()  # may have been closed since the first check
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, session.run(names, {self.inputs[0].name: images}), strict=True))

    def _recorded(self) -> list[RecordedRun]:
        if self._profile is None:
            raise nothing_recorded()
        try:
            return runs_in_profile(json.loads(Path(self._session.end_profiling()).read_text()))
        finally:
            _forget(self._profile)
            self._profile = None

    def _close(self) -> None:
        if self._profile is not None:
            self._session.end_profiling()  # otherwise the destructor writes the file, into a removed folder
            _forget(self._profile)
            self._profile = None
        self._session = None


def _forget(profile: str | None) -> None:
    if profile is not None:
        shutil.rmtree(profile, ignore_errors=True)


def runs_in_profile(events: list[dict[str, Any]]) -> list[RecordedRun]:
    """Runs in a profile of ONNX Runtime: a Chrome trace, times in microseconds."""
    kernels = sorted(
        (event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)),
        key=lambda event: float(event["ts"]),
    )
    starts = [float(event["ts"]) for event in kernels]
    runs = []
    for whole in sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"]):
        begin, end = float(whole["ts"]), float(whole["ts"]) + float(whole["dur"])
        operations = tuple(
            Operation(
                event["name"].removesuffix(_KERNEL), str(event["args"].get("op_name", "")),
                float(event["ts"]) - begin, float(event["dur"]),
            )
            for event in kernels[bisect_left(starts, begin) : bisect_left(starts, end)]
        )  # fmt: skip
        runs.append(RecordedRun(operations, float(whole["dur"])))
    return runs


def _session(
    ort: Any,
    artefact: str,
    files: Mapping[str, bytes],
    provider: str,
    threads: int | None,
    profile: str | None = None,
) -> Any:
    """Open an InferenceSession from bytes alone.

    Args:
        profile: Folder for its profile.

    Raises:
        BundleCorruptError: if the bytes are no ONNX model.
        BundleIncompatibleError: if ONNX Runtime cannot run it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(profile, "run")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    # Spinning idle threads take cores from other work: on two shared cores ViT-S took 0.21 s with spinning and 0.14 s
    # without at batch 1 (1.20 and 1.09 s at batch 8).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Not session.set_denormal_as_zero: it changes the floating-point mode of the calling thread.
    weights = {name: content for name, content in files.items() if name != artefact}
    if weights:
        options.add_external_initializers_from_files_in_memory(
            list(weights), list(weights.values()), [len(content) for content in weights.values()]
        )
    providers: list[Any] = [provider]
    if provider == _PROVIDERS["cuda"]:
        # fp32 means no TF32. The default algorithm search would run every convolution when the session opens.
        providers = [(provider, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), _PROVIDERS["cpu"]]
    # External files that were not passed in memory must not be read from disk.
    with tempfile.TemporaryDirectory(prefix="vp-ort-") as nowhere:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nowhere)
        try:
            return ort.InferenceSession(files[artefact], options, providers=providers)
        except Exception as error:  # its exceptions have no common base class
            found = f"ONNX Runtime {ort.__version__} cannot load '{artefact}': {first_line(error)}"
            if type(error).__name__ in ("InvalidProtobuf", "InvalidGraph", "InvalidArgument"):
                raise BundleCorruptError(found) from error
            raise BundleIncompatibleError(found) from error


def _no_cuda(version: str) -> EngineUnavailableError:
    return EngineUnavailableError(
        f"onnxruntime {version} has no working CUDA provider here",
        expected="an NVIDIA GPU and onnxruntime-gpu with its CUDA libraries",
        fix=f"{install_hint('gpu')} (in place of onnxruntime), or run on the CPU",
    )


def _graphs(onnx: Any, model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """(nodes, tensors) of the graph, of its functions and of every subgraph."""
    todo = [model.graph, *model.functions]
    while todo:
        graph = todo.pop()
        tensors = list(getattr(graph, "initializer", ()))
        for node in graph.node:
            for attribute in node.attribute:
                todo += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        yield graph.node, tensors


def _check_operators(onnx: Any, model: Any) -> None:
    """Reject operators for which ONNX Runtime would need a custom operator library.

    Raises:
        BuildError: if there is a foreign domain, or a vp operator without its function body.
    """
    bodies = {(function.domain, function.name) for function in model.functions}
    for nodes, _ in _graphs(onnx, model):
        for node in nodes:
            if node.domain not in DOMAINS:
                raise BuildError(
                    f"operator '{node.domain}::{node.op_type}' is from a foreign domain",
                    expected=f"one of {', '.join(sorted(domain or 'ai.onnx' for domain in DOMAINS - {'ai.onnx'}))}",
                )
            if node.domain == "vp" and (node.domain, node.op_type) not in bodies:
                raise BuildError(f"operator 'vp::{node.op_type}' has no function body in the model")


def _external_files(onnx: Any, model: Any, path: Path) -> tuple[str, ...]:
    """Names of the files beside `path` that hold weights.

    Raises:
        BuildError: if one is missing or in another folder.
    """
    names = set()
    for _, tensors in _graphs(onnx, model):
        for tensor in tensors:
            names |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    for name in names:
        beside = path.parent / name
        if PurePosixPath(name).name != name or beside.is_symlink() or not beside.is_file():
            raise BuildError(f"weights in '{name}'", expected=f"a file beside {path.name}", fix="export again")
    return tuple(sorted(names))
