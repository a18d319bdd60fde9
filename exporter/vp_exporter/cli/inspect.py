"""vp-inspect: verify and show a bundle, a plan, or the plan that a method makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vp_exporter.cli import console, naming, options, plans
from vp_exporter.utils import file_types

if TYPE_CHECKING:
    from vp_exporter.methods import MethodRequest

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Exit codes: 0 sound, 2 not.")
def inspect(
    path: Annotated[Path | None, typer.Argument(help="A bundle (NAME.vpe), a plan (.json) or a mask.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Check the plan against this timm model.")] = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    model_arg: options.ModelArgs = None,
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
    classes: options.Classes = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="NEW.vpe", help="With --classes: a copy with these names.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="With --classes: put the names into the bundle.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    version: options.Version = False,
) -> None:
    """Verify a bundle file by file, or check a plan or what --method would make of --model, and show what it says.

    With --classes FILE and --update (or --out NEW.vpe), give a finished bundle its class names.
    """

    def body() -> int:
        from vp_engines.errors import VpError

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
        if (path is None) == (wanted is None):
            raise VpError(
                "nothing to inspect is named" if path is None else f"both {path} and --method are given",
                expected="a bundle, a plan or a mask; or --method NAME with --model NAME",
            )
        args = options.parse_model_args(model_arg)
        size = options.parse_size(img_size)
        if path is None:
            naming.check_options(path, classes, out, update)
            if model is None:
                raise VpError("--method is given without --model", expected="--model NAME, for which to make the plan")
            return _plan(None, wanted, model, args, num_classes, size, as_json)
        naming.check_options(path, classes, out, update)
        file_types.refuse(path)
        if path.is_dir():
            if classes is not None:
                return naming.name_classes(path, classes, out, as_json)
            return _bundle(path, as_json)
        from vp_exporter.plan.masks import SUFFIXES

        if path.suffix in SUFFIXES and model is None:
            raise VpError(f"{path} is a bare mask", expected="--model NAME", fix="a mask does not say what it is for")
        return _plan(path, None, model, args, num_classes, size, as_json)

    raise typer.Exit(console.run(body, debug=debug))


def _bundle(path: Path, as_json: bool) -> int:
    from vp_engines.bundle import verify_bundle
    from vp_exporter.cli import show

    bundle = verify_bundle(path)
    if as_json:
        console.print_json({"manifest": bundle.manifest.document(), "digest": bundle.digest})
        return 0
    show.manifest(bundle.manifest, bundle.digest)
    rows = [row if isinstance(row, tuple) else (row, row) for row in bundle.manifest.plan.tokens]
    grid = [
        size // patch
        for size, patch in zip(bundle.manifest.model.img_size, bundle.manifest.model.patch_size, strict=True)
    ]
    show.tokens(rows, max(grid[0] * grid[1], max(row[0] for row in rows)))
    return 0


def _plan(
    path: Path | None,
    wanted: MethodRequest | None,
    model: str | None,
    args: dict,
    num_classes: int | None,
    img_size: tuple[int, int] | None,
    as_json: bool,
) -> int:
    from vp_exporter.cli import show
    from vp_exporter.cli.tables import facts as show_facts
    from vp_exporter.plan import ReductionPlan

    description = None
    if model is not None:
        from vp_engines.extras import require_packages
        from vp_exporter.utils.required_packages import MODEL

        require_packages("--model", "export", MODEL)
        from vp_exporter.api.models import describe
        from vp_exporter.api.plans import resolve
        from vp_exporter.model.request import ModelRequest

        description = describe(ModelRequest(model, args, num_classes=num_classes, img_size=img_size))
        source = wanted or path
        assert source is not None  # the caller passes exactly one of them
        plan = resolve(source, description)
    else:
        assert path is not None  # the caller requires --model otherwise
        plan = ReductionPlan.load(path)
    rows = [(row.attention, row.mlp) for row in plan.tokens()]
    counts = None
    if description is not None:
        from vp_exporter.plan.macs import count_macs

        counts = (count_macs(description).total, count_macs(description, plan).total)
    if as_json:
        console.print_json(
            {
                "plan": plan.to_dict(),
                "fingerprint": plan.fingerprint(),
                "tokens": rows,
                "macs": None if counts is None else {"dense": counts[0], "reduced": counts[1]},
            }
        )
        return 0
    target = plan.model
    facts = [
        ("method", plan.method or "unnamed"),
        (
            "for",
            f"{target.name}, {'x'.join(map(str, target.image_size))} px, {target.patches} patches "
            f"and {target.prefix_tokens} prefix tokens, {target.depth} blocks",
        ),
        ("steps", ", ".join(f"{step.reducer}@{step.block}" for step in plan.steps) or "none"),
        ("tuned key bias", f"{len(plan.key_bias)} blocks" if plan.key_bias else "none"),
        ("budget", plan.budget if plan.budget is not None else "not stated"),
        ("provenance", plan.provenance or "not stated"),
        ("fingerprint", plan.fingerprint()),
    ]
    if counts is not None and description is not None:
        ratio = f"{show.macs(counts[1])} of {show.macs(counts[0])} (ratio {counts[0] / counts[1]:.3f})"
        facts.append(("MACs", f"{ratio}, with a head of {description.num_classes} classes"))
    else:
        facts.append(("MACs", "unknown without the model: pass --model NAME"))
    show_facts(f"plan {path.name if path is not None else f'by method {plan.method}'}", facts)
    show.tokens(rows, target.patches + target.prefix_tokens)
    return 0


def main() -> None:
    """Run as a console script."""
    console.main(app)


if __name__ == "__main__":
    main()
