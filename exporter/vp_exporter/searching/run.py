"""A model and its calibration images, over which one budget after another is searched."""

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
    """Which images a search looks at, and how.

    Attributes:
        root: an ImageFolder, or a flat folder of images.
        limit: take this many, evenly spaced over the folder.
        held_out: share of them that only accepts and rejects.
        batch_size: of one calibration batch.
        augment: of vp_exporter.data.augment.AUGMENTS.
        strict: fail on the first one that cannot be decoded.
        need_labels: refuse a folder without labels.
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
    """What a latency budget is measured on; None is the default, or what the table says.

    Attributes:
        table: file of measured latencies: read if it is there, else written.
    """

    engine: str | None = None
    precision: str | None = None
    batch: int | None = None
    threads: int | None = None
    table: Path | None = None

    @property
    def measured(self) -> bool:
        """Whether the engine has to run."""
        return self.table is None or not self.table.exists()


@dataclass
class SearchRun:
    """Searches of one model.

    Args:
        model: moved to `device`.
        preprocessing: of its images.
        device: "cpu" or "cuda": where the search runs.
        workers: several processes as one.
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
        """Get the measured latencies that a latency budget needs: from a file, or by one process for all.

        Raises:
            SearchError: a file that cannot be read, or of another engine, precision, batch or number of threads.
        """
        with self.progress.stage(f"measuring a block on {options.engine or 'ort'}"):
            self.table = self.workers.from_leader(lambda: _table(self.model, options, self.progress))

    def read(self, images: ImageOptions, seed: int) -> None:
        """Decode the images and run the dense model over them.

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
        """One search.

        Args:
            out: where its plan is written. A search that was killed goes on from what lies beside it.

        Raises:
            SearchError: a budget out of reach, losses that are not finite, or a checkpoint of another search.
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
            assert self.table is not None  # `measure` came first
            costs = latency_costs(self.table, self.model.description)
            self.facts["latency_table"] = self.table.to_dict()
        result = search(scorer, settings, checkpoint, costs=costs, facts=self.facts, progress=self.progress)
        if self.workers.leader and out is not None:
            result.plan.save(out)
        checkpoint.remove()
        return result

    def page(self, results: Sequence[SearchResult]) -> dict[str, Any]:
        """What the page and its pictures show: the last result, and the front of all."""
        last, description = results[-1], self.model.description
        plan, mine = last.plan, _measured(last)
        # Plans of the same counts are one line, named by the last of them.
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
    """The baselines and stages of a search that have a held-out KL, as the page takes them."""
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
    """The tuned scale of each patch in each block, float64 [depth, patches]; 0 where it is gone."""
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
