"""Benchmark all available engines: the flowers ViT-S/16 with a static plan of MAC ratio about 1.6.

    python benchmarks/flowers.py --out docs/results/flowers.md

Needs the model and photographs in ../shared (see ../shared/data/README.md). Each engine's bundle is made by vp-export
in a process of its own, measuring time and peak memory; then its two engines run interleaved on the same inputs. The
dense baseline is also timed against the plain torch.onnx export of timm's model.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    CROP_PCT,
    MEAN,
    MODEL,
    STD,
    THREADS,
    VAL,
    WEIGHTS,
    command_line,
    load_flowers,
    machine,
    need_shared,
    session_options,
    spread,
    table,
)

import vp_engines
from vp_engines.backends import ENGINES, get_backend
from vp_exporter.model.loading import LoadedModel
from vp_exporter.plan import PlanModel
from vp_exporter.plan.masks import plan_from_mask
from vp_exporter.validation.check import CheckRequest, check_bundle
from vp_exporter.validation.latency import LatencyRow, compare
from vp_exporter.validation.report import ReportData
from vp_exporter.validation.verdict import Budget

IMAGENET = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD)), "--crop-pct", str(CROP_PCT)]
KEEP, SEED = 124, 0  # random patches kept from block 0 on: MAC ratio 1.62


def make_mask(folder: Path) -> Path:
    """A static mask [12, 196] with the same random patches in every block."""
    kept = np.random.default_rng(SEED).choice(196, KEEP, replace=False)
    mask = np.zeros((12, 196), np.uint8)
    mask[:, kept] = 1
    np.save(folder / "mask.npy", mask)
    return folder / "mask.npy"


def export(engine: str, precision: str, mask: Path, out: Path, extra: Iterable[str] = ()) -> tuple[float, float, float]:
    """Run vp-export; returns wall seconds, peak memory in GiB, and seconds in the engine's builder (reduced engine)."""
    command = [
        sys.executable,
        "-m",
        "vp_exporter.cli.export",
        "--model",
        MODEL,
        "--weights",
        str(WEIGHTS),
        "--masks",
        str(mask),
        "--engine",
        engine,
        "--precision",
        precision,
        "--out",
        str(out),
        "--no-validate",
        *IMAGENET,
        *extra,
    ]
    done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vp-export --engine {engine} failed with exit code {done.returncode}:\n{done.stderr}")
    wall, memory = map(float, done.stdout.split())
    built = re.search(r"building the reduced engine .*: ([0-9.]+) s", done.stderr)
    assert built is not None
    return wall, memory, float(built[1])


# An intermediate process: a child's peak memory starts at that of its parent, which has held a whole model here.
WATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
sys.exit(code)
"""


def plain_onnx(model: LoadedModel, path: Path) -> Any:
    """timm's model exported by torch.onnx, in a plain ONNX Runtime session, as a user would do without this project."""
    import onnxruntime as ort
    import torch

    torch.onnx.export(
        model.vit,
        (torch.zeros(2, 3, 224, 224),),
        path,
        dynamo=True,
        opset_version=23,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )
    session = ort.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])

    class Plain:
        def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return {"logits": session.run(None, {"images": images})[0]}

    return Plain()


def precision_errors(bundle: Path, model: LoadedModel, mask: Path, images: np.ndarray) -> tuple[float, float]:
    """Largest absolute logit difference to PyTorch in fp32, of the reduced and of the dense engine."""
    import torch

    from vp_exporter.rewrite.reduced_vit import ReducedViT

    plan = plan_from_mask(np.load(mask), PlanModel.of(model.description))
    errors = []
    for variant, of in (("reduced", plan), ("dense", None)):
        with vp_engines.load(bundle, variant=variant, threads=THREADS) as engine, torch.no_grad():
            expected = ReducedViT(model.vit, model.description, of)(torch.from_numpy(images)).numpy()
            errors.append(float(np.abs(engine.run(images)["logits"] - expected).max()))
    return errors[0], errors[1]


