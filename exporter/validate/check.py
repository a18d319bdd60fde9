"""Check a bundle: both its engines over the same images and the same clock, to a report and a verdict.

vp-export runs this on the bundle that it is about to hand over, vp-validate on one that somebody has: same code, same
bytes, so the proof in the bundle is a proof of the bundle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import vp_engines
from vp_engines.backends import get_backend
from vp_engines.errors import BundleError
from vp_engines.manifest import Manifest, Preprocessing
from vp_engines.preprocess import preprocess
from vp_exporter.plan import ReductionPlan
from vp_exporter.progress import SILENT, Progress
from vp_exporter.validate.accuracy import Accuracy, evaluate
from vp_exporter.validate.data import ImageFolder
from vp_exporter.validate.latency import LatencyRow, compare, environment
from vp_exporter.validate.report import ReportData
from vp_exporter.validate.verdict import Budget, judge
from vp_exporter.workers import Workers, single

SAMPLES = 6


@dataclass(frozen=True)
class CheckRequest:
    """What to check.

    Attributes:
        data: an ImageFolder; None leaves accuracy unvalidated.
        budget: sets the verdict.
        batches: batch sizes to time; empty times nothing.
        batch_size: of the accuracy pass.
        seconds: of timed work per batch size.
        limit, strict: of the images (vp_exporter.validate.data.ImageFolder).
        classes: class names in the order of the logits, in place of the bundle's own.
        against: another bundle whose reduced engine is the baseline in place of the bundle's own dense one.
        device, threads: of both engines.
        samples: show sample images in the report; off where the images must not be copied.
    """

    data: Path | None = None
    budget: Budget = field(default_factory=Budget)
    batches: Sequence[int] = (1, 8)
    batch_size: int = 32
    seconds: float = 4.0
    limit: int | None = None
    strict: bool = False
    classes: Sequence[str] | None = None
    against: Path | None = None
    device: str | None = None
    threads: int | None = None
    samples: bool = True


def open_data(
    request: CheckRequest,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    num_classes: int,
    progress: Progress = SILENT,
) -> ImageFolder | None:
    """The images to check on, if any; opened early, a bad folder is found before the long work.

    Raises:
        DataError: missing, empty, unreadable, or classes that do not fit.
    """
    if request.data is None:
        return None
    return ImageFolder(
        request.data,
        lambda path: preprocess([path], preprocessing)[0],
        classes=classes if request.classes is None else request.classes,
        num_classes=num_classes,
        strict=request.strict,
        limit=request.limit,
        progress=progress,
    )


def check_bundle(
    path: Path,
    request: CheckRequest,
    *,
    data: ImageFolder | None = None,
    reference: Callable[[np.ndarray], np.ndarray] | None = None,
    notes: Sequence[str] = (),
    progress: Progress = SILENT,
    workers: Workers | None = None,
) -> ReportData:
    """Compare the reduced engine of a bundle with the dense one.

    Args:
        data: of `open_data`, where it is open already.
        reference: the reduced model in PyTorch, for the engine's parity with it.
        notes: lines for the report.
        workers: the processes that share the images; all of them call this and get the same report. Only the leader
            times, while the others are idle. None is one process.

    Raises:
        VpError: the bundle, the data or the engine cannot be used; a reference with several processes.
    """
    workers = workers or single()
    manifest = vp_engines.read_manifest(path)
    plan = ReductionPlan.loads((path / manifest.plan.path).read_bytes())
    notes, warnings = list(notes), []
    accuracy: Accuracy | None = None
    latency: list[LatencyRow] | None = None
    ready = get_backend(manifest.engine.name).available("run")
    has_baseline = request.against is not None or "dense" in manifest.variants
    if data is None:
        data = workers.agree(
            lambda: open_data(request, manifest.preprocessing, manifest.classes, manifest.model.num_classes, progress)
        )
    if not ready.ok:
        warnings.append(f"The engine was built but not run: {ready.reason}. Neither speed nor accuracy is measured.")
    elif not has_baseline:
        if data is not None or not request.budget.empty:
            raise BundleError(
                "the bundle holds no dense baseline to compare with",
                expected="a baseline",
                fix="export again without --no-dense, or name another bundle with --against",
            )
        warnings.append("The bundle holds no dense baseline: neither speed-up nor accuracy is measured.")
    else:
        with contextlib.ExitStack() as stack:
            with progress.stage("loading both engines"):
                reduced, dense = workers.agree(lambda: _load_both(path, request, stack))
            if data is not None:
                accuracy = evaluate(
                    dense,
                    reduced,
                    data,
                    batch_size=_fitting(manifest, request.batch_size),
                    reference=reference,
                    progress=progress,
                    workers=workers,
                )
                notes += data.notes
            batches = [size for size in request.batches if size == _fitting(manifest, size)]
            if len(batches) < len(request.batches):
                warnings.append("Batch sizes that the engine was not built for are not timed.")
            if batches:
                latency = workers.from_leader(
                    lambda: compare(
                        dense,
                        reduced,
                        image_shape=manifest.preprocessing.input_size,
                        batches=batches,
                        min_seconds=request.seconds,
                        macs_dense=manifest.plan.macs_dense,
                        macs_reduced=manifest.plan.macs_reduced,
                        progress=progress,
                    )
                )
    if data is not None and data.skipped:
        warnings.append(f"Skipped {_count(len(data.skipped))} that could not be decoded: {_some(data.skipped)}.")
    if request.against:
        notes.append(f"The baseline is the bundle {request.against.name}, not this bundle's own dense engine.")
    return workers.from_leader(lambda: _report_data(manifest, plan, request, data, accuracy, latency, notes, warnings))


def _load_both(
    path: Path, request: CheckRequest, stack: contextlib.ExitStack
) -> tuple[vp_engines.Engine, vp_engines.Engine]:
    """The reduced engine and its baseline; the stack closes them."""
    reduced = stack.enter_context(_load(path, "reduced", request))
    baseline = _load(request.against, "reduced", request) if request.against else _load(path, "dense", request)
    return reduced, stack.enter_context(baseline)


def _load(path: Path, variant: str, request: CheckRequest) -> vp_engines.Engine:
    return vp_engines.load(path, variant=variant, device=request.device, threads=request.threads)  # type: ignore[arg-type]


def _fitting(manifest: Manifest, size: int) -> int:
    """The batch size nearest to `size` that the engine was built for."""
    sizes = manifest.engine.batch
    return size if sizes is None else min(max(size, sizes.min), sizes.max)


def _report_data(
    manifest: Manifest,
    plan: ReductionPlan,
    request: CheckRequest,
    data: ImageFolder | None,
    accuracy: Accuracy | None,
    latency: list[LatencyRow] | None,
    notes: list[str],
    warnings: list[str],
) -> ReportData:
    rows = plan.tokens()
    stages = []
    for block, row in enumerate(rows):
        if row.positions is not None and (block == 0 or row.positions != rows[block - 1].positions):
            stages.append((block, row.positions))
    rows_of = manifest.preprocessing.input_size
    grid = (rows_of[1] // manifest.model.patch_size[0], rows_of[2] // manifest.model.patch_size[1])
    engine = manifest.engine
    return ReportData(
        model={
            "name": manifest.model.name,
            "image size": "x".join(map(str, manifest.model.img_size)),
            "patch size": "x".join(map(str, manifest.model.patch_size)),
            "classes": manifest.model.num_classes,
            "weights": manifest.model.weights_source,
            "weights sha256": manifest.model.weights_sha256,
        },
        engine={
            "name": engine.name,
            "version": engine.version,
            "precision": engine.precision,
            "device": engine.device,
            "kernels": manifest.kernels,
        },
        plan={
            "method": plan.method,
            "fingerprint": plan.fingerprint(),
            "budget": plan.budget,
            "tuned key bias": f"{len(plan.key_bias)} blocks" if plan.key_bias else "none",
        },
        tokens=[{"block": block, "attention": row.attention, "mlp": row.mlp} for block, row in enumerate(rows)],
        prefix_tokens=plan.prefix_tokens,
        macs={"dense": manifest.plan.macs_dense, "reduced": manifest.plan.macs_reduced},
        verdict=judge(accuracy, latency, request.budget),
        accuracy=accuracy,
        latency=latency,
        grid=grid,
        kept_stages=stages,
        samples=_samples(manifest, data) if data is not None and request.samples else (),
        environment=environment(
            engine=engine.name,
            engine_version=engine.version,
            device=request.device or engine.device,
            threads=request.threads,
        ),
        notes=notes,
        warnings=warnings,
    )


def _samples(manifest: Manifest, data: ImageFolder) -> list[np.ndarray]:
    """A few images as the model sees them: uint8 [H, W, 3], evenly spaced over the data."""
    skipped = {name for name, _ in data.skipped}
    paths = [path for path in data.paths if str(path.relative_to(data.root)) not in skipped]
    chosen = [paths[i * len(paths) // SAMPLES] for i in range(min(SAMPLES, len(paths)))]
    pixels = preprocess(chosen, manifest.preprocessing)
    mean, std = (
        np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (manifest.preprocessing.mean, manifest.preprocessing.std)
    )
    pictures = np.clip((pixels * std + mean) * 255 + 0.5, 0, 255).astype(np.uint8)
    return list(pictures.transpose(0, 2, 3, 1))


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _some(skipped: Sequence[tuple[str, str]]) -> str:
    names = ", ".join(name for name, _ in skipped[:3])
    return f"{names} and {len(skipped) - 3} more" if len(skipped) > 3 else names
