"""Search for plans of one model at one or more budgets, on one set of calibration images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch

import vp_engines
from vp_engines.backends import get_backend
from vp_engines.manifest import Preprocessing
from vp_engines.preprocess import preprocess
from vp_exporter.errors import SearchError
from vp_exporter.model.loading import LoadedModel
from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.calibration import Calibration, load_calibration
from vp_exporter.searching.checkpoint import Checkpoint
from vp_exporter.searching.cost.latency import LatencyTable, latency_costs
from vp_exporter.searching.cost.measured_latency import measure_table
from vp_exporter.searching.pipeline import SearchResult, search
from vp_exporter.searching.scoring import Scorer
from vp_exporter.searching.settings import SearchSettings
from vp_exporter.utils.distributed import Workers, single
from vp_exporter.utils.progress import SILENT, Progress


@dataclass(frozen=True)
class ImageOptions:
    """Calibration images of a search.

    Attributes:
        root: An ImageFolder, or a flat folder of images.
        limit: Number of images, evenly spaced over the folder.
        held_out: Share that is only used to accept or reject results.
        batch_size: Size of a calibration batch.
        augment: One of vp_exporter.data.augment.AUGMENTS.
        strict: Raise on the first image that cannot be decoded.
        need_labels: Reject a folder without labels.
    """

    root: Path
    limit: int
    held_out: float = 0.25
    batch_size: int = 32
    augment: str = "cutmix"
    strict: bool = False
    need_labels: bool = False


@dataclass(frozen=True)
class LatencyOptions:
    """Measurement of latencies for a latency budget; None for the default, or the value in the table.

    Attributes:
        table: File of measured latencies; read if it exists, else written.
    """

    engine: str | None = None
    precision: str | None = None
    batch: int | None = None
    threads: int | None = None
    table: Path | None = None

    @property
    def measured(self) -> bool:
        """Whether the engine has to be run."""
        return self.table is None or not self.table.exists()


@dataclass
class SearchRun:
    """Searches of one model.

    Args:
        model: Moved to `device`.
        preprocessing: Of its images.
        device: "cpu" or "cuda", where the search runs.
        workers: Processes that share the work.
    """

    model: LoadedModel
    preprocessing: Preprocessing
    device: str = "cpu"
    workers: Workers = field(default_factory=single)
    progress: Progress = SILENT
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        self.model.vit.to(self.device)

    def measure(self, options: LatencyOptions) -> None:
        """Read the latencies for a latency budget from a file, or measure them on the leader.

        Raises:
            SearchError: if the file cannot be read, or is for another engine, precision, batch size or number of
                threads.
        """
        with self.progress.stage(f"measuring a block on {options.engine or 'ort'}"):
            self.table = self.workers.from_leader(lambda: _table(self.model, options, self.progress))

    def read(self, images: ImageOptions, seed: int) -> None:
        """Decode the images and run the dense model on them.

        Raises:
            DataError, SearchError: as `load_calibration`.
        """
        self.calibration: Calibration = load_calibration(
            images.root,
            lambda path: preprocess([path], self.preprocessing)[0],
            self.model.vit,
            self.model.description,
            classes=self.model.classes,
            limit=images.limit,
            batch_size=images.batch_size,
            held_share=images.held_out,
            seed=seed,
            augment=images.augment,
            strict=images.strict,
            need_labels=images.need_labels,
            workers=self.workers,
            progress=self.progress,
            device=self.device,
        )
        self.facts: dict[str, Any] = {
            "weights_sha256": self.model.weights_sha256,
            "images": images.limit,
            "held_out": images.held_out,
            "search_batch": images.batch_size,
            "augment": images.augment,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "versions": _versions(),
        }

    def search(self, settings: SearchSettings, out: Path | None) -> SearchResult:
        """Run one search.

        Args:
            out: File for its plan. An interrupted search continues from the checkpoint beside it.

        Raises:
            SearchError: if the budget is out of reach, losses are not finite, or the checkpoint is of another search.
        """
        identity = {
            "model": self.model.description.name,
            "data": self.calibration.fingerprint,
            "settings": settings.asked(),
            **self.facts,
        }
        folder = None if out is None else out.with_name(out.name + ".search")
        checkpoint = Checkpoint(folder, identity, self.workers)
        scorer = Scorer(self.model.vit, self.model.description, self.calibration, self.workers, checkpoint.memo)
        costs = None
        if settings.target_latency is not None:
            assert self.table is not None  # ensured by `measure`
            costs = latency_costs(self.table, self.model.description)
            self.facts["latency_table"] = self.table.to_dict()
        result = search(scorer, settings, checkpoint, costs=costs, facts=self.facts, progress=self.progress)
        if self.workers.leader and out is not None:
            result.plan.save(out)
        checkpoint.remove()
        return result

    def page(self, results: Sequence[SearchResult]) -> dict[str, Any]:
        """Content of the report: the last result, and the front of all."""
        last, description = results[-1], self.model.description
        plan, mine = last.plan, _measured(last)
        # Plans of equal counts share a line, named after the last of them.
        curves = {tuple(row.attention for row in each.tokens()): name for name, each in last.plans.items()}
        found: dict[str, Any] = {
            "title": f"vp-search: {description.name}, {plan.method}",
            "model": description.name,
            "method": plan.method,
            "budget": f"{plan.budget.get('target_macs') or plan.budget.get('target_latency'):g} of dense",
            "verdict": last.verdict.to_dict() if last.verdict is not None else None,
            "facts": [[key, str(value)] for key, value in self.facts.items() if key != "latency_table"],
            "grid": list(description.grid),
            "baselines": [row for row in mine if row["baseline"]],
            "stages": [row for row in mine if not row["baseline"]],
            "tokens": {
                "counts": {name: list(counts) for counts, name in curves.items()},
                "dense": description.prefix_tokens + description.patches,
            },
            "trace": last.trace,
            "warnings": last.warnings,
            "importance": last.importance,
            "life": last.life,
            "front": [row for result in results for row in _measured(result)],
        }
        if plan.key_bias and last.life is not None:
            found["key_scales"] = _scales(plan, description.prefix_tokens)
        return found


def _table(model: LoadedModel, options: LatencyOptions, progress: Progress) -> LatencyTable:
    name, path = options.engine or "ort", options.table
    if path is not None and path.exists():
        found = LatencyTable.load(path)
        for key in ("engine", "precision", "batch", "threads"):
            value: Any = getattr(options, key)
            if value is not None and value != getattr(found, key):
                raise SearchError(
                    f"the latency table {path} is of {key} {getattr(found, key)}", expected=f"{key} {value}",
                    fix=f"name another file for what is to be measured, or leave out `{key}`",
                )  # fmt: skip
        return found
    device: Literal["cpu", "cuda"] = get_backend(name).devices[0]
    found = measure_table(
        model.vit, model.description, engine=name, precision=options.precision, batch=options.batch or 8,
        threads=options.threads, device=device, progress=progress,
    )  # fmt: skip
    if path is not None:
        found.save(path)
    return found


def _measured(result: SearchResult) -> list[dict[str, Any]]:
    """Baselines and stages of a search with a held-out KL, in the form that the page takes."""
    return [
        {
            "name": row["stage"],
            **{key: row[key] for key in ("macs_share", "kl", "agreement", "seconds")},
            "baseline": baseline,
            "winner": row["stage"] == result.winner,
        }
        for rows, baseline in ((result.baselines, True), (result.stages, False))
        for row in rows
        if "kl" in row
    ]


def _scales(plan: ReductionPlan, prefix: int) -> np.ndarray:
    """Tuned scale of each patch in each block, float64 [depth, patches]; 0 for dropped patches."""
    scales = np.zeros((plan.model.depth, plan.model.patches))
    for block, row in enumerate(plan.tokens()):
        bias = plan.key_bias.get(block, (0.0,) * row.attention)
        scales[block, list(row.positions or ())] = np.exp(bias[prefix:])
    return scales


def _versions() -> dict[str, str]:
    return {
        "vp-export": vp_engines.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
