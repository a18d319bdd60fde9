"""TensorRT and TensorRT-RTX, one code path through Polygraphy. The artefact is a serialised engine, model.engine.

Builds run in a child process: Polygraphy chooses between the two flavours once per process, TensorRT has one logger
per process and prints where it likes, and a crash inside it must not take the exporter along.

Networks are strongly typed, so the precision is that of the ONNX file. fp16 and bf16: TensorRT fuses an ONNX Attention
(4-D, with or without an additive mask) or refuses to build, so a build whose parsed network has the expected number of
attentions has them all fused. fp32 has no fused kernel: attentions are marked decomposable there.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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
    install_hint,
    installed,
    require,
    version_tuple,
)
from vp_engines.errors import (
    BuildError,
    BundleCorruptError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
)

if TYPE_CHECKING:
    import numpy as np

ARTEFACT = "model.engine"
MOST_SORTED = 3840  # the largest k of TensorRT's TopK


class _Polygraphy(Backend):
    """What the two flavours share. `module` is the Python package; `rtx` tells Polygraphy which one to use."""

    source = "onnx"
    opset = 23
    precisions: ClassVar[tuple[Precision, ...]] = ("fp16", "bf16", "fp32")
    devices: ClassVar[tuple[Literal["cpu", "cuda"], ...]] = ("cuda",)
    fixed_batch_range = True
    module: ClassVar[str]
    rtx: ClassVar[bool]
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
        }
        answer = _in_child(request)
        notes = list(answer["notes"])
        if self.rtx and options.timing_cache:
            notes.append("TensorRT-RTX tunes its kernels on the GPU when it runs: it has no timing cache")
        if self.rtx:
            notes.append("kernels are compiled on the GPU when the engine is first loaded there, which takes a moment")
        if source.precision == "fp32" and source.attention_blocks:
            notes.append("fp32 has no fused attention in TensorRT: fp16 or bf16 is much faster")
        requirements = {self.module: answer["version"], "compute_capability": target, "batch": batch, "device": "cuda"}
        return BuildResult(ARTEFACT, (ARTEFACT,), requirements, tuple(notes))

    def _target(self, options: BuildOptions) -> str:
        """The compute capability to build for, as "8.9".

        Raises:
            BuildError: not given and no GPU to ask, not a compute capability, or not this machine's (TensorRT).
        """
        here = gpu_capability()
        target = options.compute_capability or here
        if target is None:
            raise BuildError(
                "no compute capability given and no GPU here to ask", fix="say it, as in --compute-capability 8.9"
            )
        if not re.fullmatch(r"\d{1,2}\.\d", target):
            raise BuildError(f"compute capability '{target}'", expected="two numbers, as in 8.9")
        if not self.rtx and target != here:
            raise BuildError(
                f"compute capability {target}",
                expected=f"{here}, this machine's GPU: TensorRT builds for no other",
                fix="build on the target machine, or use --engine trt-rtx",
            )
        return target

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
        # Everything is compared before the first byte is deserialised: a plan is executable code.
        ready = self.available("run")
        if not ready.ok:
            raise EngineUnavailableError(f"engine '{self.name}' cannot run: {ready.reason}")
        built, here = str(requirements.get(self.module)), self.version()
        parts = 2 if self.rtx else 3  # a TensorRT plan is tied to the patch release
        if version_tuple(built)[:parts] != version_tuple(here)[:parts]:
            raise BundleIncompatibleError(
                f"{self.module} {here} is installed", expected=built, fix="install that version, or export again"
            )
        target, gpu = requirements.get("compute_capability"), gpu_capability()
        if target != gpu:
            raise BundleIncompatibleError(
                f"this GPU has compute capability {gpu}", expected=str(target), fix="export again for this GPU"
            )
        require("polygraphy", self.name, self.extra)
        _select(self.rtx)
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.exception import PolygraphyException

        try:
            runner = TrtRunner(EngineFromBytes(files[artefact]))
            runner.activate()
        except PolygraphyException as error:
            raise BundleCorruptError(f"TensorRT cannot load '{artefact}': {first_line(error)}") from error
        return TensorRtRunner(runner, int(requirements["batch"][0]), int(requirements["batch"][2]), inputs, outputs)


class TensorRtBackend(_Polygraphy):
    """TensorRT: builds and runs on one and the same kind of GPU."""

    name = "trt"
    extra = "trt"
    module = "tensorrt"
    rtx = False
    where = " (from NVIDIA's index, on a machine with an NVIDIA GPU)"


class TensorRtRtxBackend(_Polygraphy):
    """TensorRT-RTX: builds for RTX GPUs on any machine, runs on them."""

    name = "trt-rtx"
    extra = "trt-rtx"
    module = "tensorrt_rtx"
    rtx = True
    where = ""


class TensorRtRunner(Runner):
    """Polygraphy's TrtRunner, which has one execution context and one stream: one thread at a time."""

    concurrent = False

    def __init__(
        self,
        runner: Any,
        min_batch: int,
        max_batch: int,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        super().__init__(inputs, outputs)
        self._runner, self._min_batch, self._max_batch = runner, min_batch, max_batch

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if not self._min_batch <= len(images) <= self._max_batch:
            raise InputError(
                f"a batch of {len(images)}",
                expected=f"{self._min_batch} to {self._max_batch}, which this engine was built for",
                fix="split the batch, or export again with another batch range",
            )
        results = self._runner.infer({self.inputs[0].name: images})
        return {spec.name: results[spec.name].copy() for spec in self.outputs}  # the runner reuses its buffers

    def _close(self) -> None:
        self._runner.deactivate()


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, as "8.9", or None where there is no GPU or no driver.

    Asks the driver library, which needs neither torch nor TensorRT.
    """
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; every call returns 0 for success.
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else f"{major.value}.{minor.value}"


def _select(rtx: bool) -> None:
    """Tell Polygraphy which flavour to use. It reads this once, when its TensorRT backend is imported.

    Raises:
        EngineUnavailableError: this process already uses the other one.
    """
    from polygraphy import config

    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        one, other = ("trt-rtx", "trt") if rtx else ("trt", "trt-rtx")
        raise EngineUnavailableError(
            f"this process already uses engine '{other}', and Polygraphy takes one of the two per process",
            fix=f"load the '{one}' bundle in another process",
        )
    config.USE_TENSORRT_RTX = rtx


def _in_child(request: dict[str, Any]) -> dict[str, Any]:
    """Run `_build` on `request` in a process of its own and return its answer.

    Raises:
        BuildError: with TensorRT's last error line.
    """
    with tempfile.TemporaryDirectory(prefix="vp-trt-") as folder:
        answer = Path(folder, "answer.json")
        # The child finds our packages where this process found them, installed or not.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"  # a build must never install packages
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-c",
                "import sys, vp_engines.backends.tensorrt as t; t._child(sys.argv[1])",
                str(answer),
            ],
            input=json.dumps(request),
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
        if done.returncode == 0 and answer.is_file():
            result: dict[str, Any] = json.loads(answer.read_text())
            if result["error"]:
                raise BuildError(result["error"])
            return result
    raise BuildError(f"{'TensorRT-RTX' if request['rtx'] else 'TensorRT'} cannot build: {_cause(done.stdout)}")


def _cause(output: str) -> str:
    """The last error of TensorRT ("[E]"), else of Polygraphy ("[!]"), else the last line of a traceback or crash."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in output.splitlines()]
    for mark in ("[E]", "[!]", ""):
        found = [line for line in lines if line.startswith(mark) and line]
        if found:
            return first_line(found[-1].removeprefix(mark), limit=600)
    return "the process died without a word"


def _child(answer: str) -> None:
    """Entry point of the child: a request on standard input, the answer into the file `answer`."""
    request = json.loads(sys.stdin.read())
    _select(request["rtx"])
    from polygraphy.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        result = {"error": "", **_build(request)}
    except BuildError as error:
        result = {"error": str(error), "notes": []}
    Path(answer).write_text(json.dumps(result))


def _build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse, check, build and save one engine (in the child).

    Raises:
        BuildError: a target that this version lacks, or another number of attentions than the model has.
        PolygraphyException: TensorRT refuses the model; the reasons have been printed.
    """
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        Profile,
        SetDecomposableAttentions,
        network_from_onnx_path,
    )
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    config: dict[str, Any] = {"profiles": [Profile()]}
    for name, (smallest, best, largest) in request["profile"].items():
        config["profiles"][0].add(name, smallest, best, largest)
    if request["rtx"]:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as CreateConfig

        possible = sorted(re.findall(r"SM(\d+)(\d)\b", " ".join(vars(trt.ComputeCapability))), key=_numbers)
        wanted = tuple(request["compute_capability"].split("."))
        if wanted not in possible:
            raise BuildError(
                f"TensorRT-RTX {trt.__version__} cannot build for compute capability {'.'.join(wanted)}",
                expected=f"one of {', '.join('.'.join(pair) for pair in possible)}",
                fix="use another --engine for this GPU",
            )
        config["compute_capabilities"] = [_numbers(wanted)]
    network = network_from_onnx_path(request["onnx"], strongly_typed=True)
    _check_attentions(trt, network[1], request["attention_blocks"])
    _check_sorts(trt, network[1])
    notes = []
    cache = request["timing_cache"]
    if cache:
        notes += _drop_bad_cache(network[0], Path(cache))
        config["load_timing_cache"] = cache
    if request["decomposable"]:
        network = SetDecomposableAttentions(network)()
    builder_config = CreateConfig(**config)(network[0], network[1])
    builder_config.clear_flag(trt.BuilderFlag.TF32)  # on by default; fp32 means fp32
    engine = EngineBytesFromNetwork(network, builder_config, save_timing_cache=cache)()
    Path(request["engine"]).write_bytes(engine)
    return {"version": str(trt.__version__), "notes": notes}


def _numbers(parts: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(part) for part in parts)


def _check_attentions(trt: Any, network: Any, expected: int) -> None:
    """Count the attentions that the parser recognised; each one ends in an ATTENTION_OUTPUT layer.

    Raises:
        BuildError: there are more or fewer than `expected` (0: do not check).
    """
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)  # TensorRT 10.13 has no attention layers yet
    found = sum(network.get_layer(index).type == kind for index in range(network.num_layers)) if kind else 0
    if expected and found != expected:
        raise BuildError(
            f"TensorRT {trt.__version__} sees {found} attention operators",
            expected=f"{expected}, one for each block of the model",
            fix="export with opset 23, which has the Attention operator",
        )


def _check_sorts(trt: Any, network: Any) -> None:
    """Refuse a TopK of more values than TensorRT takes, by the name of its node.

    Raises:
        BuildError: there is one.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.TOPK:
            continue
        layer.__class__ = trt.ITopKLayer
        tokens = int(layer.get_output(0).shape[-1])  # the last axis holds tokens in every sort of ours
        if tokens > MOST_SORTED:
            raise BuildError(
                f"{layer.name} sorts {tokens} tokens",
                expected=f"at most {MOST_SORTED}: TensorRT's TopK takes no more",
                fix="drop patches with a static step first, or use another engine",
            )


def _drop_bad_cache(builder: Any, path: Path) -> list[str]:
    """Remove a timing cache that TensorRT cannot read, so that the build starts a new one; what to tell the user."""
    from polygraphy import util
    from polygraphy.logger import G_LOGGER

    if not path.exists():
        return []
    config = builder.create_builder_config()
    said = io.StringIO()
    # Newer versions return an empty cache in place of a bad one, and only their log tells.
    with util.LockFile(str(path)), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            try:
                cache = config.create_timing_cache(path.read_bytes())
                good = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
            except (RuntimeError, TypeError, ValueError):
                good = False
        if good and "timing cache" not in said.getvalue().lower():
            return []
        path.unlink()
    return [f"the timing cache {path} was corrupt or of another TensorRT or GPU; it was started afresh"]
