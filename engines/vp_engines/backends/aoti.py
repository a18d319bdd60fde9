"""AOTInductor: torch compiles the exported program to a shared library. The artefact is one model.pt2.

A .pt2 is executable code: `open` is given bytes that the bundle has already verified, and loads those bytes from a
folder that no other user can reach. It runs only where what it was compiled for is found: torch, processor, device.
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
# Instruction sets that g++ -march=native may use, as /proc/cpuinfo spells them: the library dies of an illegal
# instruction on a processor that lacks one of those it was compiled with.
_ISA = ("abm", "adx", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt", "sse4_1", "sse4_2", "vaes")
_ISA_PREFIXES = ("avx512", "avx_", "amx_", "sve", "asimd", "bf16", "i8mm")


class AotInductorBackend(Backend):
    """Runs a shared library compiled by torch._inductor, on the CPU or on the GPU that it was compiled for."""

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
        """As everywhere; and the GPU, before the model is moved there to be traced.

        Raises:
            EngineUnavailableError: it was asked for and there is none.
        """
        super().check_options(options)
        if options.device == "cuda" and not require("torch", self.name, self.extra).cuda.is_available():
            raise EngineUnavailableError("no CUDA device that torch can use", fix="build on the GPU, or --device cpu")

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

        # Freezing packs the weights into the layout of the CPU's matrix kernels. Threads are counted when it runs:
        # by default the number of this machine would be compiled in.
        # Kernels tell torch's profiler their names; without a profiler that is one look at a flag each.
        on_cpu = {"freezing": True, "cpp.dynamic_threads": True, "cpp.enable_kernel_profile": True}
        configs: dict[str, Any] = on_cpu if options.device == "cpu" else {}
        path = out / ARTEFACT
        with torch.no_grad(), _paths_without_space(), _scalars_stay_scalars():
            widths = _vector_bits() if options.device == "cpu" else [None]
            for place, bits in enumerate(widths):
                # The first width is torch's own choice and is left to it; 1 stands for none at all.
                narrower = {"cpp.simdlen": bits or 1} if place else {}
                try:
                    inductor.aoti_compile_and_package(
                        source.program, package_path=str(path), inductor_configs={**configs, **narrower}
                    )
                    break
                except Exception as error:  # inductor raises whatever its passes and the compiler do
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
        # mkdtemp: mode 0700, so nobody can change the file between our writing it and torch reading it.
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
    """A loaded package. Threads may enter it together, and are served one after the other: torch keeps Python's global
    lock during a run, so other Python threads wait too. `RunOptions.threads` sets torch's thread count, which is
    process-wide."""

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
        self._check_open()  # closed between the first check and the line above
        # from_numpy warns about a read-only array; the model only reads it, and a copy would cost more than the view.
        batch = torch.from_numpy(images if images.flags.writeable else images.copy()).to(self._device)
        runs = self._runs  # read once: another thread may end the recording
        results = model(batch) if runs is None else self._record(model, batch, runs)
        tensors = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        named = zip(self.outputs, tensors, strict=True)
        # clone: on the CPU numpy() is a view of a tensor whose memory the library may still own
        return {spec.name: tensor.to("cpu", copy=True).numpy() for spec, tensor in named}

    def _record(self, model: Any, batch: Any, runs: list[RecordedRun]) -> Any:
        """One run under torch's profiler."""
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
    """The outermost operations among the events of torch's profiler: on a GPU its kernels, else what the library calls.

    An operation of torch calls others, which its own time holds already.
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
    """The package at `path` as a function from one tensor to its outputs.

    torch._inductor.aoti_load_package ends in the C++ loader that is called here, after importing the compiler (seconds)
    and after a look for pickled programs, which our packages do not have and which nobody should unpickle.
    """
    loader = getattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader", None)
    if loader is None:
        import torch._inductor as inductor

        return cast("Callable[[Any], Any]", inductor.aoti_load_package(path))
    # model name, run_single_threaded, num_runners, device_index (-1: the current device)
    package = loader(path, "model", False, 1, -1)
    return lambda batch: package.boxed_run([batch])


def _has_space(path: str) -> bool:
    return any(character.isspace() for character in path)


@contextmanager
def _paths_without_space() -> Iterator[None]:
    """Torch's commands for the C++ compiler do not quote the temporary folder, that of its cache and that of its own
    libraries: where their path has a space, others stand in for the while.

    Raises:
        BuildError: there is no folder to put them in.
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
        for each in headers:  # which torch looked up when it was first asked to compile
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
    """Torch 2.11 takes a scalar that once stood under a mask for a vector from there on, and writes code that no
    compiler takes ("no match for operator<(VectorizedN<long, 2>, long)"), most of all with AVX-512, where tokens fill
    less than a vector. Here it is a scalar again once the masked part is written."""
    try:
        from torch._inductor.codegen.cpp import CppVecOverrides

        written = CppVecOverrides.__dict__["masked"]
        masked = written.__func__
    except (ImportError, KeyError, AttributeError):  # another version of torch, with other faults
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
    """Widths of vectors that torch can write code for here, in bits: its own choice, and the narrower ones behind it;
    0 is code without vectors. [None] where this version of torch does not tell."""
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
    """Whether the C++ compiler refused what torch wrote. Torch wraps that error, or does not, as versions go."""
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
    """What a package compiled here for `device` depends on."""
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
    """This processor's instruction sets that a compiler may use, sorted; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    flags = line.partition(":")[2].split()
    return sorted({flag for flag in flags if flag in _ISA or flag.startswith(_ISA_PREFIXES)})


def _mismatches(required: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Why a package with these requirements must not be loaded on the machine `here`; empty if it may be."""
    reasons = []
    # The generated code calls torch's C shim, which is kept stable within a minor release.
    if version_tuple(str(required.get("torch")))[:2] != version_tuple(str(here["torch"]))[:2]:
        reasons.append(f"torch {required.get('torch')}, here {here['torch']}")
    for key in ("platform", "compute_capability", "cuda"):
        if required.get(key) != here.get(key):
            reasons.append(f"{key} {required.get(key)}, here {here.get(key)}")
    missing = sorted(set(required.get("cpu_flags", ())) - set(here["cpu_flags"]))
    if missing:
        reasons.append(f"a CPU with {' '.join(missing)}")
    return reasons
