"""AOTInductor: torch compiles the exported program to a shared library. The artefact is one model.pt2.

A .pt2 is executable code. `open` takes bytes that the bundle has already verified, and loads them from a folder that no
other user can access. The artefact runs only with the torch version, processor and device that it was compiled for.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

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
from vp_engines.backends.recording import Operation, RecordedRun
from vp_engines.backends.recording_runner import RecordingRunner
from vp_engines.errors import BuildError, BundleCorruptError, BundleIncompatibleError, EngineUnavailableError
from vp_engines.extras import install_hint, installed

if TYPE_CHECKING:
    import numpy as np

ARTEFACT = "model.pt2"
# Instruction sets that g++ -march=native may use, as spelled in /proc/cpuinfo: on a processor that lacks one of them,
# the library dies of an illegal instruction.
_ISA = ("abm", "adx", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt", "sse4_1", "sse4_2", "vaes")
_ISA_PREFIXES = ("avx512", "avx_", "amx_", "sve", "asimd", "bf16", "i8mm")


class AotInductorBackend(Backend):
    """Runs a shared library compiled by torch._inductor, on the CPU or GPU that it was compiled for."""

    name = "aoti"
    source = "program"
    opset = None
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "fp16")
    extra = "aoti"

    def available(self, purpose: Literal["build", "run"] = "run") -> Availability:
        if not installed("torch"):
            return Availability(False, f"torch is not installed: {install_hint(self.extra)}")
        if purpose == "build" and _compiler() is None:
            return Availability(False, "no C++ compiler: install g++ (or name one in the environment variable CXX)")
        return Availability(True, "torch is installed")

    def check_options(self, options: BuildOptions) -> None:
        """Also check for the GPU, before the model is moved there to be traced.

        Raises:
            EngineUnavailableError: if the device is cuda and there is no GPU.
        """
        super().check_options(options)
        if options.device == "cuda" and not require("torch", self.name, self.extra).cuda.is_available():
            raise EngineUnavailableError("no CUDA device that torch can use", fix="build on the GPU, or `device=cpu`")

    def runs_kernels(self, options: BuildOptions) -> Availability:
        if options.device != "cuda":
            return Availability(False, "the vp kernels need a CUDA device")
        if not installed("triton"):
            return Availability(False, f"triton is not installed: {install_hint('export')}")
        return Availability(True, "AOTInductor compiles the vp kernels into the package")

    def version(self) -> str:
        return str(require("torch", self.name, self.extra).__version__)

    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        self.check_source(source)
        torch = require("torch", self.name, self.extra)
        ready = self.available("build")
        if not ready.ok:
            raise EngineUnavailableError(f"engine 'aoti' cannot build: {ready.reason}")
        self.check_options(options)
        import torch._inductor as inductor

        # Freezing packs the weights into the layout of the CPU's matrix kernels. dynamic_threads reads the thread count
        # at run time rather than compiling in this machine's. Kernel names for torch's profiler cost one flag check per
        # call.
        on_cpu = {"freezing": True, "cpp.dynamic_threads": True, "cpp.enable_kernel_profile": True}
        configs: dict[str, Any] = on_cpu if options.device == "cpu" else {}
        path = out / ARTEFACT
        with torch.no_grad(), _paths_without_space(), _scalars_stay_scalars():
            widths = _vector_bits() if options.device == "cpu" else [None]
            for place, bits in enumerate(widths):
                # The first width is torch's default, so it needs no option; 1 disables vectors.
                narrower = {"cpp.simdlen": bits or 1} if place else {}
                try:
                    inductor.aoti_compile_and_package(
                        source.program, package_path=str(path), inductor_configs={**configs, **narrower}
                    )
                    break
                except Exception as error:  # inductor and the C++ compiler raise many types
                    if place + 1 == len(widths) or not _refused_by_compiler(error):
                        raise BuildError(f"AOTInductor cannot compile the model: {first_line(error)}") from error
        requirements = _machine(torch, options.device)
        notes: tuple[str, ...] = ()
        if bits is not None:
            requirements["vector_bits"] = bits
            if place:
                notes = (f"compiled {_width(bits)}: the C++ compiler refuses torch's code {_width(widths[0])}",)
        return BuildResult(ARTEFACT, (ARTEFACT,), requirements, notes)

    def needs(self, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
        minor = ".".join(map(str, version_tuple(str(requirements.get("torch", "")))[:2]))
        return {**requirements, "torch": f"{minor}.*"}

    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        torch = require("torch", self.name, self.extra)
        device = str(requirements.get("device"))
        if options.device not in (None, device):
            raise BundleIncompatibleError(
                f"this bundle was compiled for {device} and {options.device} was asked for", fix="export it again"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailableError("this bundle was compiled for a GPU and torch finds none here")
        reasons = _mismatches(requirements, _machine(torch, device))
        if reasons:
            raise BundleIncompatibleError(
                f"this bundle was compiled for another machine: {'; '.join(reasons)}", fix="export it again here"
            )
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        # mkdtemp has mode 0700: no other user can change the file between writing and loading it.
        folder = tempfile.mkdtemp(prefix="vp-aoti-")
        path = os.path.join(folder, ARTEFACT)
        try:
            with open(path, "wb") as file:
                file.write(files[artefact])
            model = _load(torch, path)
        except Exception as error:  # zip and json errors, RuntimeError from the C++ loader
            shutil.rmtree(folder, ignore_errors=True)
            raise BundleCorruptError(f"torch cannot load '{artefact}': {first_line(error)}") from error
        return AotInductorRunner(model, device, folder, inputs, outputs, profile=options.profile)


class AotInductorRunner(RecordingRunner):
    """A loaded package.

    Thread-safe, one run at a time: torch holds the GIL during a run, so other Python threads wait too.
    `RunOptions.threads` sets torch's thread count, which is process-wide.
    """

    def __init__(
        self,
        model: Any,
        device: str,
        folder: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        profile: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, profile=profile)
        self._model, self._device, self._folder = model, device, folder

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        model = self._model
        self._check_open()  # may have been closed since the first check
        # from_numpy warns about read-only arrays, so copy those.
        batch = torch.from_numpy(images if images.flags.writeable else images.copy()).to(self._device)
        runs = self._runs  # another thread may stop the recording
        results = model(batch) if runs is None else self._record(model, batch, runs)
        tensors = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        named = zip(self.outputs, tensors, strict=True)
        # copy: on the CPU, numpy() is a view of memory that the library may still own
        return {spec.name: tensor.to("cpu", copy=True).numpy() for spec, tensor in named}

    def _record(self, model: Any, batch: Any, runs: list[RecordedRun]) -> Any:
        """Run once under torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self._device == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            results = model(batch)
            if cuda:
                import torch

                torch.cuda.synchronize()
        runs.append(_recorded_run(profiler.events(), cuda))
        return results

    def _close(self) -> None:
        self._model = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _recorded_run(events: Any, cuda: bool) -> RecordedRun:
    """Outermost operations in a trace of torch's profiler: kernels on a GPU, else the operations the library calls.

    Nested operations are left out: their time is part of the caller's.
    """
    spans = sorted(
        (event.time_range.start, -event.time_range.end, event.name)
        for event in events
        if (event.device_type.name == "CUDA") == cuda
    )
    operations: list[Operation] = []
    end, begin = float("-inf"), spans[0][0] if spans else 0.0
    for start, negative, name in spans:
        if start >= end:
            end = -negative
            operations.append(Operation(name, "", float(start - begin), float(end - start)))
    return RecordedRun(tuple(operations))


