"""vp-serve: write a Triton model repository for a bundle, or serve it on Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vp_exporter.cli import console, options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def serve(version: options.Version = False) -> None:
    """Put a bundle behind an inference server."""


@app.command(
    short_help="Write a model repository for Triton Inference Server.",
    epilog="Exit codes: 0 written, 2 bad input, 3 tritonclient is missing.",
)
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
                    "server": served.server,
                    "max_batch": served.max_batch,
                    "folders": list(map(str, served.folders)),
                }
            )
            return 0
        for folder in served.folders:
            console.stdout.print(str(folder / str(served.version)), soft_wrap=True, markup=False)
        console.stdout.print(
            f"max_batch_size {served.max_batch}: {served.max_batch_reason} (--max-batch N changes it)",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        if served.server is not None:
            console.stdout.print(f"needs {served.server}", soft_wrap=True, markup=False)
        console.stdout.print(
            f"serve it: tritonserver --model-repository {out}   (model {served.name}, version {served.version}, "
            f"engine under {served.backend})",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        return 0

    raise typer.Exit(console.run(body, debug=debug))


@app.command(
    short_help="Serve a bundle on Ray Serve, here or on a cluster.",
    epilog="Exit codes: 0 stopped as told, 2 bad input, 3 Ray or the engine is missing.",
)
def ray(
    bundle: Annotated[Path, typer.Argument(help="A bundle (NAME.vpe); every node must be able to read it there.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the bundle's.")] = None,
    variant: Annotated[str, typer.Option(help="reduced or dense.")] = "reduced",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what the bundle was built for.")] = None,
    replicas: Annotated[int, typer.Option(help="Engines that run at a time.")] = 2,
    per_node: Annotated[int | None, typer.Option(help="Most of them on one node.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU cores reserved for each; by default the cores shared out.")
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of each on cuda; 0.5 puts two on one.")] = 1.0,
    max_batch: Annotated[int, typer.Option(help="Images of one run, and of one request.")] = 16,
    wait_ms: Annotated[
        float, typer.Option(metavar="MS", help="Milliseconds that a request may wait for others.")
    ] = 2.0,
    max_queued: Annotated[int, typer.Option(help="Requests that may wait for a replica.")] = 256,
    retries: Annotated[int, typer.Option(help="Other replicas that a request is given to when one dies.")] = 3,
    timeout_s: Annotated[float, typer.Option(metavar="S", help="Seconds that a request may take.")] = 60.0,
    fronts: Annotated[int, typer.Option(help="Processes that read requests.")] = 2,
    health_s: Annotated[float, typer.Option(metavar="S", help="Seconds between health checks.")] = 10.0,
    drain_s: Annotated[
        float, typer.Option(metavar="S", help="Seconds that requests under way get when it stops.")
    ] = 30.0,
    address: Annotated[
        str | None, typer.Option(help="A running cluster: auto, or HOST:PORT; by default one of its own.")
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    route: Annotated[str, typer.Option(help="Path before /v2; bundles on one cluster differ here.")] = "/",
    proxies: Annotated[str, typer.Option(help="HTTP servers on every node with a replica, or on the head.")] = "every",
    start_s: Annotated[float, typer.Option(metavar="S", help="Seconds until all replicas must run.")] = 600.0,
    debug: options.Debug = False,
) -> None:
    """Serve a bundle on Ray Serve, on this machine or on a cluster, until Ctrl-C or SIGTERM (docs/ray.md)."""

    def body() -> int:
        from vp_engines.serving.ray.command import serve_bundle
        from vp_engines.serving.ray.options import Listen, RayOptions

        chosen = RayOptions(
            name=name,
            variant=variant,  # type: ignore[arg-type]  # checked there
            device=device,  # type: ignore[arg-type]
            replicas=replicas,
            per_node=per_node,
            threads=threads,
            gpus=gpus,
            max_batch=max_batch,
            wait_ms=wait_ms,
            max_queued=max_queued,
            retries=retries,
            timeout_s=timeout_s,
            fronts=fronts,
            health_s=health_s,
            drain_s=drain_s,
        )
        listen = Listen(address=address, host=host, port=port, route=route, proxies=proxies, start_s=start_s)

        def say(line: str) -> None:
            console.stdout.print(line, soft_wrap=True, markup=False)

        serve_bundle(bundle, chosen, listen, say)
        return 0

    raise typer.Exit(console.run(body, debug=debug))


def main() -> None:
    """Run as a console script."""
    console.main(app)


if __name__ == "__main__":
    main()
