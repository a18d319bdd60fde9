"""`export`: export a model under a plan to a validated engine bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vp_engines.errors import EngineUnavailableError, VpError
from vp_exporter.api import models, plans

if TYPE_CHECKING:
    from vp_engines.backends.base import Backend
    from vp_engines.manifest import Preprocessing
    from vp_exporter.exporting import ExportResult
    from vp_exporter.utils.progress import Progress
    from vp_exporter.validation.verdict import Budget

_CHOICES = {
    "precision": (None, "fp32", "fp16", "bf16"),
    "device": (None, "cpu", "cuda"),
    "kernels": ("portable", "vp", "auto"),
}


def export(
    model: models.ModelLike,
    plan: plans.PlanLike,
    out: str | os.PathLike[str],
    *,
    engine: str = "ort",
    precision: Literal["fp32", "fp16", "bf16"] | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    data: str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    min_agreement: float | None = None,
    batch_sizes: int | Sequence[int] = (1, 8),
    seconds: float = 4.0,
    limit: int | None = None,
    strict: bool = False,
    threads: int | None = None,
    samples: bool = True,
    classes: Sequence[str] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    backbone: str | None = None,
    validate: bool = True,
    dense: bool = True,
    force: bool = False,
    kernels: Literal["portable", "vp", "auto"] = "auto",
    opset: int | None = None,
    compute_capability: str | None = None,
    min_batch: int = 1,
    opt_batch: int = 8,
    max_batch: int = 64,
    plugins: str | os.PathLike[str] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a model under a plan to an inference engine and compare it with the dense model on that engine.

    Args:
        model: A timm ViT (`torch.nn.Module`) with its weights, or a `ModelRequest`. A subclass, or a module with
            hooks, is accepted if it computes what timm's class computes. The module is not modified.
        plan: A `ReductionPlan`; the path of a plan (.json) or a mask (.npy, .npz, .safetensors); or a mask
            [depth, patches]: 1 keeps, 0 drops, other positive values scale.
        out: Bundle to write, a folder NAME.vpe.
        engine: "ort", "openvino", "aoti", "trt-rtx" or "trt".
        precision: "fp32", "fp16" or "bf16"; by default the engine's own.
        device: "cpu" or "cuda"; by default the engine's own.
        data: Folder of images to compare on, with one subfolder per class, or flat and unlabelled.
        max_drop: Budget: largest drop in top-1 against dense, in percentage points.
        min_speedup: Budget: smallest speed-up over dense at every timed batch size, e.g. 1.3.
        min_agreement: Budget: smallest share of images with the same top-1 class as dense, in percent.
        batch_sizes: Batch sizes to time.
        seconds: Seconds of timed work per batch size.
        limit: Compare on this many images, evenly spaced over the folder.
        strict: Fail on the first image that cannot be decoded.
        threads: CPU threads of the engines while measuring.
        samples: Show sample images in the report.
        classes: Class names in the order of the logits, or a file of them; by default the model's own.
        preprocessing: Overrides timm's data configuration of the model: any of `mean`, `std`, `crop_pct`,
            `interpolation`, `crop_mode`.
        backbone: Attribute path to the ViT inside `model`, e.g. "model.encoder". Only the ViT is exported.
        validate: Compare with dense before writing.
        dense: Include the dense engine in the bundle, so that anyone can repeat the comparison.
        force: Replace an existing bundle at `out`.
        kernels: "portable" (torch's operations), "vp" (the operators of vp_kernels) or "auto" (the faster of the two,
            measured).
        opset: ONNX opset for ort, 18 to 23 (the default).
        compute_capability: Target of trt-rtx, e.g. "8.9"; by default this machine's GPU.
        min_batch, opt_batch, max_batch: Batch sizes that TensorRT builds for.
        plugins: Library of the TensorRT plugins (docs/plugins.md).
        timing_cache: TensorRT timing cache, read and updated.
        progress: Receives progress; by default the logger "vp_exporter".

    Returns:
        The bundle's `.path`, its `.manifest`, and the `.report` (None with `validate=False`), whose `.verdict` prints
        as one sentence. A missed budget does not raise: the bundle is written, and its report states the miss.

    Raises:
        VpError: if arguments conflict, or the model, the plan or the images cannot be used. Nothing is written.
        EngineUnavailableError: if the engine cannot build on this machine.

    Examples:
        >>> import timm, vp_exporter as vp
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        >>> plan = vp.build_plan("grid", vit, target_macs=0.7)
        >>> done = vp.export(vit, plan, "tiny.vpe", engine="ort", data="val/", seconds=0.1)
        >>> print(done.report.verdict)  # doctest: +ELLIPSIS
        Measured, with no budget to hold: ...
    """
    for name, value in (("precision", precision), ("device", device), ("kernels", kernels)):
        if value not in _CHOICES[name]:
            raise VpError(
                f"`{name}` is {value!r}", expected=" or ".join(", ".join(filter(None, _CHOICES[name])).rsplit(", ", 1))
            )
    if not min_batch <= opt_batch <= max_batch:
        raise VpError(
            f"`min_batch` {min_batch}, `opt_batch` {opt_batch}, `max_batch` {max_batch}", expected="ascending sizes"
        )
    with _plugins(plugins):
        out = models.path_of(out, "out")
        backend = _ready(out, engine, opset, force=force)
        from vp_engines.backends.base import BuildOptions
        from vp_exporter.data.labels import class_names
        from vp_exporter.exporting import ExportRequest, export_bundle
        from vp_exporter.model.preprocessing import read_preprocessing
        from vp_exporter.utils.progress import Recording
        from vp_exporter.validation.check import CheckRequest

        told = Recording(models.progress_of(progress))  # the report includes warnings from loading
        budget = read_budget(max_drop, min_speedup, min_agreement, data)
        if not validate and (data is not None or not budget.empty):
            raise VpError("`validate=False` is given with `data` or a budget", expected="one or the other")
        if not dense and (data is not None or not budget.empty):
            raise VpError(
                "`dense=False` leaves nothing to compare with for `data` or a budget", expected="one or the other"
            )
        request = ExportRequest(
            out=out,
            engine=engine,
            precision=precision,
            dense=dense,
            force=force,
            build=BuildOptions(
                min_batch,
                opt_batch,
                max_batch,
                device or backend.devices[0],
                compute_capability,
                models.optional_path(timing_cache, "timing_cache"),
            ),
            check=CheckRequest(
                data=models.optional_path(data, "data"),
                budget=budget,
                batches=models.sizes_of(batch_sizes),
                limit=limit,
                strict=strict,
                seconds=seconds,
                threads=threads,
                samples=samples,
                statistics_stated=_states_statistics(preprocessing),
            )
            if validate
            else None,
            classes=class_names(classes),
            kernels=kernels,
            opset=opset,
        )
        loaded = models.take(model, backbone, told)
        spec = read_preprocessing(preprocessing, loaded.vit, loaded.description)
        return export_bundle(loaded, plans.resolve(plan, loaded.description), spec, request, told)


