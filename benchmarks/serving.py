"""Overhead of Triton Inference Server: latency over a direct call, and errors and memory under load.

    make demo tritonserver
    python benchmarks/serving.py --out docs/results/serving.md

Runs the server used by the tests (its Python backend, on the CPU) on a bundle; direct calls and requests alternate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from common import command_line, machine, prose, table

import vp_engines
from vp_engines.serving.triton.repository import ServeOptions, write_repository
from vp_exporter.profiling.memory import resident

if TYPE_CHECKING:
    from tests.engines.serving.triton.server import Server

ROOT = Path(__file__).resolve().parents[1]
MODEL = "bench"
ADDED_MS, GROWN_MIB = 2.0, 20.0  # limits


class Client:
    """A connection to the server."""

    def __init__(self, module: ModuleType, address: str, output: str) -> None:
        self.module, self.output, self.client = module, output, module.InferenceServerClient(address)

    def run(self, images: np.ndarray) -> np.ndarray:
        tensor = self.module.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        found: np.ndarray = self.client.infer(MODEL, [tensor]).as_numpy(self.output)
        return found


def with_children(pid: int) -> float:
    """Resident memory of a process and its descendants in MiB."""
    children = (path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return resident(pid)[0] + sum(with_children(int(child)) for found in children for child in found)


def latency(server: Server, bundle: Path, images: np.ndarray, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds [rounds] for one image by each way; every round runs all, in random order."""
    with vp_engines.load(bundle, threads=1) as engine:
        output = engine.outputs[0].name
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "direct call": lambda batch: engine.run(batch)[output],
            "HTTP": Client(http_client, server.http, output).run,
            "gRPC": Client(grpc_client, server.grpc, output).run,
        }
        expected, rng = ways["direct call"](images), np.random.default_rng(0)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 20):
            for name in rng.permutation(list(ways)):
                start = time.perf_counter()
                found = ways[name](images)
                if turn >= 20:
                    taken[name].append(1000 * (time.perf_counter() - start))
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    return {name: np.array(values) for name, values in taken.items()}


def inside(server: Server) -> dict[str, float]:
    """Milliseconds per request inside the server so far: mean of each part, from its statistics."""
    found = http_client.InferenceServerClient(server.http).get_inference_statistics(MODEL)
    parts = found["model_stats"][0]["inference_stats"]
    names = {"queue": "queue", "compute_input": "input", "compute_infer": "Python backend", "compute_output": "output"}
    return {name: int(parts[key]["ns"]) / 1e6 / max(1, int(parts[key]["count"])) for key, name in names.items()}


def load(server: Server, bundle: Path, images: np.ndarray, requests: int, clients: int) -> tuple[int, float]:
    """Send requests from many clients at a time; returns the number that failed or gave wrong answers, and seconds."""
    with vp_engines.load(bundle, threads=1) as engine:
        output = engine.outputs[0].name
        expected = engine.run(images)[output]
    local, wrong, lock = threading.local(), 0, threading.Lock()

    def one(turn: int) -> None:
        nonlocal wrong
        if not hasattr(local, "client"):
            local.client = Client(grpc_client, server.grpc, output)
        at = turn % len(images)
        try:
            good = np.allclose(local.client.run(images[at : at + 1]), expected[at : at + 1], rtol=1e-4, atol=1e-4)
        except Exception as error:
            sys.stderr.write(f"{error}\n")
            good = False
        if not good:
            with lock:
                wrong += 1

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return wrong, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "demo" / "digits.vpe")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warmup", type=int, default=2_000, help="requests before memory is read first")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1_000, help="of the latency")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args()
    if not args.bundle.is_dir():
        raise SystemExit(f"{args.bundle.name} is not there: make demo")
    manifest = vp_engines.read_manifest(args.bundle)
    shape = manifest.preprocessing.input_size
    images = np.random.default_rng(0).standard_normal((16, *shape), dtype=np.float32)
    sys.path.insert(0, str(ROOT))  # start the server as the tests do
    from tests.engines.serving.triton.server import running

    with tempfile.TemporaryDirectory() as folder:
        models, work = Path(folder, "models"), Path(folder, "work")
        work.mkdir()
        write_repository(args.bundle, models, ServeOptions(name=MODEL, backend="python", threads=1))
        with running(models, work) as server:
            taken = latency(server, args.bundle, images[:1], args.rounds)
            parts = inside(server)
            early, _ = load(server, args.bundle, images, args.warmup, args.clients)
            before = with_children(server.process.pid)
            wrong, seconds = load(server, args.bundle, images, args.requests, args.clients)
            after = with_children(server.process.pid)
    direct = float(np.median(taken["direct call"]))
    rows = [
        [name, *(f"{value:.2f}" for value in np.quantile(each, [0.5, 0.9, 0.99])), f"{np.median(each) - direct:.2f}"]
        for name, each in taken.items()
    ]
    added = max(float(np.median(each)) for each in taken.values()) - direct
    text = "\n".join(
        [
            "# Behind Triton Inference Server",
            "",
            f"Command: `{command_line('serving')}`",
            "",
            machine(),
            prose(
                f"Bundle {manifest.name} ({manifest.engine.name}, {manifest.engine.precision}, one thread), images of "
                f"{shape[1]} x {shape[2]}; Python backend, loopback."
            ),
            "",
            "## Latency of one image, milliseconds",
            "",
            *table(["way", "p50", "p90", "p99", "added at p50"], rows),
            "Of a request, inside the server (mean): "
            + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
            + ". The rest is the way there and back, and the client.",
            "",
            f"- added latency {added:.2f} ms at p50 (at most {ADDED_MS:g}): **{_met(added <= ADDED_MS)}**",
            "",
            "## Load",
            "",
            f"{args.requests} requests from {args.clients} clients over gRPC, {args.requests / seconds:.0f} a second, "
            f"after {args.warmup} to warm up ({early} of those failed).",
            "",
            f"- errors or wrong answers: {wrong} (none allowed): **{_met(wrong == 0)}**",
            f"- resident memory of the server and what it started: {before:.1f} MiB before, {after:.1f} after, grown "
            f"by {after - before:.1f} (at most {GROWN_MIB:g}): **{_met(after - before < GROWN_MIB)}**",
        ]
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


def _met(good: bool) -> str:
    return "met" if good else "missed"


if __name__ == "__main__":
    main()
