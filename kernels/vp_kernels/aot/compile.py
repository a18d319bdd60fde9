"""Compile one kernel for a given compute capability and record what a launcher needs to know.

No GPU is needed: Triton compiles for a named target and assembles with its own ptxas. Triton is only imported inside
functions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vp_kernels.aot.index import (
    FREE_SHARED_BYTES,
    HIDDEN,
    VARIANT_NAME,
    AotError,
    CompileError,
    UnavailableError,
    grid_size,
    parameter_type,
)
from vp_kernels.aot.ptx import Ptx, parse

if TYPE_CHECKING:
    from vp_kernels.launch import Variant

PACKAGE = Path(__file__).parents[1]
# Supported by triton >= 3.6 and its ptxas.
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
# These variables change the code that Triton generates, so builds under one name would differ between machines.
STEERING = (
    "TRITON_INTERPRET", "TRITON_OVERRIDE_ARCH", "TRITON_KERNEL_OVERRIDE", "TRITON_DEFAULT_FP_FUSION", "TRITON_DEBUG",
    "TRITON_F32_DEFAULT", "TRITON_MOCK_PTX_VERSION", "TRITON_LIBDEVICE_PATH", "TRITON_INSTRUMENTATION_MODE",
    "TRITON_ENABLE_ASAN", "TRITON_STORE_BINARY_ONLY", "LLVM_EXTRACT_DI_LOCAL_VARIABLES", "DISABLE_PTXAS_OPT",
    "PTXAS_OPTIONS", "DISABLE_LLVM_OPT", "DISABLE_MMA_V3", "DISABLE_MMA_V5", "USE_IR_LOC",
)  # fmt: skip
ON_BY_DEFAULT = "TRITON_DEFAULT_FP_FUSION"
_OFF = ("", "0", "false", "off", "no", "n")


@dataclass(frozen=True)
class Task:
    """One compilation, picklable.

    Attributes:
        module: Module that defines `variants()`.
        sm: Compute capability, 90 for 9.0.
    """

    module: str
    operator: str
    variant: str
    sm: int

    def __str__(self) -> str:
        return f"{self.operator}/{self.variant} for sm_{self.sm}"


@dataclass(frozen=True)
class Built:
    """Result of one compilation: its index entry, without the digests of the files."""

    task: Task
    entry: dict[str, Any]
    ptx: bytes
    cubin: bytes
    sources: dict[str, str]
    ptxas: str
    seconds: float


def rooms(package: Path = PACKAGE) -> dict[str, str]:
    """Operator name to kernel module, found by listing this package."""
    return {each.parent.name: f"vp_kernels.{each.parent.name}.kernel" for each in sorted(package.glob("*/kernel.py"))}


def prepare_environment() -> None:
    """Set up the environment for reproducible builds.

    Raises:
        AotError: if a variable is set that changes the generated code.
        UnavailableError: if triton is missing.
    """
    for name in STEERING:
        value = os.environ.get(name, "").lower()
        if value not in (_OFF if name != ON_BY_DEFAULT else ("",)):
            raise AotError(f"{name} is set, and changes what is compiled; expected it unset: env -u {name} python ...")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # line info would put the path of this checkout into every file
    try:
        version = str(importlib.import_module("triton").__version__)
    except ImportError as error:
        raise UnavailableError(f"triton cannot be imported ({error}); expected 3.6 or newer") from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (3, 6):
        raise UnavailableError(f"triton is {version}; expected 3.6 or newer")


@functools.cache
def variants_of(module: str, operator: str) -> dict[str, Variant]:
    """Ahead-of-time variants of one operator by name, in the order that it lists them; empty if it has none.

    Raises:
        AotError: if a name is invalid, duplicated, or belongs to another operator.
        CompileError: if the module fails on import or in `variants()`.
        UnavailableError: if the module needs a package that is not installed.
    """
    try:
        offered = list(getattr(importlib.import_module(module), "variants", tuple)())
    except ImportError as error:
        raise UnavailableError(f"the kernels of {operator} cannot be imported: {error}") from None
    except Exception as error:
        raise CompileError(f"the kernels of {operator}: {type(error).__name__}: {_one_line(error)}") from None
    found: dict[str, Variant] = {}
    for each in offered:
        if each.operator != operator or not VARIANT_NAME.fullmatch(each.name):
            raise AotError(
                f"{module}: a variant is called {each.operator}/{each.name}; expected {operator}/ and a name"
            )
        if each.name in found:
            raise AotError(f"{module}: two variants are called {each.name!r}")
        found[each.name] = each
        _sources(each.config.kernel)  # hash now: by the time it is compiled, the file may have changed since the import
    return found


def compile_task(task: Task) -> Built:
    """Compile one variant for one compute capability.

    Raises:
        CompileError: if it does not compile, or cannot be launched outside Triton.
    """
    from triton import knobs

    start = time.monotonic()
    variant = variants_of(task.module, task.operator).get(task.variant)
    if variant is None:
        raise CompileError(f"{task}: it is no longer among the variants of {task.module}: start again")
    try:
        kernel, full, constants, attributes = _source(variant)
        ptx, cubin, metadata = _compile(kernel, full, constants, attributes, variant, task.sm)
        entry = _entry(variant, task, parse(ptx), metadata, constants)
        entry.update(_resources(cubin, knobs.nvidia.cuobjdump.path))
        sources = _sources(kernel)
    except Exception as error:
        raise CompileError(f"{task}: {type(error).__name__}: {_one_line(error)}") from None
    entry["sources"] = sorted(sources)
    tool = knobs.nvidia.ptxas_blackwell if task.sm >= 100 else knobs.nvidia.ptxas
    return Built(task, entry, ptx.encode(), cubin, sources, _tool_version(tool.path), time.monotonic() - start)


def _one_line(error: Exception) -> str:
    """Shorten an error to location and message, without Triton's source excerpt and ptxas' repro command."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip() and not each.startswith("Repro command")]
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]]))[:600] if lines else "no message"


