"""`validate` and `profile`: measure a bundle on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vp_engines.errors import BundleError, EngineUnavailableError, VpError
from vp_exporter.api.export import read_budget
from vp_exporter.api.models import optional_path, path_of, progress_of, sizes_of

if TYPE_CHECKING:
    from vp_exporter.profiling.measure import Profiled, Subject
    from vp_exporter.utils.distributed import Workers
    from vp_exporter.utils.progress import Progress
    from vp_exporter.validation.check import CheckRequest
    from vp_exporter.validation.report import ReportData

PathLike = str | os.PathLike[str]


def validate(
    bundle: PathLike,
    *,
    data: PathLike | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    min_agreement: float | None = None,
    batch_sizes: int | Sequence[int] = (1, 8),
    seconds: float = 4.0,
    limit: int | None = None,
    strict: bool = False,
    classes: Sequence[str] | PathLike | None = None,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    against: PathLike | None = None,
    samples: bool = True,
    report: PathLike | None = None,
    update: bool = False,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> ReportData:
    """Compare a bundle with its dense baseline: accuracy on your images, latency on this machine.

    Args:
        bundle: Folder NAME.vpe.
        data: Folder of images, with one subfolder per class, or flat and unlabelled; None leaves accuracy unmeasured.
        max_drop: Budget: largest drop in top-1 against dense, in percentage points.
        min_speedup: Budget: smallest speed-up over dense at every timed batch size, e.g. 1.3.
        min_agreement: Budget: smallest share of images with the same top-1 class as dense, in percent.
        batch_sizes: Batch sizes to time.
        seconds: Seconds of timed work per batch size.
        limit: Use this many images, evenly spaced over the folder.
        strict: Fail on the first image that cannot be decoded.
        classes: Class names in the order of the logits, or a file of them; by default the bundle's own.
        threads: CPU threads of both engines.
        device: "cpu" or "cuda"; by default what the bundle was built for.
        against: Another bundle as the baseline instead of the dense engine.
        samples: Show sample images in the report.
        report: Folder to write report.json and report.html to.
        update: Replace the report in the bundle.
        workers: Processes that share the images (vp_exporter.utils.distributed); all return the report.
        progress: Receives progress; by default the logger "vp_exporter".

    Returns:
        The report; its `.verdict` prints as one sentence.

    Raises:
        BundleError: if the bundle is not valid, or the two bundles cannot be compared.
        DataError: if the images cannot be used.
        EngineUnavailableError: if the engine cannot run on this machine.

    Examples:
        >>> import vp_exporter as vp
        >>> report = vp.validate("tiny.vpe", seconds=0.1)
        >>> report.verdict.status
        'unvalidated'
    """
    import vp_engines
    from vp_engines.bundle import update_bundle
    from vp_exporter.data.labels import class_names
    from vp_exporter.utils.distributed import single
    from vp_exporter.validation.check import CheckRequest, check_bundle, find_baseline
    from vp_exporter.validation.report import Report, report_files, validation_fields

    workers, bundle = workers or single(), path_of(bundle, "bundle")
    folder = optional_path(report, "report")

    def prepare() -> CheckRequest:
        request = CheckRequest(
            data=optional_path(data, "data"),
            budget=read_budget(max_drop, min_speedup, min_agreement, data),
            batches=sizes_of(batch_sizes),
            limit=limit,
            strict=strict,
            classes=class_names(classes),
            seconds=seconds,
            against=optional_path(against, "against"),
            device=device,
            threads=threads,
            samples=samples,
        )
        check_folder(folder, "report")
        manifest = vp_engines.verify_bundle(bundle).manifest
        if request.against is not None:
            if update:
                raise VpError(
                    "`update=True` is given with `against`",
                    expected="one of them: a bundle's own report is of its own dense engine",
                    fix="write this one elsewhere with `report=DIR`",
                )
            vp_engines.verify_bundle(request.against)
            find_baseline(bundle, manifest, request)  # fail before anything runs if the two cannot be compared
        from vp_engines.backends import get_backend

        ready = get_backend(manifest.engine.name).available("run")
        if not ready.ok:
            raise EngineUnavailableError(f"the engine '{manifest.engine.name}' cannot run here: {ready.reason}")
        return request

    request = workers.agree(prepare)
    found = check_bundle(bundle, request, progress=progress_of(progress), workers=workers)

    def write() -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            Report(found).write(folder)
        if update:
            update_bundle(bundle, files=report_files(found), validation=validation_fields(found))

    workers.from_leader(write)
    return found


def profile(
    bundle: PathLike,
    *,
    batch_sizes: int | Sequence[int] = (1, 8),
    against: PathLike | None = None,
    alone: bool = False,
    seconds: float = 4.0,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    memory: bool = True,
    out: PathLike | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Profile a bundle and its dense engine by part of the model, with the engine's own profiler.

    Args:
        bundle: Folder NAME.vpe.
        batch_sizes: Batch sizes to run.
        against: Another bundle as the baseline instead of the dense engine.
        alone: Profile only the bundle's own engine.
        seconds: Seconds of work per batch size.
        threads: CPU threads of the engines.
        device: "cpu" or "cuda"; by default what the bundle was built for.
        memory: Measure memory, in a separate process per engine.
        out: Folder to write profile.json, trace.json (Chrome's format) and profile.png to.
        progress: Receives progress; by default the logger "vp_exporter".

    Returns:
        `.profiles`: those of the baseline and of the bundle for each batch size; `.speedups` by batch size; `.memory`;
        `.notes`.

    Raises:
        BundleError: if a bundle is not valid or has no baseline, or the two cannot run side by side.
        InputError: if the engine was not built for a batch size.
        EngineUnavailableError: if the engine cannot run on this machine, or has no profiler.

    Examples:
        >>> import vp_exporter as vp
        >>> found = vp.profile("tiny.vpe", batch_sizes=[1], seconds=0.1, memory=False)
        >>> sorted(found.profiles[0].groups)[:2]
        ['MLP', 'attention']
    """
    from vp_engines.extras import require_packages
    from vp_exporter.profiling.measure import profile as measure
    from vp_exporter.utils.required_packages import PICTURES

    folder = optional_path(out, "out")
    if folder is not None:
        require_packages("`vp.profile(out=...)`", "profile", PICTURES)
        check_folder(folder, "out")
    if alone and against is not None:
        raise VpError("`alone` and `against` are both given", expected="one of them")
    if device not in (None, "cpu", "cuda"):
        raise VpError(f"`device` is {device!r}", expected="cpu or cuda")
    found = measure(
        _subjects(path_of(bundle, "bundle"), optional_path(against, "against"), alone),
        batches=sizes_of(batch_sizes),
        seconds=seconds,
        threads=threads,
        device=device,
        memory=memory,
        progress=progress_of(progress),
    )
    if folder is not None:
        _write(found, folder)
    return found