def _load(torch: Any, path: str) -> Callable[[Any], Any]:
    """Load the package at `path` as a function from one tensor to its outputs.

    Calls the C++ loader directly. torch._inductor.aoti_load_package would first import the compiler (seconds), and look
    for pickled programs, which our packages do not contain and which should never be unpickled.
    """
    loader = getattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader", None)
    if loader is None:
        import torch._inductor as inductor

        return cast("Callable[[Any], Any]", inductor.aoti_load_package(path))
    # model name, run_single_threaded, num_runners, device_index (-1: current device)
    package = loader(path, "model", False, 1, -1)
    return lambda batch: package.boxed_run([batch])


def _has_space(path: str) -> bool:
    return any(character.isspace() for character in path)


@contextmanager
def _paths_without_space() -> Iterator[None]:
    """Substitute folders without a space for the temporary folder, torch's cache and torch's libraries.

    Torch does not quote these paths in its commands for the C++ compiler.

    Raises:
        BuildError: if there is no folder to use.
    """
    from torch.utils import cpp_extension

    name, libraries, temporary = "TORCHINDUCTOR_CACHE_DIR", str(cpp_extension.TORCH_LIB_PATH), tempfile.tempdir
    cache = os.environ.get(name)
    if not _has_space(cache or tempfile.gettempdir()) and not _has_space(libraries):
        yield
        return
    places = [each for each in (tempfile.gettempdir(), "/tmp", "/var/tmp") if not _has_space(each)]
    place = next((each for each in places if os.access(each, os.W_OK)), None)
    if place is None:
        raise BuildError(
            f"torch cannot compile where the path of a folder has a space ('{tempfile.gettempdir()}')",
            fix="set TMPDIR to a folder without",
        )
    folder = tempfile.mkdtemp(prefix="vp-inductor-", dir=place)
    try:
        os.symlink(libraries, os.path.join(folder, "lib"))
        cpp_extension.TORCH_LIB_PATH = os.path.join(folder, "lib")
        if _has_space(cache or tempfile.gettempdir()):
            os.environ[name] = os.path.join(folder, "cache")
        tempfile.tempdir = place
        from torch._inductor import codecache

        headers = {each: getattr(codecache, each, None) for each in ("_HEADER_DIR", "_HEADER_LOCK_DIR")}
        for each in headers:  # cached by torch when it first compiled
            setattr(codecache, each, os.path.join(folder, each))
        try:
            yield
        finally:
            for each, value in headers.items():
                setattr(codecache, each, value)
    finally:
        cpp_extension.TORCH_LIB_PATH, tempfile.tempdir = libraries, temporary
        os.environ.pop(name, None)
        if cache is not None:
            os.environ[name] = cache
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _scalars_stay_scalars() -> Iterator[None]:
    """Work around a code generation fault of torch 2.11.

    A scalar used under a mask is treated as a vector from there on, and the generated code does not compile ("no match
    for operator<(VectorizedN<long, 2>, long)"), mostly with AVX-512, if the tokens fill less than a vector. Marks it as
    a scalar again after the masked part.
    """
    try:
        from torch._inductor.codegen.cpp import CppVecOverrides

        written = CppVecOverrides.__dict__["masked"]
        masked = written.__func__
    except (ImportError, KeyError, AttributeError):  # not torch 2.11
        yield
        return

    def corrected(mask: Any, body: Callable[[], Any], other: Any) -> Any:
        seen: list[tuple[Any, bool]] = []

        def noted() -> Any:
            result = body()
            seen.append((result, bool(getattr(result, "is_vec", True))))
            return result

        found = masked(mask, noted, other)
        for result, vector in seen:
            if not vector and result is not found:
                result.is_vec = False
        return found

    CppVecOverrides.masked = staticmethod(corrected)
    try:
        yield
    finally:
        CppVecOverrides.masked = written


