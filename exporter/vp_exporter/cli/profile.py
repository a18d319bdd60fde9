"""vp-profile: profile a bundle and its dense engine by part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vp_exporter.cli import console, options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EPILOG = (
    "Exit codes: 0 measured, 1 NaN or infinite outputs, 2 bad input, 3 engine unavailable. --out DIR writes "
    "profile.json, trace.json (Chrome's format: chrome://tracing, Perfetto) and profile.png."
)


@app.command(epilog=EPILOG)
def profile(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.vpe", help="The bundle.")],
    more: Annotated[list[int] | None, typer.Argument(metavar="SIZE", hidden=True)] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Batch sizes: --batch 1 8 64, or repeated (by default 1 and 8)."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER.vpe", help="Another bundle in place of the bundle's dense engine.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Only the bundle's own engine.")] = False,
    seconds: options.Seconds = 4.0,
    threads: options.Threads = None,
    device: options.Device = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure memory, in extra processes.")] = True,
    top: Annotated[int, typer.Option(min=0, help="List so many of each engine's slowest operations.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write the files there.")] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    version: options.Version = False,
) -> None:
    """Time an engine with its own profiler: patch embedding, attention, MLP, norm, token reduction, head."""

    def body() -> int:
        from vp_engines.errors import EXIT_BUDGET_MISSED, EXIT_OK, VpError
        from vp_exporter.api.bundles import profile as run
        from vp_exporter.cli import show

        if more and not batch:
            raise VpError(f"found {more[0]} behind the bundle's name", expected=f"--batch {more[0]}")
        found = run(
            bundle,
            batch_sizes=[*(batch or ()), *(more or ())] or (1, 8),
            against=against,
            alone=alone,
            seconds=seconds,
            threads=threads,
            device=device,  # type: ignore[arg-type]  # checked there
            memory=memory,
            out=out,
            progress=console.ConsoleProgress(quiet=quiet),
        )
        if as_json:
            console.print_json(found.to_dict())
        else:
            show.profiles(found, top)
            if out is not None:
                console.stdout.print(f"wrote {out}/profile.json, trace.json, profile.png", soft_wrap=True, markup=False)
        return EXIT_OK if found.finite else EXIT_BUDGET_MISSED

    raise typer.Exit(console.run(body, debug=debug))


def main() -> None:
    """Run as a console script."""
    console.main(app)


if __name__ == "__main__":
    main()
