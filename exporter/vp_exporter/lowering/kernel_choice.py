"""Choose the lowering for an engine, standard torch ("portable") or vp operators, on request or by timing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vp_engines.backends.base import Backend, BuildOptions, BuildResult, BuildSource, Runner, RunOptions
from vp_exporter.errors import UnsupportedModelError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.rewrite.fused_block import check_kernels
from vp_exporter.rewrite.reduced_vit import Kernels
from vp_exporter.utils.progress import SILENT, Progress
from vp_exporter.validation.latency import compare

KernelsOption = Literal["portable", "vp", "auto"]
SECONDS = 2.0  # timed work per batch size when two builds are compared


@dataclass(frozen=True)
class Candidates:
    """Lowerings to build for one variant, and the reason.

    Attributes:
        kernels: One, or two of which the faster is kept.
        why: Note for the user if the choice was automatic; else empty.
    """

    kernels: tuple[Kernels, ...]
    why: str = ""


def candidates(
    option: KernelsOption, backend: Backend, build: BuildOptions, description: ModelSpec, head_dim: int
) -> dict[str, Candidates]:
    """Lowerings to build for the variants "reduced" and "dense".

    The dense baseline is the best dense engine: if the engine runs kernels, it may use them too, whatever is requested
    for the reduced model.

    Raises:
        UnsupportedModelError: if "vp" is requested and its operators do not support the model.
    """
    native = backend.runs_kernels(build)
    both: tuple[Kernels, ...] = ("portable", "vp")
    if option == "portable":
        return {"reduced": Candidates(("portable",)), "dense": Candidates(("portable",))}
    try:
        check_kernels(description, head_dim)
    except UnsupportedModelError as error:
        if option == "vp":
            raise
        return {name: Candidates(("portable",), f"kernels: portable ({error.found})") for name in ("reduced", "dense")}
    if option == "vp":
        why = "" if native.ok else f"kernels: vp, in standard operators ({native.reason})"
        return {"reduced": Candidates(("vp",), why), "dense": Candidates(both if native.ok else ("portable",))}
    if native.ok:
        return {"reduced": Candidates(both), "dense": Candidates(both)}
    return {name: Candidates(("portable",), f"kernels: portable ({native.reason})") for name in ("reduced", "dense")}


def build_best(
    backend: Backend,
    choice: Candidates,
    lower: Callable[[Kernels], BuildSource],
    folder: Path,
    options: BuildOptions,
    *,
    what: str,
    batches: Sequence[int],
    image_shape: tuple[int, int, int],
    progress: Progress = SILENT,
) -> tuple[BuildResult, Kernels, str]:
    """Build every candidate and keep the fastest.

    Args:
        lower: Lowers the model in one of the forms.
        folder: Existing, empty folder for the build that is kept.
        what: Name of the engine in progress messages: "the dense engine".
        batches: Batch sizes to time; the geometric mean of the ratios decides.
        image_shape: (C, H, W).

    Returns:
        The build, its form, and a line explaining the choice (empty if there was none).
    """
    if len(choice.kernels) == 1:
        (only,) = choice.kernels
        source = lower(only)
        with progress.stage(f"building {what}"):
            return backend.build(source, folder, options), only, choice.why
    built: dict[Kernels, BuildResult] = {}
    runners: dict[Kernels, Runner] = {}
    try:
        for kernels in choice.kernels:
            source = lower(kernels)
            place = folder / kernels
            place.mkdir()
            with progress.stage(f"building {what} ({kernels})"):
                result = built[kernels] = backend.build(source, place, options)
            files = {name: (place / name).read_bytes() for name in result.files}
            runners[kernels] = backend.open(
                result.artefact,
                files,
                source.inputs,
                source.outputs,
                result.requirements,
                RunOptions(device=options.device),
            )
        with progress.stage("timing portable against vp"):
            rows = compare(
                runners["portable"],
                runners["vp"],
                image_shape=image_shape,
                batches=tuple(dict.fromkeys(batches)),
                min_seconds=SECONDS,
            )
    finally:
        for runner in runners.values():
            runner.close()
    ratio = math.exp(sum(math.log(row.speedup.value) for row in rows) / len(rows))
    broken = {
        "portable": any(row.nonfinite_dense for row in rows),
        "vp": any(row.nonfinite_reduced for row in rows),
    }
    # A build that returns NaN is never preferred, however fast.
    chosen: Kernels = "vp" if broken["portable"] > broken["vp"] or (ratio > 1 and not broken["vp"]) else "portable"
    for name in built[chosen].files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / chosen / name, target)
    for kernels in built:
        shutil.rmtree(folder / kernels)
    sizes = ", ".join(str(row.batch) for row in rows)
    why = f"vp is {ratio:.2f} times as fast as portable, batch {sizes}"
    if broken["portable"] != broken["vp"]:
        why = f"{'vp' if broken['vp'] else 'portable'} gives NaN or infinite outputs"
    return built[chosen], chosen, f"kernels: {chosen} ({why})"
