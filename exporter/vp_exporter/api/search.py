"""`search`: search for a plan within a budget, on calibration images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vp_engines.errors import EngineUnavailableError, VpError
from vp_exporter.api import models

if TYPE_CHECKING:
    from vp_engines.manifest import Preprocessing
    from vp_exporter.plan import ReductionPlan
    from vp_exporter.searching.pipeline import SearchResult
    from vp_exporter.utils.distributed import Workers
    from vp_exporter.utils.progress import Progress

PathLike = str | os.PathLike[str]


def search(
    model: models.ModelLike,
    images: PathLike,
    *,
    method: str = "vpruner",
    target_macs: float | None = None,
    target_latency: float | None = None,
    out: PathLike | None = None,
    limit: int | None = None,
    held_out: float = 0.25,
    search_batch: int = 32,
    evaluations: int | None = None,
    minutes: float | None = None,
    rearrange: Sequence[str] = ("greedy", "ppo"),
    tune: Sequence[str] = ("shared", "least-squares", "adam"),
    tune_steps: int = 12,
    targets: Literal["model", "logits", "labels"] = "model",
    temperature: float = 3.0,
    min_tokens: int = 8,
    multiple: int = 1,
    seed: int = 0,
    engine: str | None = None,
    precision: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    latency_table: PathLike | None = None,
    page: PathLike | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    augment: Literal["cutmix", "none"] = "cutmix",
    strict: bool = False,
    classes: Sequence[str] | PathLike | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    backbone: str | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> ReductionPlan:
    """Search for a plan on calibration images, which need no labels.

    Args:
        model: A timm ViT (`torch.nn.Module`) with its weights, or a `ModelRequest`. It is not modified.
        images: Folder of images, flat or with one subfolder per class.
        method: "vpruner" (a static mask); "tome", "ppt", "bat", "evit", "topk" or "diffrate" (a schedule for it);
            "tome+NAME", a cascade of the two; "static+NAME", a static drop before it.
        target_macs: Budget: share of the dense model's MACs, between 0 and 1.
        target_latency: Budget in place of `target_macs`: share of the dense latency on `engine` (vpruner).
        out: File to write the plan to; an interrupted search resumes from a checkpoint next to it.
        limit: Calibration images, evenly spaced over the folder; by default 512 for vpruner, 1536 for schedules.
        held_out: Share of the images used only to accept or reject candidates.
        search_batch: Images per calibration batch.
        evaluations: Candidate plans per strategy; by default 24 for vpruner, 120 for schedules.
        minutes: Time limit per strategy; the plan then depends on the machine.
        rearrange: "greedy", "ppo", both or none.
        tune: Any of "shared", "least-squares" and "adam", in this order.
        tune_steps: Steps of Adam.
        targets: Loss for the Fisher information: "model" (classes sampled from the model), "logits" or "labels".
        temperature: Softens the loss used to compare candidates.
        min_tokens: Minimum number of patches in each block (vpruner).
        multiple: Patch counts are multiples of this (vpruner).
        seed: Random seed.
        engine, precision, batch, threads: Setting in which `target_latency` is measured; by default ort, its own
            precision, batch size 8, all threads.
        latency_table: File of measured latencies: read if it exists, else written.
        page: Folder to write pictures and search.html to.
        device: "cpu" or "cuda": where the search runs.
        augment: "cutmix" mixes every second image with another one; "none" disables it.
        strict: Fail on the first image that cannot be decoded.
        classes: Class names in the order of the logits, or a file of them; by default the model's own.
        preprocessing: Overrides timm's data configuration of the model: any of `mean`, `std`, `crop_pct`,
            `interpolation`, `crop_mode`.
        backbone: Attribute path to the ViT inside `model`, e.g. "model.encoder".
        workers: Processes that share the work (vp_exporter.utils.distributed); all return the plan.
        progress: Receives progress; by default the logger "vp_exporter".

    Returns:
        The plan. `plan.provenance["search"]` lists every stage and baseline with its held-out KL, and the verdict.

    Raises:
        SearchError: if there is no budget or more than one, it cannot be reached, or there are too few images.
        DataError: if the images cannot be used.
        EngineUnavailableError: if the engine of `target_latency` cannot run on this machine.

    Examples:
        >>> import timm, vp_exporter as vp
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        >>> plan = vp.search(vit, "calib/", target_macs=0.8, search_batch=4, evaluations=1, min_tokens=2)
        >>> plan.method
        'vpruner'
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "images", "target_macs", "out")}
    place = models.optional_path(out, "out")
    if place is not None:
        from vp_engines.atomic import check_parent

        check_parent(place)
    return search_all(model, images, [target_macs], [place], **options)[0].plan


