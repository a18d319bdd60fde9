"""Options that several commands take, and how their text is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vp_engines.errors import VpError
from vp_exporter.cli import console

if TYPE_CHECKING:
    from vp_engines.manifest import Preprocessing
    from vp_exporter.model.loading import LoadedModel
    from vp_exporter.utils.progress import Progress
    from vp_exporter.validation.verdict import Budget

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


@dataclass(frozen=True)
class ModelSource:
    """The options that name a model and its weights, as they were typed."""

    model: str
    model_arg: list[str] | None = None
    weights: Path | None = None
    pretrained: bool = False
    random_init: bool = False
    num_classes: int | None = None
    img_size: str | None = None
    use_ema: bool | None = None


@dataclass(frozen=True)
class InputOverrides:
    """The options that replace parts of timm's preprocessing, as they were typed."""

    crop_pct: float | None = None
    interpolation: str | None = None
    mean: str | None = None
    std: str | None = None


def load(source: ModelSource, inputs: InputOverrides, progress: Progress) -> tuple[LoadedModel, Preprocessing]:
    """The model, and how its images are prepared.

    Raises:
        VpError: options that do not parse, or whatever loading the model raises.
    """
    from vp_exporter.model.loading import ModelRequest, load_model
    from vp_exporter.model.preprocessing import PreprocessingOverrides, preprocessing_of

    request = ModelRequest(
        source.model, parse_model_args(source.model_arg), source.weights, source.pretrained, source.random_init,
        source.num_classes, parse_size(source.img_size), source.use_ema,
    )  # fmt: skip
    overrides = PreprocessingOverrides(
        inputs.crop_pct,
        inputs.interpolation,
        parse_channels(inputs.mean, "--mean"),
        parse_channels(inputs.std, "--std"),
    )
    with progress.stage(f"loading {source.model}"):
        loaded = load_model(request)
        for note in loaded.notes:
            progress.note(note)
        return loaded, preprocessing_of(loaded.vit, loaded.description, overrides)


def parse_model_args(pairs: list[str] | None) -> dict[str, Any]:
    """`["img_size=384", "class_token=false"]` -> keyword arguments; values are JSON where they parse as JSON.

    Raises:
        VpError: no `=`, or a key given twice.
    """
    return parse_pairs(pairs, "--model-arg", "img_size=384")


def parse_pairs(pairs: list[str] | None, option: str, example: str) -> dict[str, Any]:
    """The `KEY=VALUE` of a repeated option; values are JSON where they parse as JSON, else text.

    Raises:
        VpError: no `=`, or a key given twice.
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
    """`"384"` -> (384, 384); `"224,384"` and `"224x384"` -> height and width.

    Raises:
        VpError: anything else.
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
    """`"0.5,0.5,0.5"` -> three numbers.

    Raises:
        VpError: not three numbers.
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
    """`"3,6,9"` -> (3, 6, 9).

    Raises:
        VpError: anything but whole numbers and commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise VpError(f"{option} is {text!r}", expected=f"whole numbers with commas, such as {example}")
    return tuple(int(part) for part in parts)


def check_folder(path: Path | None, option: str) -> None:
    """Before long work that ends in a folder.

    Raises:
        VpError: a file of that name is there.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise VpError(f"{option} {path} is a file", expected="a folder, or a name for a new one")


def read_budget(
    max_drop: float | None, min_speedup: float | None, min_agreement: float | None, data: Path | None
) -> Budget:
    """The budget that the options state.

    Raises:
        VpError: a limit out of its range, or one that needs images where there are none.
    """
    from vp_exporter.validation.verdict import Budget

    try:
        budget = Budget(max_drop, min_speedup, min_agreement)
    except VpError as error:
        raise VpError("--" + error.found.replace("_", "-"), expected=error.expected) from error
    if data is None and (max_drop is not None or min_agreement is not None):
        raise VpError("--max-drop and --min-agreement need images", expected="--data DIR")
    return budget
