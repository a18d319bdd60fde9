"""Measure the memory use of an engine in a separate process."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 600  # seconds to run a few batches


@dataclass(frozen=True)
class Memory:
    """Memory of one engine in MiB.

    Attributes:
        loaded: Resident memory added by opening the bundle, in a process that had imported the runtime.
        peak: Peak resident memory of the whole process, after the runs at each batch size.
        gpu: Increase in memory use of the first GPU after the runs; None without a GPU.
    """

    loaded: float
    peak: dict[int, float]
    gpu: float | None


def measure_memory(
    bundle: Path, variant: str, batches: Sequence[int], *, threads: int | None = None, device: str | None = None
) -> Memory | None:
    """Open and run an engine in a new process.

    Returns:
        None if the system does not provide the numbers (only Linux does), or the process fails.
    """
    command = [sys.executable, "-P", "-m", __name__, str(bundle), variant, *map(str, sorted(batches))]
    command += [*(["--threads", str(threads)] if threads else []), *(["--device", device] if device else [])]
    # Let the child find our packages wherever this process found them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=TIMEOUT, check=False
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return Memory(found["loaded"], {int(batch): peak for batch, peak in found["peak"].items()}, found["gpu"])


def resident(process: int | str = "self") -> tuple[float, float]:
    """Resident memory of a process in MiB, current and peak.

    Raises:
        OSError: if the system is not Linux, or there is no such process.
    """
    now = peak = 0.0
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            now = int(line.split()[1]) / 1024
        elif line.startswith("VmHWM:"):
            peak = int(line.split()[1]) / 1024
    return now, peak


def gpu_used() -> float | None:
    """MiB in use on the first GPU, by all processes; None without an NVIDIA driver. NVML needs no CUDA context."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), (ctypes.c_uint64 * 3)()  # total, free, used
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    return None if failed else memory[2] / 2**20


def main() -> None:
    """Entry point of the child: prints what `measure_memory` reads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("variant")
    parser.add_argument("batches", type=int, nargs="+")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    args = parser.parse_args()

    import numpy as np

    import vp_engines
    from vp_engines.backends import get_backend

    get_backend(vp_engines.read_manifest(args.bundle).engine.name).version()  # imports the runtime
    before, on_gpu = resident()[0], gpu_used()
    engine = vp_engines.load(args.bundle, variant=args.variant, threads=args.threads, device=args.device)
    loaded, peaks = resident()[0] - before, {}
    for batch in args.batches:
        images = np.zeros((batch, *(int(size) for size in engine.inputs[0].shape[1:])), np.float32)
        for _ in range(3):
            engine.run(images)
        peaks[batch] = resident()[1]
    after = gpu_used()
    gpu = None if on_gpu is None or after is None else after - on_gpu
    json.dump({"loaded": loaded, "peak": peaks, "gpu": gpu}, sys.stdout)


if __name__ == "__main__":
    main()
