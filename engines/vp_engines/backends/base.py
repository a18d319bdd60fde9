"""Interface of an engine backend: `available`, `build` and a `Runner`. One file in this folder per engine.

A backend imports its runtime inside functions, never at module level: importing vp_engines must not touch a GPU or an
optional package.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from vp_engines.backends.recording import RecordedRun
from vp_engines.errors import BuildError, EngineUnavailableError, InputError
from vp_engines.extras import EXTRAS, install_hint

if TYPE_CHECKING:
    import numpy as np

Precision = Literal["fp32", "fp16", "bf16"]


class Availability(NamedTuple):
    """Whether a backend works here; if not, which pip extra or device is missing, in one line."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype ("float32") and shape of an engine's input or output; a string in the shape is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class BuildSource:
    """A lowered model, in the forms that backends read.

    Attributes:
        precision: Dtype of the weights and activations; inputs and outputs stay float32.
        inputs, outputs: Signature of the model; axis 0 is the dynamic "batch".
        onnx: Path of the ONNX file, for backends with `source == "onnx"`.
        program: A torch.export.ExportedProgram, for backends with `source == "program"`.
        attention_blocks: Number of attention operators that the engine should fuse (0: do not check).
        plugin_nodes: Number of nodes in the ONNX file that need one of our plugins.
    """

    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx: Path | None = None
    program: Any = None
    attention_blocks: int = 0
    plugin_nodes: int = 0


