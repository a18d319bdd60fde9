"""Description of the machine, its clocks, and its measured peak rates."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.runs import Row
from benchmarks.gpu.setup import fingerprint
from benchmarks.gpu.timing import CudaClock, interleave

QUERIES = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "temperature.gpu", "clocks_event_reasons.active", "pstate",
)  # fmt: skip
COPY_BYTES = 4 << 30  # read; the same number is written
GEMM = 8192
# Bits of clocks_event_reasons.active (NVML's nvmlClocksEventReasons), except 1, "idle", and 2, application settings.
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def smi(queries: Sequence[str] = QUERIES, *, command: str = "nvidia-smi") -> dict[str, str]:
    """Fields of nvidia-smi for GPU 0; unknown ones are left out. Empty without nvidia-smi."""
    found: dict[str, str] = {}
    arguments = [command, "--id=0", "--format=csv,noheader,nounits"]
    both = _ask([*arguments, f"--query-gpu={','.join(queries)}"])
    if both is not None and len(both) == len(queries):
        found = dict(zip(queries, both, strict=True))
    else:  # one unknown name makes the whole query fail, so query one by one
        for query in queries:
            answer = _ask([*arguments, f"--query-gpu={query}"])
            if answer is not None and len(answer) == 1:
                found[query] = answer[0]
            elif answer is None and query == queries[0]:
                break
    return {key: value for key, value in found.items() if value and not value.startswith("[")}


def _ask(command: list[str]) -> list[str] | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0 or not answer.stdout.strip():
        return None
    return [value.strip() for value in answer.stdout.strip().splitlines()[0].split(", ")]


def clocks() -> dict[str, Any]:
    """SM and memory clock in MHz, power in W, temperature, reasons that limit the clock; empty without nvidia-smi."""
    found = smi(("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active"))
    answer: dict[str, Any] = {}
    for key, name in (("clocks.sm", "sm"), ("clocks.mem", "mem"), ("power.draw", "power"), ("temperature.gpu", "temp")):
        try:
            answer[name] = float(found[key])
        except (KeyError, ValueError):
            continue
    reasons = found.get("clocks_event_reasons.active")
    if reasons:
        answer["reasons"] = throttle(reasons)
    return answer


def throttle(mask: str) -> list[str]:
    """Reasons in a mask such as "0x0000000000000004"; the mask itself if it is not a number."""
    try:
        bits = int(mask, 0)
    except ValueError:
        return [mask]
    names = [name for bit, name in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return names + ([hex(rest)] if rest else [])


def versions() -> dict[str, str]:
    """Versions of packages that affect the figures."""
    import timm
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    return {**found, "timm": timm.__version__}


def facts() -> dict[str, Any]:
    """Device, driver, versions."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "smi": smi(),
        **versions(),
    }


def measure_ceilings(rounds: int = 20) -> dict[str, Any]:
    """Measure copy bandwidth (bytes read plus written) and the rate of an 8192^3 matrix product on random data."""
    import torch

    clock = CudaClock()
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copied = interleave({"copy": copy}, clock, rounds=rounds, sample_seconds=0.02)["copy"]
    del source, target, copy
    products = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=dtype) for _ in range(2))
        products[name] = (a, b, torch.empty_like(a))
    calls = {name: lambda t=tensors: torch.mm(t[0], t[1], out=t[2]) for name, tensors in products.items()}
    timed = interleave(calls, clock, rounds=rounds, sample_seconds=0.02)
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / copied.median,
        "copy": copied.to_dict(),
        "gemm_flops": {name: 2 * GEMM**3 / found.median for name, found in timed.items()},
        "gemm": {name: found.to_dict() for name, found in timed.items()},
    }


def _measure() -> dict[str, Any]:
    import torch

    before = clocks()
    found = {**facts(), **measure_ceilings(), "clocks_before": before, "clocks_after": clocks()}
    torch.cuda.empty_cache()
    tera = found["copy_bytes_per_s"] / 1e12
    rate = ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in found["gemm_flops"].items())
    return {**found, "say": f"{found['device']}: copy {tera:.2f} TB/s; {GEMM}^3 product {rate}"}


def rows() -> list[Row]:
    return [
        Row("machine", "machine", fingerprint("benchmarks/gpu/machine.py", "benchmarks/gpu/timing.py"), 20, _measure)
    ]
