"""vp-profile: where a bundle's time goes, part by part of the model, beside the dense engine's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vp_exporter.cli import console, options

if TYPE_CHECKING:
    from vp_exporter.profiling.measure import Profiled, Subject

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
        from vp_engines.extras import require_packages
        from vp_exporter.cli import show
        from vp_exporter.profiling.measure import profile as measure
        from vp_exporter.utils.required_packages import PICTURES

        if out is not None:
            require_packages("vp-profile --out", "profile", PICTURES)
            options.check_folder(out, "--out")
        if alone and against is not None:
            raise VpError("--alone and --against are both given", expected="one of them")
        if more and not batch:
            raise VpError(f"found {more[0]} behind the bundle's name", expected=f"--batch {more[0]}")
        sizes = tuple(dict.fromkeys([*(batch or ()), *(more or ())])) or (1, 8)
        found = measure(
            _subjects(bundle, against, alone),
            batches=sizes,
            seconds=seconds,
            threads=threads,
            device=_device(device),
            memory=memory,
            progress=console.ConsoleProgress(quiet=quiet),
        )
        if out is not None:
            _write(found, out)
        if as_json:
            console.print_json(found.to_dict())
        else:
            show.profiles(found, top)
            if out is not None:
                console.stdout.print(f"wrote {out}/profile.json, trace.json, profile.png", soft_wrap=True, markup=False)
        return EXIT_OK if found.finite else EXIT_BUDGET_MISSED

    raise typer.Exit(console.run(body, debug=debug))


def _device(text: str | None) -> Literal["cpu", "cuda"] | None:
    from vp_engines.errors import VpError

    if text not in (None, "cpu", "cuda"):
        raise VpError(f"--device is {text!r}", expected="cpu or cuda")
    return text  # type: ignore[return-value]


def _subjects(bundle: Path, against: Path | None, alone: bool) -> list[Subject]:
    """The baseline first."""
    import vp_engines
    from vp_engines.errors import BundleError
    from vp_exporter.profiling.measure import Subject

    own = Subject("reduced", bundle, "reduced")
    if alone:
        return [own]
    if against is not None:
        names = [vp_engines.read_manifest(path).name for path in (against, bundle)]
        labels = [str(against), str(bundle)] if names[0] == names[1] else names
        return [Subject(labels[0], against, "reduced"), Subject(labels[1], bundle, "reduced")]
    if "dense" not in vp_engines.read_manifest(bundle).variants:
        raise BundleError(
            "the bundle holds no dense baseline to compare with",
            fix="say --alone, or name another bundle with --against",
        )
    return [Subject("dense", bundle, "dense"), own]


def _write(found: Profiled, out: Path) -> None:
    import json

    from vp_exporter.profiling.picture import stacked_bars
    from vp_exporter.profiling.trace import chrome_trace
    from vp_exporter.utils.files import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "profile.json", (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    write_atomically(out / "trace.json", chrome_trace(found.profiles))
    write_atomically(out / "profile.png", stacked_bars(found.profiles))


def main() -> None:
    """The console script."""
    console.main(app)


if __name__ == "__main__":
    main()