def _source(variant: Variant) -> tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Kernel, argument types, constants and attributes of a variant, in the form that Triton's compiler takes."""
    from triton.runtime.jit import JITFunction

    kernel = variant.config.kernel
    if not isinstance(kernel, JITFunction):
        raise AotError(f"its kernel is a {type(kernel).__name__}; expected a plain @triton.jit function")
    constants = dict(variant.config.constants)
    for name, parameter in kernel.signature.parameters.items():
        if name not in constants and name not in variant.signature and parameter.default is not parameter.empty:
            constants[name] = parameter.default
    names = list(kernel.arg_names)
    if both := sorted(set(constants) & set(variant.signature)):
        raise AotError(f"argument {both[0]} is both in its signature and a constant")
    if odd := sorted(set(names) ^ (set(constants) | set(variant.signature))):
        raise AotError(f"argument {odd[0]}: the kernel's arguments are not its signature and constants together")
    if list(variant.signature) != [name for name in names if name in variant.signature]:
        raise AotError("its signature is not in the order of the kernel's arguments")
    if odd := sorted(set(variant.aligned) - set(variant.signature)):
        raise AotError(f"aligned argument {odd[0]} is not in its signature")
    for name, value in constants.items():
        if value is not None and type(value) not in (int, float, bool, str):
            raise AotError(f"constant {name} is {value!r:.80}; expected a number, a flag, text or None")
    full = {name: variant.signature.get(name, "constexpr") for name in names}
    return kernel, full, constants, {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}


