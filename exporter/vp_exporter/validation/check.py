"""Validate a bundle: compare its engine with the baseline in accuracy and latency, and create a report.

Shared by vp-export, which runs it on the files of the new bundle, and vp-validate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import vp_engines
from vp_engines.backends import get_backend
from vp_engines.errors import BundleError, EngineUnavailableError, VpError
from vp_engines.manifest import Manifest, Preprocessing
from vp_engines.preprocess import preprocess
from vp_exporter.data.image_folder import ImageFolder
from vp_exporter.plan import ReductionPlan
from vp_exporter.utils.distributed import Workers, single
from vp_exporter.utils.progress import SILENT, Progress, recording
from vp_exporter.validation.accuracy import Accuracy, evaluate
from vp_exporter.validation.baseline import DENSE, Baseline, bundle_baseline, common_batches
from vp_exporter.validation.latency import LatencyRow, compare, environment, probe
from vp_exporter.validation.report import ReportData
from vp_exporter.validation.verdict import Budget, Probe, Verdict, judge

SAMPLES = 6
FEWEST = 20  # minimum number of images for a meaningful top-1
TIMM_STATISTICS = (  # (mean, std) of timm.data.constants: IMAGENET_DEFAULT, _INCEPTION, _DPN, OPENAI_CLIP
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
)


@dataclass(frozen=True)
class CheckRequest:
    """Options of a validation.

    Attributes:
        data: Image folder; None leaves accuracy unvalidated.
        budget: Limits for the verdict.
        batches: Batch sizes to time; empty to skip timing.
        batch_size: Batch size for measuring accuracy.
        seconds: Seconds of timed work per batch size.
        limit, strict: See vp_exporter.data.image_folder.ImageFolder.
        classes: Class names in the order of the logits, overriding the bundle's own.
        against: Another bundle, whose reduced engine is the baseline instead of the bundle's own dense engine.
        device, threads: Device and CPU threads of both engines.
        samples: Show sample images in the report; disable if the images must not be copied.
        statistics_stated: Whether mean and std are set explicitly by the user.

    Raises:
        VpError: if a value is out of range.
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
    statistics_stated: bool = False

    def __post_init__(self) -> None:
        if odd := [size for size in self.batches if type(size) is not int or size < 1]:
            raise VpError(f"`batch_sizes={odd[0]!r}`", expected="whole numbers from 1")
        if not self.seconds > 0:
            raise VpError(f"`seconds` is {self.seconds!r}", expected="above 0")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise VpError(f"`threads` is {self.threads!r}", expected="a whole number from 1, or None")
        if self.device not in (None, "cpu", "cuda"):
            raise VpError(f"`device` is {self.device!r}", expected="cpu or cuda")


