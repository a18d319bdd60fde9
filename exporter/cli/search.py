"""vp-search: calibration images and a budget in, a plan out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vp_exporter.cli import console, options

if TYPE_CHECKING:
    from vp_exporter.loading import LoadedModel
    from vp_exporter.plan import ReductionPlan
    from vp_exporter.search.latency import LatencyTable
    from vp_exporter.search.pipeline import SearchResult
    from vp_exporter.search.settings import SearchSettings
    from vp_exporter.search.workers import Workers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EPILOG = (
    "Exit codes: 0 good, 2 bad input, 3 engine unavailable. Several processes: torchrun --nproc-per-node N -m "
    "vp_exporter.cli.search ...; the plan is the same for any N."
)


@app.command(epilog=EPILOG)
def search(
    model: options.Model,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Calibration images: an ImageFolder, or a flat folder of images.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PLAN.json", help="The plan to write (--sweep: a folder of plans).")
    ],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help=".safetensors or .pth (tensors only).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Weights from timm's hub.")] = False,
    random_init: Annotated[bool, typer.Option("--random-init", help="Random weights: to try the command.")] = False,
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help="vpruner; tome, ppt, bat, evit, topk, diffrate; or static+NAME."),
    ] = "vpruner",
    target_macs: Annotated[float | None, typer.Option(help="Share of the dense MACs, e.g. 0.65.")] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="Share of the dense latency on --engine, by a measured table (vpruner).")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="S S S", help="Shares of the dense MACs, e.g. 0.8 0.65 0.5: a plan for each.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Calibration images, evenly spaced over the folder.")] = 512,
    held_out: Annotated[float, typer.Option(help="Share of them that only accepts and rejects.")] = 0.25,
    search_batch: Annotated[int, typer.Option(min=1, help="Images of one calibration batch.")] = 32,
    evaluations: Annotated[int, typer.Option(help="Candidate plans that each strategy may run.")] = 150,
    minutes: Annotated[float | None, typer.Option(help="The same by the clock; the plan then depends on it.")] = None,
    rearrange: Annotated[str, typer.Option(metavar="NAMES", help="greedy,ppo, one of them, or none.")] = "greedy,ppo",
    tune: Annotated[
        str, typer.Option(metavar="NAMES", help="shared,least-squares,adam in their order, or none.")
    ] = "shared,least-squares,adam",
    tune_steps: Annotated[int, typer.Option(help="Steps of adam.")] = 32,
    targets: Annotated[
        str, typer.Option(help="Fisher information of: model (its own answers), logits or labels.")
    ] = "model",
    temperature: Annotated[float, typer.Option(help="Softens the loss that candidates are compared by.")] = 3.0,
    min_tokens: Annotated[int, typer.Option(help="Patches that every block keeps at least (vpruner).")] = 8,
    multiple: Annotated[int, typer.Option(help="Patch counts are multiples of this (vpruner).")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    engine: Annotated[str, typer.Option(help="Engine of --target-latency.")] = "ort",
    precision: Annotated[str | None, typer.Option(help="Precision of --target-latency.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of --target-latency.")] = 8,
    latency_table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured latencies: read if it is there, else written.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="DIR", help="Write pictures and search.html there.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda: where the search runs.")] = "cpu",
    strict: options.Strict = False,
    num_classes: options.NumClasses = None,
    model_arg: options.ModelArgs = None,
    crop_pct: Annotated[float | None, typer.Option(help="Input size over resized size; by default timm's.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Preprocessing mean; by default timm's.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Preprocessing std; by default timm's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan at --out.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    version: options.Version = False,
) -> None:
    """Search a token-reduction plan on your images. Run an interrupted search again, and it goes on where it was."""

    def body() -> int:
        from vp_engines.errors import VpError
        from vp_exporter.search.settings import SearchSettings

        shares = _shares(sweep)
        if shares and (target_macs is not None or target_latency is not None):
            raise VpError("--sweep is given with another budget", expected="one of them")
        requests = [
            SearchSettings(
                method=method,
                target_macs=share if share is not None else target_macs,
                target_latency=target_latency,
                min_tokens=min_tokens,
                multiple=multiple,
                evaluations=evaluations,
                minutes=minutes,
                strategies=_names(rearrange),
                tuning=_names(tune),
                tune_steps=tune_steps,
                targets=targets,
                temperature=temperature,
                seed=seed,
            )
            for share in (*shares, *([] if shares else [None]))
        ]
        outs = [out / f"{method}-{share:g}.json" for share in shares] if shares else [out]
        _check_outs(out, outs, force=force, sweep=bool(shares))
        if device not in ("cpu", "cuda"):
            raise VpError(f"--device is {device!r}", expected="cpu or cuda")

        import torch

        from vp_exporter.loading import ModelRequest, load_model
        from vp_exporter.preprocessing import PreprocessingOverrides, preprocessing_of
        from vp_exporter.search import workers as processes

        if device == "cuda" and not torch.cuda.is_available():
            raise VpError("--device is cuda and torch sees no GPU", expected="cpu, or a machine with a GPU")
        workers = processes.from_environment()
        try:
            progress = console.ConsoleProgress(quiet=quiet or not workers.leader)
            with progress.stage(f"loading {model}"):
                loaded = load_model(
                    ModelRequest(
                        model, options.parse_model_args(model_arg), weights, pretrained, random_init, num_classes
                    )
                )
            overrides = PreprocessingOverrides(
                crop_pct, interpolation, options.parse_channels(mean, "--mean"), options.parse_channels(std, "--std")
            )
            spec = preprocessing_of(loaded.vit, loaded.description, overrides)
            table = _latency_table(loaded, requests[0], workers, engine, precision, batch, latency_table, progress)
            runner = _Search(loaded, spec, workers, progress, device, table)
            runner.read(data, images, held_out, search_batch, seed, strict, need_labels=targets == "labels")
            results = [runner.run(request, path) for request, path in zip(requests, outs, strict=True)]
            if workers.leader:
                if page is not None:
                    from vp_exporter.search.page import write_page

                    page.mkdir(parents=True, exist_ok=True)
                    write_page(page, runner.page(results))
                if as_json:
                    found = [result.plan.to_dict() for result in results]
                    console.print_json(found if shares else found[0])
                else:
                    runner.show(results, outs)
        finally:
            processes.close(workers)
        return 0

    raise typer.Exit(console.run(body, debug=debug))


class _Search:
    """The model and its images, over which one budget after another is searched."""

    def __init__(
        self,
        loaded: LoadedModel,
        spec: Any,
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
        self, data: Path, images: int, held: float, batch: int, seed: int, strict: bool, *, need_labels: bool
    ) -> None:
        from vp_engines.preprocess import preprocess
        from vp_exporter.search.calibration import load_calibration

        self.calibration = load_calibration(
            data,
            lambda path: preprocess([path], self.spec)[0],
            self.loaded.vit,
            self.description,
            limit=images,
            batch_size=batch,
            held_share=held,
            seed=seed,
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
            "preprocessing": self.spec.model_dump(mode="json"),
            "versions": _versions(),
        }

    def run(self, settings: SearchSettings, out: Path) -> SearchResult:
        from vp_exporter.search.checkpoint import Checkpoint
        from vp_exporter.search.latency import latency_costs
        from vp_exporter.search.pipeline import search as run_search
        from vp_exporter.search.scoring import Scorer

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
        from rich.table import Table

        from vp_exporter.cli import show
        from vp_exporter.macs import mac_ratio

        for result, out in zip(results, outs, strict=True):
            table = Table(title=f"search, {result.plan.method}", title_justify="left", title_style="bold", box=None)
            for column in ("stage", "MACs", "held-out KL", "agreement", "seconds"):
                table.add_column(column, justify="left" if column == "stage" else "right")
            for row in [*result.baselines, *result.stages]:
                if "kl" in row:
                    cells = (f"{row['macs_share']:.3f}", f"{row['kl']:.5f}", f"{row['agreement']:.2f}%")
                    table.add_row(row["stage"], *cells, f"{row['seconds']:.1f}")
            console.stdout.print(table)
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
        measured = [
            {"name": row["stage"], **{key: row[key] for key in ("macs_share", "kl", "agreement", "seconds")}}
            for result in results
            for row in [*result.baselines, *result.stages]
            if "kl" in row
        ]
        mine = measured[len(measured) - sum("kl" in row for row in [*last.baselines, *last.stages]) :]
        baselines = mine[: len(last.baselines)]
        found: dict[str, Any] = {
            "title": f"vp-search: {description.name}, {plan.method}",
            "model": description.name,
            "method": plan.method,
            "budget": f"{plan.budget.get('target_macs') or plan.budget.get('target_latency'):g} of dense",
            "facts": [[key, str(value)] for key, value in self.facts.items() if key != "latency_table"],
            "grid": list(description.grid),
            "baselines": baselines,
            "stages": mine[len(baselines) :],
            "tokens": {
                "counts": {name: [row.attention for row in each.tokens()] for name, each in last.plans.items()},
                "dense": description.prefix_tokens + description.patches,
            },
            "trace": last.trace,
            "warnings": last.warnings,
            "importance": last.importance,
            "life": last.life,
            "front": measured,
        }
        if plan.key_bias and last.life is not None:
            found["key_scales"] = _scales(plan, description.prefix_tokens)
        return found


def _scales(plan: ReductionPlan, prefix: int) -> Any:
    """The tuned scale of each patch in each block, float64 [depth, patches]; 0 where it is gone."""
    import numpy as np

    scales = np.zeros((plan.model.depth, plan.model.patches))
    for block, row in enumerate(plan.tokens()):
        bias = plan.key_bias.get(block, (0.0,) * row.attention)
        scales[block, list(row.positions or ())] = np.exp(bias[prefix:])
    return scales


def _latency_table(
    loaded: LoadedModel,
    settings: SearchSettings,
    workers: Workers,
    engine: str,
    precision: str | None,
    batch: int,
    path: Path | None,
    progress: console.ConsoleProgress,
) -> LatencyTable | None:
    """The measured latencies that a latency budget needs: from a file, or measured by one process for all."""
    if settings.target_latency is None:
        return None
    from vp_exporter.search.latency import LatencyTable, measure_table

    def make() -> LatencyTable:
        if path is not None and path.exists():
            return LatencyTable.load(path)
        found = measure_table(
            loaded.vit, loaded.description, engine=engine, precision=precision, batch=batch, progress=progress
        )
        if path is not None:
            found.save(path)
        return found

    with progress.stage(f"measuring a block on {engine}"):
        return workers.from_leader(make)


def _check_outs(out: Path, outs: list[Path], *, force: bool, sweep: bool) -> None:
    from vp_engines.errors import VpError

    if sweep:
        if out.exists() and not out.is_dir():
            raise VpError(f"--out {out} is a file", expected="a folder, or a name for a new one, with --sweep")
        out.mkdir(parents=True, exist_ok=True)
    elif not out.parent.is_dir():
        raise VpError(f"there is no folder {out.parent}", expected="a folder for --out")
    for path in outs:
        if path.is_dir():
            raise VpError(f"--out {path} is a folder", expected="a file name, such as plan.json")
        if path.exists() and not force:
            raise VpError(f"{path} exists already", fix="choose another --out, or give --force")


def _shares(text: str | None) -> list[float]:
    from vp_engines.errors import VpError

    if text is None:
        return []
    try:
        shares = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        shares = []
    if not shares or len(set(shares)) != len(shares):
        raise VpError(f"--sweep is {text!r}", expected="distinct shares of the dense MACs, such as 0.8 0.65 0.5")
    return shares


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(part.strip() for part in text.split(","))


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


def join_sweep(arguments: list[str]) -> list[str]:
    """`--sweep 0.8 0.65 0.5` with its numbers as one argument: an option takes one."""
    if "--sweep" not in arguments:
        return arguments
    first = arguments.index("--sweep") + 1
    end = first
    while end < len(arguments) and re.fullmatch(r"[0-9.,]+", arguments[end]):
        end += 1
    return [*arguments[:first], *([" ".join(arguments[first:end])] if end > first else []), *arguments[end:]]


def main() -> None:
    """The console script."""
    sys.argv[1:] = join_sweep(sys.argv[1:])
    console.main(app)


if __name__ == "__main__":
    main()
