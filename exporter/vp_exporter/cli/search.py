"""vp-search: search for a plan within a budget, on calibration images."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from vp_exporter.cli import console, options

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
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    random_init: options.RandomInit = False,
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help="vpruner; tome, ppt, bat, evit, topk, diffrate; tome+NAME; or static+NAME."),
    ] = "vpruner",
    target_macs: Annotated[float | None, typer.Option(help="Share of the dense MACs, e.g. 0.65.")] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="Share of the dense latency on --engine, by a measured table (vpruner).")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="S S S", help="Shares of the dense MACs, e.g. 0.8 0.65 0.5: a plan for each.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=2, help="Calibration images, evenly spaced; 512 for vpruner, 1536 for schedules."),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of them that only accepts and rejects.")] = 0.25,
    search_batch: Annotated[int, typer.Option(min=1, help="Images of one calibration batch.")] = 32,
    evaluations: Annotated[
        int | None, typer.Option(help="Candidate plans that each strategy may run; 24 for vpruner, 120 for schedules.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="The same by the clock; the plan then depends on it.")] = None,
    rearrange: Annotated[str, typer.Option(metavar="NAMES", help="greedy,ppo, one of them, or none.")] = "greedy,ppo",
    tune: Annotated[
        str, typer.Option(metavar="NAMES", help="shared,least-squares,adam in their order, or none.")
    ] = "shared,least-squares,adam",
    tune_steps: Annotated[int, typer.Option(help="Steps of adam.")] = 12,
    targets: Annotated[
        str, typer.Option(help="Fisher information of: model (its own answers), logits or labels.")
    ] = "model",
    temperature: Annotated[float, typer.Option(help="Softens the loss that candidates are compared by.")] = 3.0,
    min_tokens: Annotated[int, typer.Option(help="Patches that every block keeps at least (vpruner).")] = 8,
    multiple: Annotated[int, typer.Option(help="Patch counts are multiples of this (vpruner).")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    engine: Annotated[str | None, typer.Option(help="Engine of --target-latency; by default ort.")] = None,
    precision: Annotated[str | None, typer.Option(help="Precision of --target-latency.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size of --target-latency; by default 8.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine of --target-latency.")] = None,
    latency_table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured latencies: read if it is there, else written.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="DIR", help="Write pictures and search.html there.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda: where the search runs.")] = "cpu",
    augment: Annotated[
        str, typer.Option(help="cutmix (every second image is cut into another one) or none.")
    ] = "cutmix",
    strict: options.Strict = False,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    use_ema: options.UseEma = None,
    model_arg: options.ModelArgs = None,
    classes: options.Classes = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    mean: options.Mean = None,
    std: options.Std = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan at --out.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    version: options.Version = False,
) -> None:
    """Search a token-reduction plan on your images. Run an interrupted search again, and it goes on where it was."""

    def body() -> int:
        from vp_engines.errors import VpError
        from vp_exporter.api.search import search_all
        from vp_exporter.utils import distributed

        shares = _shares(sweep)
        if shares and (target_macs is not None or target_latency is not None):
            raise VpError("--sweep is given with another budget", expected="one of them")
        outs = [out / f"{method}-{share:g}.json" for share in shares] if shares else [out]
        _check_outs(out, outs, force=force, sweep=bool(shares))
        with distributed.session() as workers:
            results = search_all(
                options.model_request(
                    model, model_arg, weights, pretrained, random_init, num_classes, img_size, use_ema
                ),
                data,
                shares or [target_macs],
                outs,
                method=method,
                target_latency=target_latency,
                limit=images,
                held_out=held_out,
                search_batch=search_batch,
                evaluations=evaluations,
                minutes=minutes,
                rearrange=_names(rearrange),
                tune=_names(tune),
                tune_steps=tune_steps,
                targets=targets,
                temperature=temperature,
                min_tokens=min_tokens,
                multiple=multiple,
                seed=seed,
                engine=engine,
                precision=precision,
                batch=batch,
                threads=threads,
                latency_table=latency_table,
                page=page,
                device=device,
                augment=augment,
                strict=strict,
                classes=classes,
                preprocessing=options.preprocessing(crop_pct, interpolation, mean, std),
                workers=workers,
                progress=console.ConsoleProgress(quiet=quiet or not workers.leader),
            )
            if workers.leader and as_json:
                found = [result.plan.to_dict() for result in results]
                console.print_json(found if shares else found[0])
            elif workers.leader:
                from vp_exporter.cli import show

                for result, path in zip(results, outs, strict=True):
                    show.search(result, path)
        return 0

    raise typer.Exit(console.run(body, debug=debug))


def _check_outs(out: Path, outs: list[Path], *, force: bool, sweep: bool) -> None:
    from vp_engines.atomic import check_parent
    from vp_engines.errors import VpError

    if sweep:
        if out.exists() and not out.is_dir():
            raise VpError(f"--out {out} is a file", expected="a folder, or a name for a new one, with --sweep")
        out.mkdir(parents=True, exist_ok=True)
    else:
        check_parent(out)
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


def join_sweep(arguments: list[str]) -> list[str]:
    """Join the numbers of `--sweep 0.8 0.65 0.5` into one argument, because an option takes only one."""
    if "--sweep" not in arguments:
        return arguments
    first = arguments.index("--sweep") + 1
    end = first
    while end < len(arguments) and re.fullmatch(r"[0-9.,]+", arguments[end]):
        end += 1
    return [*arguments[:first], *([" ".join(arguments[first:end])] if end > first else []), *arguments[end:]]


def main() -> None:
    """Run as a console script."""
    sys.argv[1:] = join_sweep(sys.argv[1:])
    console.main(app)


if __name__ == "__main__":
    main()
