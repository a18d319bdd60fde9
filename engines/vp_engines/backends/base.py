"""What every engine backend offers: `available`, `build` and a `Runner`. One file in this folder per engine.

A backend imports its runtime inside its functions, never at the top of its file: importing vp_engines must touch
neither a GPU nor an optional package.
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
    """Whether a backend works here, and if not, which pip extra or device it needs (one line)."""

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
    """A lowered model, in the forms that the backends read.

    Attributes:
        precision: the dtype that the weights and activations already have; inputs and outputs stay float32.
        inputs, outputs: the model's signature; axis 0 is the dynamic "batch".
        onnx: path of the ONNX file, for backends with `source == "onnx"`.
        program: a torch.export.ExportedProgram, for backends with `source == "program"`.
        attention_blocks: how many attention operators the engine should find fused (0: do not check).
        plugin_nodes: how many nodes of the ONNX file are for plugins of ours.
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
    """How to build. Backends ignore what does not concern them and say so in `BuildResult.notes`.

    Attributes:
        min_batch, opt_batch, max_batch: the optimisation profile of engines that need one (TensorRT).
        device: "cpu" or "cuda".
        compute_capability: target of TensorRT-RTX, as "8.9"; None means the GPU of this machine.
        timing_cache: file that TensorRT reads and updates; None means none.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    device: Literal["cpu", "cuda"] = "cpu"
    compute_capability: str | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class BuildResult:
    """What a build left in its output folder.

    Attributes:
        artefact: file name (inside the output folder) that `open` starts from.
        files: every file name written, `artefact` included.
        requirements: what a machine must have to run it, for the manifest (versions, compute capability, ...).
        notes: things the user should know, one line each.
    """

    artefact: str
    files: tuple[str, ...]
    requirements: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Attributes:
        device: "cpu" or "cuda"; None means what the artefact was built for (for ort: the CPU).
        threads: threads of one run on the CPU; None means the runtime's own choice.
        profile: let the engine's own profiler record every run, for `Runner.recorded`; runs take a little longer.
    """

    device: Literal["cpu", "cuda"] | None = None
    threads: int | None = None
    profile: bool = False


