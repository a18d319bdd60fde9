"""Export pipeline: lower the model, build the reduced and the dense engine, validate them, write the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vp_engines.backends import get_backend
from vp_engines.backends.base import Backend, BuildOptions, BuildSource, Precision
from vp_engines.bundle import check_target, write_bundle
from vp_engines.errors import EngineUnavailableError, VpError
from vp_engines.manifest import VARIANT_FOLDERS, Manifest, Preprocessing
from vp_exporter.data.labels import some
from vp_exporter.lowering import export_program, lower_onnx, plugin_nodes, signature
from vp_exporter.lowering.kernel_choice import KernelsOption, build_best, candidates
from vp_exporter.model.loading import LoadedModel
from vp_exporter.plan import ReductionPlan
from vp_exporter.plan.macs import count_macs
from vp_exporter.rewrite.reduced_vit import Kernels, ReducedViT
from vp_exporter.utils.progress import SILENT, Progress, recording
from vp_exporter.validation.check import CheckRequest, check_bundle, open_data
from vp_exporter.validation.report import ReportData, report_files, validation_fields

NOT_VALIDATED = {
    "status": "unvalidated",
    "accuracy": "unmeasured",
    "latency": "unmeasured",
    "summary": "Not validated.",
}


@dataclass(frozen=True)
class ExportRequest:
    """Options of an export.

    Attributes:
        out: Bundle to write.
        engine: Name in vp_engines.backends.ENGINES.
        precision: None for the engine's default.
        build: Batch profile, device, compute capability.
        dense: Include the dense engine in the bundle, so that anyone can repeat the comparison.
        check: How to validate; None to skip validation.
        classes: Class names in the order of the logits; None for the model's own, or those of the folders of
            `check.data` if they cover all classes.
        kernels: torch's own operations, the vp operators, or the faster of the two
            (vp_exporter.lowering.kernel_choice).
        opset: ONNX opset, for engines that support several (ort: 18 to 23); None for the engine's default.
        force: Replace an existing bundle at `out`.
    """

    out: Path
    engine: str = "ort"
    precision: Precision | None = None
    build: BuildOptions = field(default_factory=BuildOptions)
    dense: bool = True
    check: CheckRequest | None = field(default_factory=CheckRequest)
    classes: Sequence[str] | None = None
    kernels: KernelsOption = "auto"
    opset: int | None = None
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        path: The bundle.
        manifest: The bundle's manifest.
        report: Comparison with the dense model; None if not validated.

    Examples:
        >>> done = vp.export(vit, plan, "tiny.vpe", data="val/")  # doctest: +SKIP
        >>> done.path.name, done.manifest.plan.method
        ('tiny.vpe', 'grid')
    """

    path: Path
    manifest: Manifest
    report: ReportData | None

    def __repr__(self) -> str:
        engine = self.manifest.engine
        return f"<ExportResult {str(self.path)!r}, {engine.name} {engine.precision}, {self.manifest.validation.status}>"


