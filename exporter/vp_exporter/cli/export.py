"""vp-export: a timm ViT and a plan in, a checked engine bundle out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from vp_exporter.cli import console, options, plans, show

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EPILOG = (
    "Exit codes: 0 good, 1 budget missed or outputs not finite (the bundle is written and says so), 2 bad input, 3 "
    "engine unavailable."
)


@app.command(epilog=EPILOG)
def export(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NAME.vpe", help="The bundle to write.")],
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    random_init: options.RandomInit = False,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Reduction plan (JSON).")] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Bare mask [depth, patches], or one row for all blocks: .npy, .npz, .safetensors."
        ),
    ] = None,
    method: options.Method = None,
    preset: options.Preset = None,
    r: options.R = None,
    schedule: options.Schedule = None,
    blocks: options.Blocks = None,
    keep_rate: options.KeepRate = None,
    tau: options.Tau = None,
    target_macs: options.TargetMacs = None,
    seed: options.Seed = None,
    proportional_attention: options.Proportional = None,
    method_arg: options.MethodArgs = None,
    engine: Annotated[str, typer.Option(help="ort, openvino, aoti, trt-rtx or trt.")] = "ort",
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; by default the engine's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the engine's own.")] = None,
    kernels: Annotated[
        str, typer.Option(help="portable (torch's operations), vp (our operators) or auto (the faster one, measured).")
    ] = "auto",
    opset: Annotated[
        int | None,
        typer.Option(metavar="N", help="ONNX opset of ort, 18 to 23 (the default): older runtimes take older ones."),
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(metavar="X.Y", help="Target of trt-rtx, e.g. 8.9; by default this machine's GPU.")
    ] = None,
    min_batch: Annotated[int, typer.Option(min=1, help="Smallest batch (TensorRT).")] = 1,
    opt_batch: Annotated[int, typer.Option(min=1, help="Batch to optimise for (TensorRT).")] = 8,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch (TensorRT).")] = 64,
    plugins: Annotated[
        Path | None,
        typer.Option(envvar="VP_PLUGINS", metavar="FILE", help="Library of our TensorRT plugins (docs/plugins.md)."),
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT timing cache, read and updated.")] = None,
    data: options.Data = None,
    max_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
    min_agreement: options.MinAgreement = None,
    batch: options.Batches = None,
    seconds: options.Seconds = 4.0,
    limit: options.Limit = None,
    strict: options.Strict = False,
    threads: options.Threads = None,
    samples: options.Samples = True,
    validate: Annotated[bool, typer.Option("--validate/--no-validate", help="Compare with dense, then write.")] = True,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Put the dense engine into the bundle.")] = True,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    use_ema: options.UseEma = None,
    model_arg: options.ModelArgs = None,
    classes: options.Classes = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    mean: options.Mean = None,
    std: options.Std = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --out.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    version: options.Version = False,
) -> None:
    """Turn a timm ViT and a token-reduction plan, or a method's name, into an engine bundle, checked against dense."""

    def body() -> int:
        from vp_engines.backends.base import BuildOptions, Precision
        from vp_engines.bundle import check_target
        from vp_engines.errors import EngineUnavailableError, VpError
        from vp_engines.extras import installed, require_packages
        from vp_exporter.utils.required_packages import EXPORT, ONNX_LOWERING

        if precision not in (None, "fp32", "fp16", "bf16"):
            raise VpError(f"--precision is {precision!r}", expected="fp32, fp16 or bf16")
        if device not in (None, "cpu", "cuda"):
            raise VpError(f"--device is {device!r}", expected="cpu or cuda")
        if kernels not in ("portable", "vp", "auto"):
            raise VpError(f"--kernels is {kernels!r}", expected="portable, vp or auto")
        if not min_batch <= opt_batch <= max_batch:
            raise VpError(
                f"--min-batch {min_batch}, --opt-batch {opt_batch}, --max-batch {max_batch}", expected="ascending sizes"
            )
        plans.check_one_source(plan, masks, method)
        wanted = plans.read_method(
            method,
            preset=preset,
            r=r,
            schedule=schedule,
            blocks=blocks,
            keep_rate=keep_rate,
            tau=tau,
            target_macs=target_macs,
            seed=seed,
            proportional_attention=proportional_attention,
            method_arg=method_arg,
        )
        if plugins is not None:  # also the processes that build, and the runners that check what was built
            os.environ["VP_PLUGINS"] = str(plugins.absolute())
        check_target(out, force=force)
        from vp_engines.backends import get_backend

        backend = get_backend(engine)
        backend.check_opset(opset)
        # Before the seconds that torch takes to import; one pip line for all that is missing.
        needs = [*EXPORT, *(ONNX_LOWERING if backend.source == "onnx" else ())]
        lacking = [] if all(map(installed, backend.packages)) else [backend.extra]
        require_packages("vp-export", "export", needs, also=lacking, load=False)
        ready = backend.available("build")
        if not ready.ok:
            raise EngineUnavailableError(f"engine '{engine}' cannot build here: {ready.reason}")
        require_packages("vp-export", "export", needs)
        from vp_exporter.data.labels import read_names
        from vp_exporter.exporting import ExportRequest, export_bundle
        from vp_exporter.utils.progress import Recording
        from vp_exporter.validation.check import CheckRequest

        progress = Recording(console.ConsoleProgress(quiet=quiet))  # the report has the warnings of loading, too
        budget = options.read_budget(max_drop, min_speedup, min_agreement, data)
        if not validate and (data is not None or not budget.empty):
            raise VpError("--no-validate is given with --data or a budget", expected="one or the other")
        if not dense and (data is not None or not budget.empty):
            raise VpError(
                "--no-dense leaves nothing to compare with for --data or a budget", expected="one or the other"
            )
        request = ExportRequest(
            out=out,
            engine=engine,
            precision=cast(Precision | None, precision),
            dense=dense,
            force=force,
            build=BuildOptions(
                min_batch,
                opt_batch,
                max_batch,
                cast(Literal["cpu", "cuda"], device or backend.devices[0]),
                compute_capability,
                timing_cache,
            ),
            check=CheckRequest(
                data=data,
                budget=budget,
                batches=tuple(dict.fromkeys(batch or (1, 8))),
                limit=limit,
                strict=strict,
                seconds=seconds,
                threads=threads,
                samples=samples,
                statistics_stated=mean is not None or std is not None,
            )
            if validate
            else None,
            classes=None if classes is None else read_names(classes),
            kernels=cast(Literal["portable", "vp", "auto"], kernels),
            opset=opset,
        )
        source = options.ModelSource(model, model_arg, weights, pretrained, random_init, num_classes, img_size, use_ema)
        inputs = options.InputOverrides(crop_pct, interpolation, mean, std)
        loaded, preprocessing = options.load(source, inputs, progress)
        reduction = plans.read_plan(plan, masks, wanted, loaded.description)
        result = export_bundle(loaded, reduction, preprocessing, request, progress)
        if as_json:
            console.print_json(_summary(result, out))
        else:
            if result.report is not None:
                show.report(result.report, brief=quiet)
            elif not quiet:
                show.preprocessing(result.manifest.preprocessing)
            ratio = result.manifest.plan.macs_dense / result.manifest.plan.macs_reduced
            unchecked = "" if result.report is not None else ", not validated"
            console.stdout.print(f"wrote {out} (MAC ratio {ratio:.3f}{unchecked})", markup=False, soft_wrap=True)
        return result.report.verdict.exit_code if result.report is not None else 0

    raise typer.Exit(console.run(body, debug=debug))


def _summary(result: Any, out: Path) -> dict[str, Any]:
    from vp_exporter.validation.report import Report

    return {
        "bundle": out.name,
        "manifest": result.manifest.document(),
        "report": Report(result.report).to_dict() if result.report is not None else None,
    }


def main() -> None:
    """The console script."""
    console.main(app)


if __name__ == "__main__":
    main()