@dataclass(frozen=True)
class BuildOptions:
    """Build options. Backends ignore those that do not apply and say so in `BuildResult.notes`.

    Attributes:
        min_batch, opt_batch, max_batch: Optimization profile, for engines that need one (TensorRT).
        device: "cpu" or "cuda".
        compute_capability: Target of TensorRT-RTX, as "8.9"; None for the GPU of this machine.
        timing_cache: File that TensorRT reads and updates; None for none.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    device: Literal["cpu", "cuda"] = "cpu"
    compute_capability: str | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class BuildResult:
    """Result of a build.

    Attributes:
        artefact: File name (inside the output folder) to pass to `open`.
        files: All file names written, `artefact` included.
        requirements: What a machine needs to run it, for the manifest (versions, compute capability, ...).
        notes: Notes for the user, one line each.
    """

    artefact: str
    files: tuple[str, ...]
    requirements: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunOptions:
    """Run options.

    Attributes:
        device: "cpu" or "cuda"; None for what the artefact was built for (ort: the CPU).
        threads: CPU threads per run; None for the runtime's default.
        profile: Record every run with the engine's own profiler, for `Runner.recorded`; slightly slower.
    """

    device: Literal["cpu", "cuda"] | None = None
    threads: int | None = None
    profile: bool = False


class Runner(ABC):
    """A loaded engine. Thread-safe; close it when done, or use it as a context manager.

    Subclasses implement `_run` and `_close`; shapes and dtypes are checked here. A subclass whose runtime is not
    thread-safe sets `concurrent = False` and runs under a lock.
    """

    concurrent: ClassVar[bool] = True

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._closed = False
        self._lock = threading.Lock()

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch.

        Args:
            images: float32 [batch, 3, height, width], preprocessed as the manifest states.

        Returns:
            One float32 array per output name, owned by the caller.

        Raises:
            InputError: if the dtype or shape is wrong, or the runner is closed.
        """
        images = check_input(images, self.inputs[0])
        if self.concurrent:
            self._check_open()
            return self._run(images)
        with self._lock:
            self._check_open()  # inside the lock: may have been closed while waiting
            return self._run(images)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("this engine is closed", fix="load the bundle again")

    def recorded(self) -> list[RecordedRun]:
        """All runs since the engine was opened with `RunOptions.profile`, in order. Stops the recording.

        Raises:
            InputError: if the runner is closed, was opened without `profile`, or this was called before.
            EngineUnavailableError: if the engine has no supported profiler.
        """
        with self._lock:
            self._check_open()
            return self._recorded()

    @abstractmethod
    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]: ...

    def _recorded(self) -> list[RecordedRun]:
        raise EngineUnavailableError(f"{type(self).__name__} has no profiler", fix="profile another engine")

    def _close(self) -> None:  # noqa: B027 (optional hook)
        """Release the runtime's resources. A concurrent runner must let runs in flight finish."""

    def close(self) -> None:
        """Release the engine. May be called more than once."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Backend(ABC):
    """An engine. Instances are stateless.

    Class attributes:
        name: Name of the engine.
        source: Form of the lowered model that `build` reads.
        opset: ONNX opset for this engine (None for `source == "program"`).
        oldest_opset: Oldest opset that a user may request instead; None: no choice.
        precisions: Precisions that `build` accepts, the default first.
        extra: pip extra that installs the runtime (vp_engines.extras).
        attention_form: Form of attention in the lowered model, see vp_exporter.rewrite.attention.
        devices: Supported devices, the default first.
        fixed_batch_range: Whether an engine runs only the batch sizes that it was built for (BuildOptions).
        onnx_functions: Whether it supports ONNX functions; if not, it gets the graph with function bodies inlined.
    """

    name: ClassVar[str]
    source: ClassVar[Literal["onnx", "program"]]
    opset: ClassVar[int | None]
    oldest_opset: ClassVar[int | None] = None
    precisions: ClassVar[tuple[Precision, ...]]
    extra: ClassVar[str]
    attention_form: ClassVar[Literal["sdpa", "packed", "explicit"]] = "sdpa"
    devices: ClassVar[tuple[Literal["cpu", "cuda"], ...]] = ("cpu", "cuda")
    fixed_batch_range: ClassVar[bool] = False
    onnx_functions: ClassVar[bool] = False

    def runs_kernels(self, options: BuildOptions) -> Availability:
        """Whether an engine built with these options runs the kernels of vp_kernels; if not, why, in one line."""
        return Availability(False, f"engine '{self.name}' has no kernels of ours")

    def takes_plugin_nodes(self, options: BuildOptions) -> bool:
        """Whether vp operators become plugins (the only way to run kernels from ONNX) with these options."""
        return self.source == "onnx" and self.runs_kernels(options).ok

    def check_opset(self, opset: int | None) -> None:
        """Check that this engine can read a graph in `opset` (None: the engine's default).

        Raises:
            BuildError: if it cannot.
        """
        if opset is None or opset == self.opset:
            return
        if self.opset is None:
            raise BuildError(f"`opset` is {opset} and engine '{self.name}' is not built from ONNX", fix="leave it out")
        if self.oldest_opset is None:
            raise BuildError(f"`opset` is {opset}", expected=f"{self.opset}, for engine '{self.name}'")
        if not self.oldest_opset <= opset <= self.opset:
            raise BuildError(
                f"`opset` is {opset}", expected=f"{self.oldest_opset} to {self.opset}, for engine '{self.name}'"
            )

    def needs(self, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
        """Requirements of an engine by name, in readable form."""
        return requirements

    def check_precision(self, precision: Precision) -> None:
        """Check that this backend builds in `precision`.

        Raises:
            BuildError: if it does not.
        """
        if precision not in self.precisions:
            raise BuildError(
                f"engine '{self.name}' has no {precision}",
                expected=f"one of {', '.join(self.precisions)}",
                fix="choose another `precision` or another `engine`",
            )

    def check_options(self, options: BuildOptions) -> None:
        """Check the options, as far as possible before the model is lowered.

        Raises:
            BuildError: if `build` would reject them.
        """
        if options.device not in self.devices:
            raise BuildError(
                f"engine '{self.name}' was asked for device {options.device}",
                expected=" or ".join(self.devices),
                fix="choose another `device` or another `engine`",
            )

    def check_source(self, source: BuildSource) -> None:
        """Check that `source` has the form and precision that this backend needs.

        Raises:
            BuildError: if it does not.
        """
        self.check_precision(source.precision)
        if (source.onnx if self.source == "onnx" else source.program) is None:
            raise BuildError(f"engine '{self.name}' builds from the {self.source} form, which was not lowered")

    @property
    def packages(self) -> tuple[str, ...]:
        """Import names of the modules that the engine needs at run time."""
        return EXTRAS[self.extra]

    @abstractmethod
    def available(self, purpose: Literal["build", "run"] = "run") -> Availability:
        """Whether this backend can build or run on this machine."""

    @abstractmethod
    def version(self) -> str:
        """Version of the runtime, for the manifest."""

    @abstractmethod
    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        """Write the engine's files into the existing empty folder `out`.

        Raises:
            EngineUnavailableError: if the runtime is missing.
            BuildError: if the engine rejects the model.
        """

    @abstractmethod
    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        """Load an engine from verified bytes, never from a path: nothing may change between the hash and the load.

        Args:
            artefact: Key in `files` to start from.
            files: File name -> content, of the artefact and the files that it refers to.
            requirements: As recorded by `build`.

        Raises:
            EngineUnavailableError: if the runtime is missing.
            BundleIncompatibleError: if the machine does not meet `requirements`.
        """


def require(module: str, engine: str, extra: str) -> ModuleType:
    """Import the package that an engine needs.

    Raises:
        EngineUnavailableError: if it is missing or broken; the message names the pip extra.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package is missing
        raise EngineUnavailableError(
            f"engine '{engine}' needs {module}, which does not import ({error})", fix=install_hint(extra)
        ) from error


def version_tuple(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version.strip())
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def first_line(text: object, limit: int = 400) -> str:
    """First non-empty line of an error message, shortened."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0][:limit] if lines else "no message"


def check_input(images: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Check one input array against its spec and return it C-contiguous.

    Raises:
        InputError: if the type, dtype, rank or size is wrong, or the batch is empty.
    """
    import numpy as np

    want = f"{spec.dtype} array of shape [{', '.join(str(axis) for axis in spec.shape)}]"
    if not isinstance(images, np.ndarray):
        raise InputError(f"input '{spec.name}' is a {type(images).__name__}", expected=f"a {want}")
    if images.dtype != np.dtype(spec.dtype):
        raise InputError(
            f"input '{spec.name}' has dtype {images.dtype}", expected=f"a {want}", fix=f"use .astype('{spec.dtype}')"
        )
    fits = images.ndim == len(spec.shape) and all(
        size > 0 if isinstance(axis, str) else size == axis for size, axis in zip(images.shape, spec.shape, strict=True)
    )
    if not fits:
        raise InputError(f"input '{spec.name}' has shape {list(images.shape)}", expected=f"a {want}")
    return np.ascontiguousarray(images)
