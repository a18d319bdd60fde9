"""vp-validate: compare a bundle with its baseline on this machine and your images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vp_exporter.cli import console, options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


EPILOG = (
    "Exit codes: 0 good, 1 budget missed or outputs not finite, 2 bad input, 3 engine unavailable. Several processes: "
    "torchrun --nproc-per-node N -m vp_exporter.cli.validate ...; they share the images of --data, and one of them "
    "times."
)


@app.command(epilog=EPILOG)
def validate(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.vpe", help="The bundle.")],
    data: options.Data = None,
    max_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
    min_agreement: options.MinAgreement = None,
    batch: options.Batches = None,
    seconds: options.Seconds = 4.0,
    limit: options.Limit = None,
    strict: options.Strict = False,
    classes: options.Classes = None,
    threads: options.Threads = None,
    device: options.Device = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER.vpe", help="Baseline: another bundle in place of the dense engine.")
    ] = None,
    samples: options.Samples = True,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json and report.html there.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Put the new report into the bundle.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    version: options.Version = False,
) -> None:
    """Run a bundle against its dense baseline: accuracy on --data, latency on this machine."""

    def body() -> int:
        from vp_exporter.api.bundles import validate as run
        from vp_exporter.cli import show
        from vp_exporter.utils import distributed

        # Whether the bundle runs on a GPU is only known later; on a CPU this has no effect.
        if distributed.announced() and device != "cpu":
            distributed.own_gpu()
        workers = distributed.from_environment()
        try:
            found = run(
                bundle,
                data=data,
                max_drop=max_drop,
                min_speedup=min_speedup,
                min_agreement=min_agreement,
                batch_sizes=batch or (1, 8),
                seconds=seconds,
                limit=limit,
                strict=strict,
                classes=classes,
                threads=threads,
                device=device,  # type: ignore[arg-type]  # checked where the engine is loaded
                against=against,
                samples=samples,
                report=report,
                update=update,
                workers=workers,
                progress=console.ConsoleProgress(quiet=quiet or not workers.leader),
            )

            def show_it() -> None:
                if as_json:
                    console.print_json(found.to_dict())
                else:
                    show.report(found, brief=quiet)

            # The other processes wait here, because torchrun kills all of them when one exits with a nonzero code.
            workers.from_leader(show_it)
            return found.verdict.exit_code
        finally:
            distributed.close(workers)
            # An error ends all processes with the same code; only the leader prints it.
            console.stderr.quiet = not workers.leader

    raise typer.Exit(console.run(body, debug=debug))


def main() -> None:
    """Run as a console script."""
    console.main(app)


if __name__ == "__main__":
    main()