def check_folder(path: Path | None, argument: str) -> None:
    """Check an output folder before long work.

    Raises:
        VpError: if `path` is an existing file.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise VpError(f"`{argument}` {path} is a file", expected="a folder, or a name for a new one")


def _subjects(bundle: Path, against: Path | None, alone: bool) -> list[Subject]:
    """Engines to profile, the baseline first."""
    import vp_engines
    from vp_exporter.profiling.measure import Subject

    own = Subject("reduced", bundle, "reduced")
    if alone:
        return [own]
    if against is not None:
        names = [vp_engines.read_manifest(path).name for path in (against, bundle)]
        labels = [str(against), str(bundle)] if names[0] == names[1] else names
        return [Subject(labels[0], against, "reduced"), Subject(labels[1], bundle, "reduced")]
    if "dense" not in vp_engines.read_manifest(bundle).variants:
        raise BundleError(
            "the bundle holds no dense baseline to compare with",
            fix="say `alone=True`, or name another bundle with `against`",
        )
    return [Subject("dense", bundle, "dense"), own]


def _write(found: Profiled, out: Path) -> None:
    import json

    from vp_exporter.profiling.picture import stacked_bars
    from vp_exporter.profiling.trace import chrome_trace
    from vp_exporter.utils.files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "profile.json", (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    write_atomically(out / "trace.json", chrome_trace(found.profiles))
    write_atomically(out / "profile.png", stacked_bars(found.profiles))