def open_data(
    request: CheckRequest,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    num_classes: int,
    progress: Progress = SILENT,
) -> ImageFolder | None:
    """Open the images of a request, if any. Call it before long work, to fail early.

    Raises:
        DataError: if the folder is missing, empty or unreadable, or its classes do not fit.
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
    """Compare the reduced engine of a bundle with its dense one, or with the reduced engine of `request.against`.

    Args:
        data: Result of `open_data`, if already open.
        reference: The reduced model in PyTorch, for the engine's parity with it.
        notes: Lines for the report.
        progress: Receives progress; its warnings, and earlier ones if it is a `Recording`, go into the report.
        workers: Processes that share the images; None for a single process. All must call this function, and all
            return the same report. Only the leader measures latency, while the others are idle.

    Raises:
        VpError: if the bundle, the data or the engine cannot be used, the two bundles cannot be compared, or
            `reference` is given with several processes.
    """
    workers, progress = workers or single(), recording(progress)
    manifest = vp_engines.read_manifest(path)
    baseline, profiles = find_baseline(path, manifest, request)
    plan = ReductionPlan.loads((path / manifest.plan.path).read_bytes())
    notes, warnings = [*notes, *baseline.notes], []
    accuracy: Accuracy | None = None
    latency: list[LatencyRow] | None = None
    probed: Probe | None = None
    batches = [size for size in request.batches if size == _fitting(profiles, size)]
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
                fix="export again without `dense=False`, or name another bundle with `against`",
            )
        warnings.append("The bundle holds no dense baseline: neither speed-up nor accuracy is measured.")
        probed = workers.from_leader(lambda: _probe(path, manifest, request, batches, progress))
    else:
        with contextlib.ExitStack() as stack:
            with progress.stage("loading both engines"):
                reduced, dense = workers.agree(lambda: _load_both(path, request, stack))
            if data is not None:
                accuracy = evaluate(
                    dense,
                    reduced,
                    data,
                    batch_size=_fitting(profiles, request.batch_size),
                    reference=reference,
                    progress=progress,
                    workers=workers,
                    baseline=baseline,
                )
                notes += data.notes
                doubt = _statistics_doubt(manifest, accuracy, request, baseline)
                if workers.leader and doubt:
                    progress.warn(doubt)
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
                        macs_dense=baseline.macs,
                        macs_reduced=manifest.plan.macs_reduced,
                        progress=progress,
                        baseline=baseline,
                    )
                )
    if data is not None and data.skipped:
        warnings.append(f"Skipped {_count(len(data.skipped))} that could not be decoded: {_some(data.skipped)}.")
    # The report sums up skipped files in the line above.
    warnings += dict.fromkeys(text for text in progress.warnings if not text.startswith("skipped "))
    verdict = judge(accuracy, latency, request.budget, baseline=baseline, probe=probed)
    return workers.from_leader(
        lambda: _report_data(manifest, plan, request, data, accuracy, latency, baseline, verdict, notes, warnings)
    )


def find_baseline(path: Path, manifest: Manifest, request: CheckRequest) -> tuple[Baseline, tuple[Manifest, ...]]:
    """Return the baseline of a bundle, and the manifests of the engines that will run.

    Raises:
        BundleError: if `request.against` is not a bundle, or cannot be compared with this one.
        EngineUnavailableError: if its engine cannot run on this machine.
    """
    if request.against is None:
        return replace(DENSE, macs=manifest.plan.macs_dense), (manifest,)
    other = vp_engines.read_manifest(request.against)
    baseline = bundle_baseline(path, manifest, request.against, other, device=request.device)
    ready = get_backend(other.engine.name).available("run")
    if not ready.ok:
        raise EngineUnavailableError(
            f"the engine '{other.engine.name}' of {baseline.label} cannot run here: {ready.reason}"
        )
    return baseline, (manifest, other)


def _statistics_doubt(manifest: Manifest, accuracy: Accuracy, request: CheckRequest, baseline: Baseline) -> str:
    """Warning that the user's own checkpoint may have been trained with other statistics than timm's defaults, or "".

    Only if the top-1 is below 50%, or below twice chance if that is higher (at most 90%), which is rare for a trained
    model with the right preprocessing.
    """
    spec, source = manifest.preprocessing, manifest.model.weights_source
    # Hub repositories and folders (names with a slash) store the statistics with the weights.
    own_weights = source != "random" and not source.startswith("timm pretrained") and "/" not in source
    defaults = any(np.allclose((spec.mean, spec.std), each, atol=1e-4) for each in TIMM_STATISTICS)
    top1 = accuracy.dense_top1
    if request.statistics_stated or not own_weights or not defaults or top1 is None or accuracy.images < FEWEST:
        return ""
    if top1 >= max(50.0, min(200 / accuracy.num_classes, 90.0)):
        return ""
    return (
        f"{baseline.name}'s top-1 is {top1:.2f}%, poor for a trained model, and mean and std are timm's defaults for "
        f"{manifest.model.name}; if the weights ({source}) were trained with others, export with `mean` and `std`"
    )


def _probe(
    path: Path, manifest: Manifest, request: CheckRequest, batches: Sequence[int], progress: Progress
) -> Probe | None:
    """Check an engine without a baseline for finite outputs; None if there is no batch size to run."""
    if not batches:
        return None
    with progress.stage("running the engine"), _load(path, "reduced", request) as engine:
        bad = probe(engine, image_shape=manifest.preprocessing.input_size, batches=batches)
    return Probe(sum(batches), bad)


def _load_both(
    path: Path, request: CheckRequest, stack: contextlib.ExitStack
) -> tuple[vp_engines.Engine, vp_engines.Engine]:
    """Load the reduced engine and its baseline. The stack closes them."""
    reduced = stack.enter_context(_load(path, "reduced", request))
    baseline = _load(request.against, "reduced", request) if request.against else _load(path, "dense", request)
    return reduced, stack.enter_context(baseline)


def _load(path: Path, variant: str, request: CheckRequest) -> vp_engines.Engine:
    return vp_engines.load(path, variant=variant, device=request.device, threads=request.threads)  # type: ignore[arg-type]


def _fitting(manifests: Sequence[Manifest], size: int) -> int:
    """The batch size nearest to `size` that the engines were built for."""
    sizes = common_batches(*manifests)
    return size if sizes is None else min(max(size, sizes[0]), sizes[1])


def _report_data(
    manifest: Manifest,
    plan: ReductionPlan,
    request: CheckRequest,
    data: ImageFolder | None,
    accuracy: Accuracy | None,
    latency: list[LatencyRow] | None,
    baseline: Baseline,
    verdict: Verdict,
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
        verdict=verdict,
        baseline=baseline,
        preprocessing=manifest.preprocessing,
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
