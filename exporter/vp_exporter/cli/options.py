"""Options shared by several commands, and parsers for their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vp_engines.errors import VpError
from vp_exporter.cli import console

if TYPE_CHECKING:
    from vp_exporter.model.request import ModelRequest

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="NAME", help="timm model name; or hf-hub:ORG/NAME, or local-dir:FOLDER, as timm's."
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="KEY=VALUE", help="Argument of timm.create_model, e.g. global_pool=avg."),
]
ImgSize = Annotated[
    str | None,
    typer.Option(metavar="PIXELS", help="Image size, 384 or height,width; positions are resampled; by default timm's."),
]
UseEma = Annotated[
    bool | None,
    typer.Option("--use-ema/--no-ema", help="Averaged weights of a checkpoint, or not; by default where it has them."),
]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names in the order of the logits: one a line, or JSON."),
]
NumClasses = Annotated[
    int | None, typer.Option(min=0, help="Classes of the head; by default as in the weights. 0: features.")
]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help=".safetensors, or a trainer's checkpoint (.pth, .ckpt, ...).")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Weights from timm's hub.")]
RandomInit = Annotated[bool, typer.Option("--random-init", help="Random weights: for latency studies only.")]
CropPct = Annotated[float | None, typer.Option(help="Input size over resized size; by default timm's.")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos.")]
Mean = Annotated[str | None, typer.Option(metavar="R,G,B", help="Preprocessing mean; by default timm's.")]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Preprocessing std; by default timm's.")]
Data = Annotated[
    Path | None, typer.Option(metavar="DIR", help="ImageFolder to validate on (one folder per class, or unlabelled).")
]
MaxDrop = Annotated[float | None, typer.Option(help="Budget: top-1 points that may be lost against dense.")]
MinSpeedup = Annotated[float | None, typer.Option(help="Budget: speed-up over dense, at every batch size timed.")]
MinAgreement = Annotated[float | None, typer.Option(help="Budget: percent of images classified as by dense.")]
Batches = Annotated[
    list[int] | None,
    typer.Option("--batch", min=1, help="Batch size to time; repeat for several (by default 1 and 8)."),
]
Limit = Annotated[int | None, typer.Option(help="Validate on this many images, evenly spaced over the folder.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Seconds of timed work per batch size.")]
Strict = Annotated[bool, typer.Option(help="Fail on the first image that cannot be decoded.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the engines when they are measured.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default as the bundle was built.")]
Samples = Annotated[bool, typer.Option("--samples/--no-samples", help="Show sample images in the report.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and the verdict's line.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=console.show_version, help="Show the version and stop.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Make the plan by a method: tome, ppt, evit, topk, bat, diffrate, pitome, gtp; random, grid, center.",
    ),
]
Preset = Annotated[str | None, typer.Option(metavar="NAME", help="A published setting of the method, e.g. ppt-deit-s.")]
R = Annotated[
    str | None,
    typer.Option("--r", metavar="R", help="Tokens that leave at each block: 13, or a list such as 0,6,8,10."),
]
Schedule = Annotated[str | None, typer.Option(help="Shape of --r: constant, decreasing (2r to 0) or increasing.")]
Blocks = Annotated[
    str | None, typer.Option(metavar="B,B,...", help="Blocks where the method acts (0-based), e.g. 3,6,9.")
]
KeepRate = Annotated[float | None, typer.Option(help="Share of the patch tokens that a stage keeps.")]
Tau = Annotated[float | None, typer.Option(help="ppt: variance of the scores from which an image is pruned.")]
TargetMacs = Annotated[float | None, typer.Option(help="Share of the dense MACs to solve the schedule for, e.g. 0.65.")]
Seed = Annotated[int | None, typer.Option(help="Seed of method random.")]
Proportional = Annotated[
    bool | None,
    typer.Option(
        "--proportional-attention/--no-proportional-attention",
        help="Add log(token size) to the logits; by default as the method's paper does.",
    ),
]
MethodArgs = Annotated[
    list[str] | None,
    typer.Option("--method-arg", metavar="KEY=VALUE", help="Argument of the method, e.g. fuse=false (JSON values)."),
]


def model_request(
    model: str,
    model_arg: list[str] | None,
    weights: Path | None,
    pretrained: bool,
    random_init: bool,
    num_classes: int | None,
    img_size: str | None,
    use_ema: bool | None,
) -> ModelRequest:
    """Create the model request from options.

    Raises:
        VpError: if an option does not parse.
    """
    from vp_exporter.model.request import ModelRequest

    return ModelRequest(
        model, parse_model_args(model_arg), weights, pretrained, random_init, num_classes, parse_size(img_size), use_ema
    )


def preprocessing(
    crop_pct: float | None, interpolation: str | None, mean: str | None, std: str | None
) -> dict[str, Any] | None:
    """Overrides of timm's preprocessing; None if there are none.

    Raises:
        VpError: if an option does not parse.
    """
    stated = {
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "mean": parse_channels(mean, "--mean"),
        "std": parse_channels(std, "--std"),
    }
    return {name: value for name, value in stated.items() if value is not None} or None


def parse_model_args(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `["img_size=384", "class_token=false"]` to keyword arguments. Values are parsed as JSON if possible.

    Raises:
        VpError: if a `=` is missing, or a key is given twice.
    """
    return parse_pairs(pairs, "--model-arg", "img_size=384")


def parse_pairs(pairs: list[str] | None, option: str, example: str) -> dict[str, Any]:
    """Parse a repeated `KEY=VALUE` option. Values are parsed as JSON if possible, otherwise kept as text.

    Raises:
        VpError: if a `=` is missing, or a key is given twice.
    """
    args: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise VpError(f"{option} is {pair!r}", expected=f"KEY=VALUE, such as {example}")
        if key in args:
            raise VpError(f"{option} gives {key} twice", expected="one value")
        try:
            args[key] = json.loads(text)
        except ValueError:
            args[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return args


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse `"384"` to (384, 384), and `"224,384"` or `"224x384"` to height and width.

    Raises:
        VpError: if the text does not parse.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    whole = all(part.isascii() and part.isdigit() and 0 < len(part) < 6 for part in parts)
    sides = tuple(int(part) for part in parts) if whole else ()
    if len(sides) not in (1, 2) or 0 in sides:
        raise VpError(f"--img-size is {text!r}", expected="pixels: 384, or height and width: 224,384")
    return sides[0], sides[-1]


def parse_channels(text: str | None, option: str) -> tuple[float, ...] | None:
    """Parse `"0.5,0.5,0.5"` to three numbers.

    Raises:
        VpError: if there are not three numbers.
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise VpError(f"{option} is {text!r}", expected="three numbers, such as 0.485,0.456,0.406")
    return values


def parse_whole_numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    """Parse `"3,6,9"` to (3, 6, 9).

    Raises:
        VpError: if there is anything but whole numbers and commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise VpError(f"{option} is {text!r}", expected=f"whole numbers with commas, such as {example}")
    return tuple(int(part) for part in parts)
