"""vp-serve: a bundle in, what a server loads out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vp_exporter.cli import console, options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def serve(version: options.Version = False) -> None:
    """Put a bundle behind an inference server."""


@app.command(epilog="Exit codes: 0 written, 2 bad input, 3 tritonclient is missing.")
def triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle (NAME.vpe).")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The model repository.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the bundle's.")] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="onnxruntime, tensorrt, pytorch or python; by default the engine's own, else python."
        ),
    ] = None,
    preprocess: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="Who prepares images: none (clients do); model (files in, Python backend); "
            "ensemble (files in, a model before the engine's).",
        ),
    ] = "none",
    variant: Annotated[str, typer.Option(help="reduced or dense.")] = "reduced",
    model_version: Annotated[int | None, typer.Option(help="Number of this version; by default the next one.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch; by default what the engine was built for or measured at.")
    ] = None,
    delay: Annotated[int, typer.Option(metavar="US", help="Microseconds that a request may wait for others.")] = 0,
    instances: Annotated[int, typer.Option(help="Copies that run at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each copy.")] = None,
    warmup: Annotated[bool, typer.Option("--warmup/--no-warmup", help="Run batches before the model is ready.")] = True,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a model repository for Triton Inference Server; a further bundle of that name is a further version."""

    def body() -> int:
        from vp_engines.serving.triton.repository import ServeOptions, write_repository

        served = write_repository(
            bundle,
            out,
            ServeOptions(
                name=name,
                backend=backend,
                preprocess=preprocess,
                variant=variant,
                version=model_version,
                max_batch=max_batch,
                delay=delay,
                instances=instances,
                threads=threads,
                warmup=warmup,
            ),
        )
        if as_json:
            console.print_json(
                {
                    "name": served.name,
                    "version": served.version,
                    "backend": served.backend,
                    "folders": list(map(str, served.folders)),
                }
            )
            return 0
        for folder in served.folders:
            console.stdout.print(str(folder / str(served.version)), soft_wrap=True, markup=False)
        console.stdout.print(
            f"serve it: tritonserver --model-repository {out}   (model {served.name}, version {served.version}, "
            f"engine under {served.backend})",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        return 0

    raise typer.Exit(console.run(body, debug=debug))


def main() -> None:
    """The console script."""
    console.main(app)


if __name__ == "__main__":
    main()