def export_bundle(
    model: LoadedModel,
    plan: ReductionPlan,
    preprocessing: Preprocessing,
    request: ExportRequest,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export a model under a plan.

    A missed budget does not raise: the bundle is written, and both its manifest and `ExportResult.report.verdict` state
    the miss.

    Raises:
        VpError: if the export fails. Nothing is written.
    """
    progress = recording(progress)  # warnings from here on also go into the report
    check_target(request.out, force=request.force)
    plan.check_model(model.description, model.weights_sha256)
    backend = get_backend(request.engine)
    precision = request.precision or backend.precisions[0]
    ready = backend.available("build")
    if not ready.ok:
        raise EngineUnavailableError(f"engine '{request.engine}' cannot build here: {ready.reason}")
    if request.classes is None and model.classes is not None:
        request = replace(request, classes=model.classes)
    if request.classes is not None and len(request.classes) != model.description.num_classes:
        raise VpError(
            f"{len(request.classes)} class names are given", expected=f"{model.description.num_classes}, one per class"
        )
    if request.check is not None and request.check.data is not None and not model.description.num_classes:
        raise VpError(
            "`data` needs a classifier, and this model has no classes",
            expected="a model with classes",
            fix="leave out `data` to time it only",
        )
    backend.check_precision(precision)
    backend.check_options(request.build)
    backend.check_opset(request.opset)
    description = model.description
    choices = candidates(request.kernels, backend, request.build, description, model.vit.blocks[0].attn.head_dim)
    data = None
    if request.check is not None:
        data = open_data(request.check, preprocessing, request.classes, model.description.num_classes, progress)
        if data is not None:
            next(data.batches(1))  # fail before the build if no image can be decoded
            if request.classes is None and data.class_names is not None:
                names = data.class_names
                request = replace(request, classes=names)
                progress.note(f"class names are taken from {data.root}: {some(names)}; `classes=FILE` names others")
    if not plan.reduces:
        progress.warn("the plan removes no token: the reduced engine will be the dense one")

    with tempfile.TemporaryDirectory(prefix="vp-export-") as scratch:
        work = Path(scratch)
        files: dict[str, Path | bytes] = {"plan.json": plan.dumps().encode()}
        variants: dict[str, Any] = {}
        plans = {"reduced": plan, "dense": None}
        built_with: dict[str, Kernels] = {}
        for variant in ("reduced", "dense") if request.dense else ("reduced",):
            reduced = ReducedViT(model.vit, model.description, plans[variant])
            folder = work / VARIANT_FOLDERS[variant]
            folder.mkdir()

            def lower(kernels: Kernels, reduced: ReducedViT = reduced, variant: str = variant) -> BuildSource:
                with progress.stage(f"lowering the {variant} model"):
                    onnx = work / f"{variant}-{kernels}.onnx"
                    return _lower(backend, reduced, precision, onnx, kernels, request.build, request.opset)

            result, kernels, why = build_best(
                backend,
                choices[variant],
                lower,
                folder,
                request.build,
                what=f"the {variant} engine ({request.engine}, {precision})",
                batches=_batches(request),
                image_shape=(description.in_chans, *description.image_size),
                progress=progress,
            )
            built_with[variant] = kernels
            notes = (*result.notes, *([why] if why else []))
            for note in notes if variant == "reduced" else result.notes:
                if variant == "reduced":
                    progress.note(note)
                elif note not in variants["reduced"]["notes"]:
                    progress.note(f"the dense engine: {note}")
            prefix = VARIANT_FOLDERS[variant] + "/"
            files |= {prefix + name: folder / name for name in result.files}
            variants[variant] = {
                "artefact": prefix + result.artefact,
                "files": [prefix + name for name in result.files],
                "requirements": result.requirements,
                "notes": list(notes),
            }
        reduced = ReducedViT(model.vit, model.description, plan)
        fields = _manifest_fields(model, plan, preprocessing, request, backend, precision, reduced, variants)
        fields["kernels"] = built_with["reduced"]
        report = None
        if request.check is not None:
            # Validate a bundle in the scratch folder, made of the same files that are written to `out`.
            trial = work / request.out.name
            write_bundle(trial, files=files, **fields)
            report = check_bundle(
                trial,
                request.check,
                data=data,
                reference=_reference(reduced),
                notes=variants["reduced"]["notes"],
                progress=progress,
            )
            files |= report_files(report)
            fields["validation"] = validation_fields(report)
        with progress.stage("writing the bundle"):
            manifest = write_bundle(request.out, files=files, force=request.force, **fields)
    return ExportResult(request.out, manifest, report)


def _batches(request: ExportRequest) -> tuple[int, ...]:
    """Batch sizes for choosing kernels: those that the report times, within the engine's range."""
    build = request.build
    wanted = request.check.batches if request.check is not None else (1, build.opt_batch)
    return tuple(batch for batch in wanted if build.min_batch <= batch <= build.max_batch) or (build.opt_batch,)


def _lower(
    backend: Backend,
    reduced: ReducedViT,
    precision: Precision,
    onnx: Path,
    kernels: Kernels = "portable",
    build: BuildOptions | None = None,
    opset: int | None = None,
) -> BuildSource:
    """Lower the model to the form that the backend builds from."""
    ready = reduced.for_export(precision, backend.attention_form, kernels)
    inputs, outputs = signature(ready)
    blocks = ready.fused_attentions
    if backend.source == "program":
        program = export_program(ready if build is None else ready.to(build.device))
        return BuildSource(precision, inputs, outputs, program=program, attention_blocks=blocks)
    opset = opset or backend.opset
    assert opset is not None
    plugins = kernels == "vp" and build is not None and backend.takes_plugin_nodes(build)
    lower_onnx(ready, onnx, opset=opset, functions=backend.onnx_functions, plugins=plugins)
    if plugins:  # these include attention
        return BuildSource(precision, inputs, outputs, onnx=onnx, plugin_nodes=plugin_nodes(onnx))
    return BuildSource(precision, inputs, outputs, onnx=onnx, attention_blocks=blocks)


def _manifest_fields(
    model: LoadedModel,
    plan: ReductionPlan,
    preprocessing: Preprocessing,
    request: ExportRequest,
    backend: Backend,
    precision: Precision,
    reduced: ReducedViT,
    variants: dict[str, Any],
) -> dict[str, Any]:
    description = model.description
    inputs, outputs = signature(reduced)
    build = request.build
    batch = {"min": build.min_batch, "opt": build.opt_batch, "max": build.max_batch}
    return {
        "name": request.out.name.removesuffix(".vpe"),
        "engine": {
            "name": backend.name,
            "version": backend.version(),
            "precision": precision,
            "device": build.device,
            "batch": batch if backend.fixed_batch_range else None,
        },
        "variants": variants,
        "inputs": [vars(spec) for spec in inputs],
        "outputs": [vars(spec) for spec in outputs],
        "preprocessing": preprocessing,
        "classes": request.classes,
        "model": {
            "name": description.name,
            "num_classes": description.num_classes,
            "img_size": description.image_size,
            "patch_size": description.patch_size,
            "weights_sha256": model.weights_sha256,
            "weights_source": model.weights_source,
        },
        "plan": {
            "path": "plan.json",
            "fingerprint": plan.fingerprint(),
            "method": plan.method or "unnamed",
            "macs_dense": count_macs(description).total,
            "macs_reduced": count_macs(description, plan).total,
            "tokens": [[row.attention, row.mlp] for row in plan.tokens()],
        },
        "validation": NOT_VALIDATED,
    }


def _reference(reduced: ReducedViT) -> Callable[[np.ndarray], np.ndarray]:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = reduced(torch.from_numpy(images)).numpy()
        return logits

    return run
