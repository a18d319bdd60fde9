"""What vp-search does once its options are read: images, one search a budget, and what is shown of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vp_exporter.cli import console

if TYPE_CHECKING:
    from vp_engines.manifest import Preprocessing
    from vp_exporter.model.loading import LoadedModel
    from vp_exporter.plan import ReductionPlan
    from vp_exporter.searching.cost.latency import LatencyTable
    from vp_exporter.searching.pipeline import SearchResult
    from vp_exporter.searching.settings import SearchSettings
    from vp_exporter.utils.distributed import Workers


class SearchRun:
    """The model and its images, over which one budget after another is searched."""

    def __init__(
        self,
        loaded: LoadedModel,
        spec: Preprocessing,
        workers: Workers,
        progress: console.ConsoleProgress,
        device: str,
        table: LatencyTable | None,
    ) -> None:
        self.loaded, self.spec, self.workers, self.progress = loaded, spec, workers, progress
        self.device, self.table = device, table
        self.description = loaded.description
        loaded.vit.to(device)

    def read(
        self,
        data: Path,
        images: int,
        held: float,
        batch: int,
        seed: int,
        augment: str,
        strict: bool,
        *,
        need_labels: bool,
    ) -> None:
        from vp_engines.preprocess import preprocess
        from vp_exporter.searching.calibration import load_calibration

        self.calibration = load_calibration(
            data,
            lambda path: preprocess([path], self.spec)[0],
            self.loaded.vit,
            self.description,
            classes=self.loaded.classes,
            limit=images,
            batch_size=batch,
            held_share=held,
            seed=seed,
            augment=augment,
            strict=strict,
            need_labels=need_labels,
            workers=self.workers,
            progress=self.progress,
            device=self.device,
        )
        self.facts = {
            "weights_sha256": self.loaded.weights_sha256,
            "images": images,
            "held_out": held,
            "search_batch": batch,
            "augment": augment,
            "preprocessing": self.spec.model_dump(mode="json"),
            "versions": _versions(),
        }

    def run(self, settings: SearchSettings, out: Path) -> SearchResult:
        from vp_exporter.searching.checkpoint import Checkpoint
        from vp_exporter.searching.cost.latency import latency_costs
        from vp_exporter.searching.pipeline import search as run_search
        from vp_exporter.searching.scoring import Scorer

        identity = {
            "model": self.description.name,
            "data": self.calibration.fingerprint,
            "settings": settings.asked(),
            **self.facts,
        }
        checkpoint = Checkpoint(out.with_name(out.name + ".search"), identity, self.workers)
        scorer = Scorer(self.loaded.vit, self.description, self.calibration, self.workers, checkpoint.memo)
        costs = None
        if settings.target_latency is not None:
            assert self.table is not None
            costs = latency_costs(self.table, self.description)
            self.facts["latency_table"] = self.table.to_dict()
        result = run_search(scorer, settings, checkpoint, costs=costs, facts=self.facts, progress=self.progress)
        if self.workers.leader:
            result.plan.save(out)
        checkpoint.remove()
        return result

    def show(self, results: list[SearchResult], outs: list[Path]) -> None:
        """The stages as a table, and where the plan is."""
        from vp_exporter.cli import show
        from vp_exporter.cli.tables import table
        from vp_exporter.plan.macs import mac_ratio

        for result, out in zip(results, outs, strict=True):
            cells = [
                (
                    row["stage"] + (" (winner)" if row["stage"] == result.winner else ""),
                    f"{row['macs_share']:.3f}",
                    f"{row['kl']:.5f}",
                    f"{row['agreement']:.2f}%",
                    f"{row['seconds']:.1f}",
                )
                for row in [*result.baselines, *result.stages]
                if "kl" in row
            ]
            columns = ("stage", "MACs", "held-out KL", "agreement", "seconds")
            table(f"search, {result.plan.method}", columns, cells)
            if result.verdict is not None:
                console.stdout.print(result.verdict.text, markup=False, soft_wrap=True)
            dense = self.description.prefix_tokens + self.description.patches
            show.tokens([(row.attention, row.mlp) for row in result.plan.tokens()], dense)
            for text in result.warnings:
                console.stdout.print(f"note: {text}", markup=False, soft_wrap=True)
            ratio = mac_ratio(self.description, result.plan)
            console.stdout.print(f"wrote {out} (MAC ratio {ratio:.3f})", markup=False, soft_wrap=True)

    def page(self, results: list[SearchResult]) -> dict[str, Any]:
        """What the page and its pictures show: the last result, and the front of all."""
        last = results[-1]
        plan, description = last.plan, self.description
        mine = _measured(last)
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


def _scales(plan: ReductionPlan, prefix: int) -> Any:
    """The tuned scale of each patch in each block, float64 [depth, patches]; 0 where it is gone."""
    import numpy as np

    scales = np.zeros((plan.model.depth, plan.model.patches))
    for block, row in enumerate(plan.tokens()):
        bias = plan.key_bias.get(block, (0.0,) * row.attention)
        scales[block, list(row.positions or ())] = np.exp(bias[prefix:])
    return scales


def latency_table(
    loaded: LoadedModel,
    settings: SearchSettings,
    workers: Workers,
    engine: str | None,
    precision: str | None,
    batch: int | None,
    threads: int | None,
    path: Path | None,
    progress: console.ConsoleProgress,
) -> LatencyTable | None:
    """The measured latencies that a latency budget needs: from a file, or measured by one process for all.

    Raises:
        SearchError: a file that cannot be read, or of another engine, precision, batch or number of threads.
    """
    if settings.target_latency is None:
        return None
    from vp_engines.backends import get_backend
    from vp_exporter.errors import SearchError
    from vp_exporter.searching.cost.latency import LatencyTable
    from vp_exporter.searching.cost.measured_latency import measure_table

    name = engine or "ort"
    backend = get_backend(name)

    def make() -> LatencyTable:
        if path is not None and path.exists():
            found = LatencyTable.load(path)
            asked = {"engine": engine, "precision": precision, "batch": batch, "threads": threads}
            for key, value in asked.items():
                if value is not None and value != getattr(found, key):
                    raise SearchError(
                        f"the latency table {path} is of {key} {getattr(found, key)}", expected=f"{key} {value}",
                        fix=f"name another file for what is to be measured, or leave out --{key}",
                    )  # fmt: skip
            return found
        found = measure_table(
            loaded.vit, loaded.description, engine=name, precision=precision, batch=batch or 8, threads=threads,
            device=backend.devices[0], progress=progress,
        )  # fmt: skip
        if path is not None:
            found.save(path)
        return found

    with progress.stage(f"measuring a block on {name}"):
        return workers.from_leader(make)


def _versions() -> dict[str, str]:
    import numpy
    import timm
    import torch

    import vp_engines

    return {
        "vp-export": vp_engines.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