def _vector_bits() -> list[int | None]:
    """Vector widths in bits that torch can generate code for: its default, then narrower ones; 0 is without vectors.

    [None] if this version of torch does not expose them.
    """
    try:
        from torch._inductor.cpu_vec_isa import pick_vec_isa, valid_vec_isa_list

        best = int(pick_vec_isa().bit_width())
        narrower = {int(isa.bit_width()) for isa in valid_vec_isa_list()} | {0}
    except (ImportError, AttributeError):
        return [None]
    return [best, *sorted((bits for bits in narrower if bits < best), reverse=True)]


def _width(bits: int | None) -> str:
    return f"with {bits}-bit vectors" if bits else "without vectors"


def _refused_by_compiler(error: BaseException | None) -> bool:
    """Whether the C++ compiler rejected torch's code. Depending on the version, torch wraps that error."""
    while error is not None:
        if type(error).__name__ == "CppCompileError":
            return True
        error = error.__cause__ or error.__context__
    return False


def _compiler() -> str | None:
    """Path of the C++ compiler that inductor will call, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _machine(torch: Any, device: str) -> dict[str, Any]:
    """Properties of this machine that a package compiled for `device` depends on."""
    machine: dict[str, Any] = {
        "torch": str(torch.__version__),
        "device": device,
        "platform": f"{platform.system()}-{platform.machine()}".lower(),
        "cpu_flags": _cpu_flags(),
    }
    if device == "cuda":
        machine["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        machine["cuda"] = str(torch.version.cuda)
    return machine


def _cpu_flags() -> list[str]:
    """Instruction sets of this processor that a compiler may use, sorted; empty if Linux does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    flags = line.partition(":")[2].split()
    return sorted({flag for flag in flags if flag in _ISA or flag.startswith(_ISA_PREFIXES)})


def _mismatches(required: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Reasons why a package with these requirements cannot be loaded on the machine `here`; empty if it can."""
    reasons = []
    # The generated code calls torch's C shim, which is stable within a minor release.
    if version_tuple(str(required.get("torch")))[:2] != version_tuple(str(here["torch"]))[:2]:
        reasons.append(f"torch {required.get('torch')}, here {here['torch']}")
    for key in ("platform", "compute_capability", "cuda"):
        if required.get(key) != here.get(key):
            reasons.append(f"{key} {required.get(key)}, here {here.get(key)}")
    missing = sorted(set(required.get("cpu_flags", ())) - set(here["cpu_flags"]))
    if missing:
        reasons.append(f"a CPU with {' '.join(missing)}")
    return reasons
