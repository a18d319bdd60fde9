"""vp-validate: check a bundle's claim again, on your machine and your images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vp_exporter.cli import console, options

if TYPE_CHECKING:
    from vp_exporter.utils.distributed import Workers

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

    def check(workers: Workers) -> int:
        import vp_engines
        from vp_engines.bundle import update_bundle
        from vp_engines.errors import EngineUnavailableError, VpError
        from vp_exporter.cli import show
        from vp_exporter.data.labels import read_names
        from vp_exporter.validation.check import CheckRequest, check_bundle, find_baseline
        from vp_exporter.validation.report import Report, report_files, validation_fields

        def prepare() -> CheckRequest:
            request = CheckRequest(
                data=data,
                budget=options.read_budget(max_drop, min_speedup, min_agreement, data),
                batches=tuple(dict.fromkeys(batch or (1, 8))),
                limit=limit,
                strict=strict,
                classes=None if classes is None else read_names(classes),
                seconds=seconds,
                against=against,
                device=device,
                threads=threads,
                samples=samples,
            )
            options.check_folder(report, "--report")
            manifest = vp_engines.verify_bundle(bundle).manifest
            if against is not None:
                if update:
                    raise VpError(
                        "--update is given with --against",
                        expected="one of them: a bundle's own report is of its own dense engine",
                        fix="write this one elsewhere with --report DIR",
                    )
                vp_engines.verify_bundle(against)
                find_baseline(bundle, manifest, request)  # refuses what cannot be compared, before anything runs
            from vp_engines.backends import get_backend

            ready = get_backend(manifest.engine.name).available("run")
            if not ready.ok:
                raise EngineUnavailableError(f"the engine '{manifest.engine.name}' cannot run here: {ready.reason}")
            return request

        request = workers.agree(prepare)
        progress = console.ConsoleProgress(quiet=quiet or not workers.leader)
        found = check_bundle(bundle, request, progress=progress, workers=workers)

        def hand_over() -> int:
            if report is not None:
                report.mkdir(parents=True, exist_ok=True)
                Report(found).write(report)
            if update:
                update_bundle(bundle, files=report_files(found), validation=validation_fields(found))
            if as_json:
                console.print_json(Report(found).to_dict())
            else:
                show.report(found, brief=quiet)
            return found.verdict.exit_code

        # The others wait for it: torchrun ends all once one has ended with another code than 0.
        return workers.from_leader(hand_over)

    def body() -> int:
        from vp_exporter.utils import distributed

        # The bundle says whether it is for a GPU, and is read later: on a CPU this changes nothing.
        if distributed.announced() and device != "cpu":
            distributed.own_gpu()
        workers = distributed.from_environment()
        try:
            return check(workers)
        finally:
            distributed.close(workers)
            # Whatever ends one process ends all of them, with the same code: the leader says why.
            console.stderr.quiet = not workers.leader

    raise typer.Exit(console.run(body, debug=debug))


def main() -> None:
    """The console script."""
    console.main(app)


if __name__ == "__main__":
    main()
