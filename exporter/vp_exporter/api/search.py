"""`search`: calibration images and a budget in, a plan out."""

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
    """Search a plan on calibration images; labels are not needed.

    Args:
        model: a timm ViT (`torch.nn.Module`) with its weights, or a `ModelRequest`. It is left as it is.
        images: a folder of images, with a folder for each class or without labels.
        method: "vpruner" (a static mask); "tome", "ppt", "bat", "evit", "topk" or "diffrate" (a schedule for it);
            "tome+NAME", a cascade of the two; "static+NAME", a static drop before it.
        target_macs: share of the dense model's multiply-accumulates, above 0 and below 1; or
        target_latency: share of the dense latency on `engine` (vpruner).
        out: where to write the plan. A search that was interrupted goes on from what lies beside it.
        limit: calibration images, evenly spaced over the folder; by default 512 for vpruner, 1536 for schedules.
        held_out: share of them that only accepts and rejects.
        search_batch: images of one calibration batch.
        evaluations: candidate plans that each strategy may run; by default 24 for vpruner, 120 for schedules.
        minutes: the same by the clock; the plan then depends on it.
        rearrange: "greedy" and "ppo", one of them, or none.
        tune: "shared", "least-squares" and "adam" in their order, or none.
        tune_steps: of adam.
        targets: the Fisher information is of the model's own answers, of its logits or of labels.
        temperature: softens the loss that candidates are compared by.
        min_tokens: patches that every block keeps at least (vpruner).
        multiple: patch counts are multiples of it (vpruner).
        seed: of everything drawn.
        engine, precision, batch, threads: of `target_latency`; by default ort, its own, 8, all.
        latency_table: file of measured latencies: read if it is there, else written.
        page: a folder to write pictures and search.html to.
        device: "cpu" or "cuda": where the search runs.
        augment: "cutmix" cuts every second image into another one, "none" leaves them.
        strict: fail on the first image that cannot be decoded.
        classes: class names in the order of the logits, or a file of them; by default the model's own.
        preprocessing: in place of timm's configuration of the model: any of its names `mean`, `std`, `crop_pct`,
            `interpolation`, `crop_mode`.
        backbone: where the ViT lies in `model`, as attributes: "model.encoder".
        workers: several processes that share the work (vp_exporter.utils.distributed); every one gets the plan.
        progress: is told where the work is; by default the logger "vp_exporter".

    Returns:
        The plan. Its `provenance["search"]` has every stage and baseline with its held-out KL, and how they compare.

    Raises:
        SearchError: no budget or two, one out of reach, or too few images.
        DataError: images that cannot be used.
        EngineUnavailableError: the engine of `target_latency` cannot run here.

    Examples:
        >>> import timm, vp_exporter as vp
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        >>> plan = vp.search(vit, "calib/", target_macs=0.8, search_batch=4, evaluations=1, min_tokens=2)
        >>> plan.method
        'vpruner'
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "images", "target_macs", "out")}
    place = None if out is None else Path(out)
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
    """A search for each of several budgets over the same images, with all that was found on the way.

    Args:
        target_macs, outs: a budget each, and where its plan is written.
        options: as of `search`, and with its defaults.
    """
    chosen: dict[str, Any] = {**(search.__kwdefaults__ or {}), **options}
    engine, page, device, method = (chosen[key] for key in ("engine", "page", "device", "method"))
    table = None if chosen["latency_table"] is None else Path(chosen["latency_table"])
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
            Path(images),
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
    """What the search runs with and the engine that it is to measure, before any work.

    Raises:
        PackageMissingError: with one pip line for all that is missing.
        EngineUnavailableError: the engine cannot be measured here.
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
