"""vp-export: export a timm ViT under a plan to a validated engine bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vp_exporter.cli import console, options, plans

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
        from vp_exporter.api.export import export as run
        from vp_exporter.cli import show

        source = plans.source(
            plan,
            masks,
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
        done = run(
            options.model_request(model, model_arg, weights, pretrained, random_init, num_classes, img_size, use_ema),
            source,
            out,
            engine=engine,
            precision=precision,  # type: ignore[arg-type]  # checked there, as are device and kernels
            device=device,  # type: ignore[arg-type]
            data=data,
            max_drop=max_drop,
            min_speedup=min_speedup,
            min_agreement=min_agreement,
            batch_sizes=batch or (1, 8),
            seconds=seconds,
            limit=limit,
            strict=strict,
            threads=threads,
            samples=samples,
            classes=classes,
            preprocessing=options.preprocessing(crop_pct, interpolation, mean, std),
            validate=validate,
            dense=dense,
            force=force,
            kernels=kernels,  # type: ignore[arg-type]
            opset=opset,
            compute_capability=compute_capability,
            min_batch=min_batch,
            opt_batch=opt_batch,
            max_batch=max_batch,
            plugins=plugins,
            timing_cache=timing_cache,
            progress=console.ConsoleProgress(quiet=quiet),
        )
        if as_json:
            report = done.report.to_dict() if done.report is not None else None
            console.print_json({"bundle": out.name, "manifest": done.manifest.document(), "report": report})
        else:
            if done.report is not None:
                show.report(done.report, brief=quiet)
            elif not quiet:
                show.preprocessing(done.manifest.preprocessing)
            ratio = done.manifest.plan.macs_dense / done.manifest.plan.macs_reduced
            unchecked = "" if done.report is not None else ", not validated"
            console.stdout.print(f"wrote {out} (MAC ratio {ratio:.3f}{unchecked})", markup=False, soft_wrap=True)
        return done.report.verdict.exit_code if done.report is not None else 0

    raise typer.Exit(console.run(body, debug=debug))


def main() -> None:
    """Run as a console script."""
    console.main(app)


if __name__ == "__main__":
    main()