class Runner(ABC):
    """A loaded engine: run it from any thread, close it when done (or use it as a context manager).

    Subclasses implement `_run` and `_close`; the checks of shape and dtype are here, once. A subclass whose runtime
    may not be entered by two threads at once sets `concurrent = False` and is run under a lock.
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
            images: float32 [batch, 3, height, width], preprocessed as the manifest says.

        Returns:
            One float32 array per output name; they belong to the caller.

        Raises:
            InputError: wrong dtype or shape, or the runner is closed.
        """
        images = check_input(images, self.inputs[0])
        if self.concurrent:
            self._check_open()
            return self._run(images)
        with self._lock:
            self._check_open()  # inside the lock: another thread may have closed it while this one waited
            return self._run(images)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("this engine is closed", fix="load the bundle again")

    def recorded(self) -> list[RecordedRun]:
        """Every run since the engine was opened with `RunOptions.profile`, in order. Ends the recording.

        Raises:
            InputError: the runner is closed, or was opened without it; or this was called before.
            EngineUnavailableError: the engine has no profiler that we know.
        """
        with self._lock:
            self._check_open()
            return self._recorded()

    @abstractmethod
    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]: ...

    def _recorded(self) -> list[RecordedRun]:
        raise EngineUnavailableError(f"{type(self).__name__} has no profiler", fix="profile another engine")

    def _close(self) -> None:  # noqa: B027 (a hook: a runner with nothing to release leaves it)
        """Release the runtime's resources. A concurrent runner may have runs in flight: they must end well."""

    def close(self) -> None:
        """Release the engine; calling it twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Backend(ABC):
    """One engine. Instances hold no state: everything is in the arguments.

    Class attributes:
        name: the word after --engine.
        source: which form of the lowered model `build` reads.
        opset: ONNX opset that the engine gets (None for `source == "program"`).
        oldest_opset: the oldest one that a user may ask for in its place; None: no choice.
        precisions: what `build` accepts, the default first.
        extra: the pip extra that installs the runtime (vp_engines.extras).
        attention_form: how the lowered model should write attention; vp_exporter.rewrite.attention says what each is.
        devices: what it runs on, the default first.
        fixed_batch_range: whether an engine runs only the batch sizes that it was built for (BuildOptions).
        onnx_functions: whether it reads ONNX functions; others are given the graph with their bodies inlined.
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
        """Whether an engine so built runs the kernels of vp_kernels, and if not, why (one line)."""
        return Availability(False, f"engine '{self.name}' has no kernels of ours")

    def takes_plugin_nodes(self, options: BuildOptions) -> bool:
        """Whether nodes of the vp operators become plugins in an engine so built: the one way for kernels into ONNX."""
        return self.source == "onnx" and self.runs_kernels(options).ok

    def check_opset(self, opset: int | None) -> None:
        """Check that a graph for this engine may be written in `opset` (None: the engine's own).

        Raises:
            BuildError: it may not.
        """
        if opset is None or opset == self.opset:
            return
        if self.opset is None:
            raise BuildError(f"--opset is {opset} and engine '{self.name}' is not built from ONNX", fix="leave it out")
        if self.oldest_opset is None:
            raise BuildError(f"--opset is {opset}", expected=f"{self.opset}, for engine '{self.name}'")
        if not self.oldest_opset <= opset <= self.opset:
            raise BuildError(
                f"--opset is {opset}", expected=f"{self.oldest_opset} to {self.opset}, for engine '{self.name}'"
            )

    def needs(self, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a machine must have to run an engine with these requirements, by name, for people to read."""
        return requirements

    def check_precision(self, precision: Precision) -> None:
        """Check that this backend builds in `precision`.

        Raises:
            BuildError: it does not.
        """
        if precision not in self.precisions:
            raise BuildError(
                f"engine '{self.name}' has no {precision}",
                expected=f"one of {', '.join(self.precisions)}",
                fix="choose another --precision or another --engine",
            )

    def check_options(self, options: BuildOptions) -> None:
        """Check what can be checked of the options before the model is lowered.

        Raises:
            BuildError: `build` would refuse them.
        """
        if options.device not in self.devices:
            raise BuildError(
                f"engine '{self.name}' was asked for device {options.device}",
                expected=" or ".join(self.devices),
                fix="choose another --device or another --engine",
            )

    def check_source(self, source: BuildSource) -> None:
        """Check that `source` has the form and precision that this backend builds from.

        Raises:
            BuildError: it has not.
        """
        self.check_precision(source.precision)
        if (source.onnx if self.source == "onnx" else source.program) is None:
            raise BuildError(f"engine '{self.name}' builds from the {self.source} form, which was not lowered")

    @property
    def packages(self) -> tuple[str, ...]:
        """The modules that the engine runs with, as they are imported."""
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
            EngineUnavailableError: the runtime is missing.
            BuildError: the engine refuses the model.
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
        """Load an engine from bytes that have already been verified (never from a path: nothing may change between
        the hash and the load).

        Args:
            artefact: the key in `files` to start from.
            files: file name -> content, the artefact and what it refers to.
            requirements: what `build` recorded.

        Raises:
            EngineUnavailableError: the runtime is missing.
            BundleIncompatibleError: the machine does not meet `requirements`.
        """


def require(module: str, engine: str, extra: str) -> ModuleType:
    """Import the package that an engine needs.

    Raises:
        EngineUnavailableError: it is missing or broken; the message names the pip extra.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: the package is there, a shared library that it needs is not
        raise EngineUnavailableError(
            f"engine '{engine}' needs {module}, which does not import ({error})", fix=install_hint(extra)
        ) from error


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version.strip())
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def first_line(text: object, limit: int = 400) -> str:
    """The first non-empty line of an error message, shortened."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0][:limit] if lines else "no message"


def check_input(images: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Check one input array against its spec and return it C-contiguous.

    Raises:
        InputError: wrong type, dtype, rank or size, or an empty batch.
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