def _ready(out: Path, engine: str, opset: int | None, *, force: bool) -> Backend:
    """Get the engine's backend, checking that it can build on this machine before the slow import of torch.

    Raises:
        BundleError: if `out` exists and may not be replaced, or its parent is not usable.
        PackageMissingError: if packages are missing; gives one pip command for all of them.
        EngineUnavailableError: if the engine cannot build on this machine.
    """
    from vp_engines.backends import get_backend
    from vp_engines.bundle import check_target
    from vp_engines.extras import installed, require_packages
    from vp_exporter.utils.required_packages import EXPORT, ONNX_LOWERING

    backend = get_backend(engine)
    backend.check_opset(opset)
    check_target(out, force=force)
    needs = [*EXPORT, *(ONNX_LOWERING if backend.source == "onnx" else ())]
    lacking = [] if all(map(installed, backend.packages)) else [backend.extra]
    require_packages("`vp.export`", "export", needs, also=lacking, load=False)
    ready = backend.available("build")
    if not ready.ok:
        raise EngineUnavailableError(f"engine '{engine}' cannot build here: {ready.reason}")
    require_packages("`vp.export`", "export", needs)
    return backend


def read_budget(max_drop: float | None, min_speedup: float | None, min_agreement: float | None, data: Any) -> Budget:
    """Create the budget from its three arguments.

    Raises:
        VpError: if a limit is out of range, or needs images and `data` is None.
    """
    from vp_exporter.validation.verdict import Budget

    budget = Budget(max_drop, min_speedup, min_agreement)
    if data is None and (max_drop is not None or min_agreement is not None):
        raise VpError("`max_drop` and `min_agreement` need images", expected="`data=DIR`")
    return budget


def _states_statistics(preprocessing: Any) -> bool:
    return preprocessing is not None and (
        not isinstance(preprocessing, Mapping) or bool({"mean", "std"} & set(preprocessing))
    )


@contextmanager
def _plugins(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Set VP_PLUGINS temporarily, for the build processes of an export and the runners that validate the result."""
    before = os.environ.get("VP_PLUGINS")
    if path is not None:
        os.environ["VP_PLUGINS"] = os.path.abspath(path)
    try:
        yield
    finally:
        if path is not None:
            os.environ.pop("VP_PLUGINS")
            if before is not None:
                os.environ["VP_PLUGINS"] = before