def _compile(
    kernel: Any, full: dict[str, str], constants: dict[str, Any], attributes: Any, variant: Variant, sm: int
) -> tuple[str, bytes, Any]:
    """Compile to PTX and cubin; also returns Triton's metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    with contextlib.redirect_stdout(open(os.devnull, "w")):  # ptxas prints the whole PTX when it fails
        done = triton.compile(
            ASTSource(kernel, full, constants, attributes), target=GPUTarget("cuda", sm, 32), options=options
        )
    wanted = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1}
    wanted |= {"launch_cooperative_grid": False, "launch_pdl": False}
    for name, value in wanted.items():
        if (getattr(done.metadata, name, value) or 0) != value:
            raise AotError(f"{name} is {getattr(done.metadata, name)}; expected {value}: a plain launch gives no more")
    if getattr(done.metadata, "tensordesc_meta", None):
        raise AotError("it takes tensor descriptors; expected plain pointers")
    return done.asm["ptx"], done.asm["cubin"], done.metadata


def _entry(variant: Variant, task: Task, ptx: Ptx, metadata: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Index entry of one build, from its variant and its PTX."""
    parameters: list[dict[str, Any]] = []
    for name, dtype in variant.signature.items():
        kind, size = parameter_type(dtype)
        divisible = 16 if name in variant.aligned else 1
        parameters.append(
            {"name": name, "type": kind, "bytes": size, "hidden": False, "dtype": dtype, "divisible_by": divisible}
        )
    kind, size = parameter_type("*")
    hidden = {"name": "hidden", "type": kind, "bytes": size, "hidden": True, "dtype": None, "divisible_by": 1}
    parameters += [dict(hidden) for _ in range(HIDDEN)]
    if list(ptx.parameters) != [each["type"] for each in parameters]:
        raise AotError(
            f"its PTX takes {', '.join(ptx.parameters)}; expected its arguments and {HIDDEN} hidden pointers"
        )
    shapes = {
        name: list(limit) if isinstance(limit, (tuple, list)) else limit for name, limit in variant.shapes.items()
    }
    for expression in variant.grid:
        grid_size(expression, dict.fromkeys(shapes, 1))
    static, dynamic = ptx.static_shared, int(metadata.shared)
    path = f"{task.operator}/{task.variant}.sm{task.sm}"
    return {
        "operator": task.operator,
        "variant": task.variant,
        "kernel": variant.config.kernel.fn.__name__,
        "entry": ptx.entry,
        "sm": task.sm,
        "arch": ptx.target,
        "ptx_isa": ptx.isa,
        "ptx": {"path": path + ".ptx"},
        "cubin": {"path": path + ".cubin"},
        "parameters": parameters,
        "shared": {"static": static, "dynamic": dynamic, "raise_limit": static + dynamic > FREE_SHARED_BYTES},
        "num_warps": int(metadata.num_warps),
        "num_stages": variant.config.num_stages,
        "threads": ptx.threads,
        "dtype": variant.dtype,
        "constants": constants,
        "shapes": shapes,
        "grid": list(variant.grid),
    }


def _resources(cubin: bytes, tool: str) -> dict[str, int]:
    """Registers and local memory in bytes per thread. Triton puts no arrays in local memory, so any use is a spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=120
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if len(found) != 1:
        raise AotError(f"cuobjdump names {len(found)} kernels in it; expected one")
    registers, stack, local = map(int, found[0])
    return {"registers": registers, "spill_bytes": stack + local}


@functools.cache
def _sources(kernel: Any) -> dict[str, str]:
    """Digests of the files that define a kernel and its helpers."""
    from triton.runtime.jit import JITFunction

    seen: set[int] = set()
    found: dict[str, str] = {}
    waiting: list[Any] = [kernel] if isinstance(kernel, JITFunction) else []  # others are refused by `_source`
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        path = Path(function.fn.__code__.co_filename).resolve()
        if str(function.fn.__module__).startswith("triton."):
            continue  # identified by its version
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        names, held = function.fn.__code__.co_names, function.fn.__globals__
        holders = [each for each in (held.get(name) for name in names) if each is not None]
        holders += [getattr(each, name, None) for each in list(holders) if _is_module(each) for name in names]
        waiting += [each for each in holders if isinstance(each, JITFunction)]
    return found


def _is_module(value: Any) -> bool:
    return type(value) is type(os)


@functools.cache
def _tool_version(path: str) -> str:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"