def search_all(
    model: models.ModelLike,
    images: PathLike,
    target_macs: Sequence[float | None],
    outs: Sequence[Path | None],
    **options: Any,
) -> list[SearchResult]:
    """Search for several budgets on the same images. Returns full results, not only the plans.

    Args:
        target_macs, outs: Budget of each search, and file to write its plan to.
        options: Arguments of `search`, with the same defaults.
    """
    defaults = search.__kwdefaults__ or {}
    if strange := sorted(set(options) - set(defaults)):
        raise TypeError(f"search_all has no argument {strange[0]!r}")
    chosen: dict[str, Any] = {**defaults, **options}
    engine, page, device, method = (chosen[key] for key in ("engine", "page", "device", "method"))
    table = models.optional_path(chosen["latency_table"], "latency_table")
    measured = chosen["target_latency"] is not None and not (table is not None and table.exists())
    _ready((engine or "ort") if measured else None, drawn=page is not None)
    from vp_exporter.searching.settings import SearchSettings, usual_images

    same = ("target_latency", "min_tokens", "multiple", "evaluations", "minutes", "tune_steps", "targets")
    requests = [
        SearchSettings(
            method=method,
            target_macs=share,
            strategies=tuple(chosen["rearrange"]),
            tuning=tuple(chosen["tune"]),
            temperature=chosen["temperature"],
            seed=chosen["seed"],
            **{key: chosen[key] for key in same},
        )
        for share in target_macs
    ]
    if device not in ("cpu", "cuda"):
        raise VpError(f"`device` is {device!r}", expected="cpu or cuda")

    import torch

    from vp_exporter.data.labels import class_names
    from vp_exporter.model.preprocessing import read_preprocessing
    from vp_exporter.searching.run import ImageOptions, LatencyOptions, SearchRun
    from vp_exporter.utils.distributed import single

    if device == "cuda" and not torch.cuda.is_available():
        raise VpError("`device` is cuda and torch sees no GPU", expected="cpu, or a machine with a GPU")
    progress, workers = models.progress_of(chosen["progress"]), chosen["workers"] or single()
    loaded = models.take(model, chosen["backbone"], progress)
    spec = read_preprocessing(chosen["preprocessing"], loaded.vit, loaded.description)
    if (names := class_names(chosen["classes"])) is not None:
        loaded = replace(loaded, classes=tuple(names))
    run = SearchRun(loaded, spec, device, workers, progress)
    if chosen["target_latency"] is not None:
        run.measure(LatencyOptions(engine, chosen["precision"], chosen["batch"], chosen["threads"], table))
    count = usual_images(method) if chosen["limit"] is None else chosen["limit"]
    run.read(
        ImageOptions(
            models.path_of(images, "images"),
            count,
            chosen["held_out"],
            chosen["search_batch"],
            chosen["augment"],
            chosen["strict"],
            need_labels=chosen["targets"] == "labels",
        ),
        chosen["seed"],
    )
    results = [run.search(request, path) for request, path in zip(requests, outs, strict=True)]
    if page is not None and workers.leader:
        from vp_exporter.searching.report.page import write_page

        Path(page).mkdir(parents=True, exist_ok=True)
        write_page(Path(page), run.page(results))
    return results


def _ready(engine: str | None, *, drawn: bool) -> None:
    """Check packages, and the engine to measure, before any work.

    Raises:
        PackageMissingError: if packages are missing; gives one pip command for all of them.
        EngineUnavailableError: if the engine cannot be measured on this machine.
    """
    from vp_engines.backends import get_backend
    from vp_engines.extras import require_packages
    from vp_exporter.utils.required_packages import ONNX_LOWERING, PICTURES, SEARCH

    needs, also = [*SEARCH, *(PICTURES if drawn else ())], []
    if engine is not None:
        backend = get_backend(engine)
        needs += [*(("onnx", *ONNX_LOWERING) if backend.source == "onnx" else ()), *backend.packages]
        also.append(backend.extra)
    require_packages("`vp.search`", "search", needs, also=also, load=False)
    for ready in () if engine is None else (backend.available("build"), backend.available("run")):
        if not ready.ok:
            raise EngineUnavailableError(f"engine '{engine}' cannot be measured here: {ready.reason}")
    require_packages("`vp.search`", "search", needs, also=also)