def seconds_of(code: str, *args: str) -> float:
    """Seconds printed by `code`, best of three fresh processes."""
    return min(
        float(subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )


IMPORT = "import time; t = time.perf_counter(); import vp_engines; print(time.perf_counter() - t)"
LOAD = (
    "import sys, time, vp_engines; from vp_engines.engine import load; import vp_engines.manifest; "
    "t = time.perf_counter(); e = vp_engines.load(sys.argv[1]); print(time.perf_counter() - t)"
)


def latency_cells(row: LatencyRow) -> list[str]:
    interval = f"{row.speedup.low:.2f}-{row.speedup.high:.2f}"
    return [
        str(row.batch),
        f"{row.dense.median_ms:.1f}",
        f"{row.reduced.median_ms:.1f}",
        f"{row.speedup.value:.3f} ({interval})",
        f"{row.mac_ratio:.3f}",
        "-" if row.efficiency is None else f"**{row.efficiency:.3f}**",
        row.outcome,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=20.0, help="timed work per engine and batch size")
    parser.add_argument("--limit", type=int, help="validate on this many photographs (default: all 736)")
    args = parser.parse_args()
    need_shared()

    latency: list[list[str]] = []
    accuracy: list[list[str]] = []
    builds: list[list[str]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        mask = make_mask(work)
        model = load_flowers()
        for engine in args.engines:
            backend = get_backend(engine)
            ready = backend.available("build")
            if not ready.ok:
                notes.append(f"- `{engine}`: not measured, {ready.reason}")
                continue
            extra = ["--compute-capability", "8.9"] if engine == "trt-rtx" else []
            # Inductor takes minutes per precision, and this CPU has neither fp16 nor bf16 arithmetic.
            for precision in ("fp32",) if engine == "aoti" else backend.precisions:
                bundle = work / f"{engine}-{precision}.vpe"
                took, memory, building = export(engine, precision, mask, bundle, extra)
                engine_time = ""
                size = sum(f.stat().st_size for f in (bundle / "engine").iterdir()) / 1e6
                if (running := backend.available("run")).ok:
                    engine_time = f"{seconds_of(LOAD, str(bundle)):.2f} s" if precision == "fp32" else ""
                    images = images_of(bundle)
                    reduced_error, dense_error = precision_errors(bundle, model, mask, images)
                    if precision != "fp32":
                        notes.append(
                            f"- `{engine}` {precision}: largest logit error against fp32 PyTorch, reduced "
                            f"{reduced_error:.2e}, dense {dense_error:.2e}, ratio {reduced_error / dense_error:.2f}"
                        )
                    else:
                        report = measure(bundle, args)
                        latency += [[engine, *latency_cells(row)] for row in report.latency or ()]
                        accuracy.append(accuracy_row(engine, report, reduced_error))
                else:
                    notes.append(
                        f"- `{engine}` {precision}: built for compute capability 8.9, not run, {running.reason}"
                    )
                builds.append(
                    [
                        engine,
                        precision,
                        f"{took:.1f} s",
                        f"{building:.1f} s",
                        f"{memory:.2f} GiB",
                        f"{size:.1f} MB",
                        engine_time,
                    ]
                )
                print(builds[-1], flush=True)
        plain_rows = []
        if (work / "ort-fp32.vpe").exists():
            plain = plain_onnx(model, work / "plain.onnx")
            with vp_engines.load(work / "ort-fp32.vpe", variant="dense", threads=THREADS) as dense:
                for row in compare(plain, dense, image_shape=(3, 224, 224), batches=(1, 8), min_seconds=args.seconds):
                    plain_rows.append(
                        [
                            str(row.batch),
                            f"{row.dense.median_ms:.1f}",
                            f"{row.reduced.median_ms:.1f}",
                            f"{row.speedup.value:.3f} ({row.speedup.low:.2f}-{row.speedup.high:.2f})",
                        ]
                    )

    text = "\n".join(
        [
            "# Flowers ViT-S/16, static plan: what the engines realise",
            "",
            f"Command: `{command_line('flowers')}`",
            "",
            machine(),
            "",
            f"Plan: {KEEP} of 196 patches, chosen at random (seed {SEED}), from block 0 on. Nothing is searched: the",
            "table measures engines, not the choice of patches. Inputs are the same for both, runs are interleaved,",
            "figures are medians; brackets hold 95% intervals. Efficiency = speed-up / MAC ratio.",
            "",
            "## Latency, fp32",
            "",
            *table(
                ["engine", "batch", "dense ms", "reduced ms", "speed-up", "MAC ratio", "efficiency", "outcome"], latency
            ),
            "## Dense baseline (ort) against the plain `torch.onnx.export` of timm's model",
            "",
            *table(["batch", "plain ms", "our dense ms", "plain / ours"], plain_rows),
            "## Accuracy, fp32",
            "",
            *table(
                [
                    "engine",
                    "images",
                    "dense top-1",
                    "reduced top-1",
                    "difference (95%)",
                    "agreement",
                    "KL",
                    "max logit error against PyTorch",
                ],
                accuracy,
            ),
            "## Export (`vp-export --no-validate`, reduced and dense engine)",
            "",
            *table(
                [
                    "engine",
                    "precision",
                    "wall time",
                    "of it: building the reduced engine",
                    "peak memory",
                    "reduced engine",
                    "load with hashing",
                ],
                builds,
            ),
            f"`import vp_engines`: {seconds_of(IMPORT) * 1000:.0f} ms.",
            "",
            *notes,
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)


def images_of(bundle: Path) -> np.ndarray:
    """Sixteen preprocessed photographs, evenly spaced over the validation part."""
    from vp_engines.preprocess import preprocess

    paths = sorted(VAL.rglob("*.jpg"))
    return preprocess([paths[i] for i in spread(len(paths))], vp_engines.read_manifest(bundle).preprocessing)


def measure(bundle: Path, args: argparse.Namespace) -> ReportData:
    request = CheckRequest(
        data=VAL,
        budget=Budget(),
        batches=(1, 8),
        seconds=args.seconds,
        threads=THREADS,
        limit=args.limit,
        samples=False,
    )
    return check_bundle(bundle, request)


def accuracy_row(engine: str, report: ReportData, error: float) -> list[str]:
    found = report.accuracy
    assert found is not None
    assert found.top1_difference is not None
    assert found.kl is not None
    change = found.top1_difference
    return [
        engine,
        str(found.images),
        f"{found.dense_top1:.2f}%",
        f"{found.reduced_top1:.2f}%",
        f"{change.value:+.2f} ({change.low:+.2f} to {change.high:+.2f})",
        f"{found.agreement.value:.2f}%",
        f"{found.kl.value:.4f}",
        f"{error:.1e}",
    ]


if __name__ == "__main__":
    main()
