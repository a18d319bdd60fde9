"""Conversion of the public functions' arguments: models, progress, paths and batch sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vp_engines.errors import VpError
from vp_exporter.utils.progress import LoggingProgress, Progress

if TYPE_CHECKING:
    import torch.nn as nn

    from vp_exporter.model.loading import LoadedModel
    from vp_exporter.model.request import ModelRequest
    from vp_exporter.model.spec import ModelSpec

    ModelLike: TypeAlias = nn.Module | ModelRequest | LoadedModel


def take(model: ModelLike, backbone: str | None, progress: Progress) -> LoadedModel:
    """Load a model in fp32 on the CPU. A module is copied, and its rewritten form checked numerically against it.

    Raises:
        UnsupportedModelError: if the model is not supported.
        WeightsError: if a request has no weights, or they do not fit.
    """
    from vp_exporter.model.loading import LoadedModel, load_model
    from vp_exporter.model.request import ModelRequest

    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, ModelRequest):
        with progress.stage(f"loading {model.name}"):
            loaded = load_model(model)
            for note in loaded.notes:
                progress.note(note)
        return loaded
    from vp_exporter.model.own_module import copy_module, find_vit
    from vp_exporter.rewrite.equivalence import check_equivalent

    vit = find_vit(model, backbone)
    with progress.stage(f"checking {type(vit).__name__}"):
        loaded = copy_module(model, vit)
        check_equivalent(loaded.vit, loaded.description)
    for note in loaded.notes:
        progress.warn(note)
    return loaded


def describe(model: ModelLike | str, backbone: str | None = None) -> ModelSpec:
    """Describe a model without loading weights, copying or running it.

    Args:
        model: A model, or a timm name.

    Raises:
        UnsupportedModelError: if the model is not supported.
    """
    from vp_exporter.model.loading import LoadedModel, describe_by_name
    from vp_exporter.model.own_module import describe_module, find_vit
    from vp_exporter.model.request import ModelRequest

    if isinstance(model, LoadedModel):
        return model.description
    if isinstance(model, str):
        return describe_by_name(model, {})
    if isinstance(model, ModelRequest):
        return describe_by_name(model.name, model.args, model.num_classes, model.size)
    return describe_module(find_vit(model, backbone))


def progress_of(progress: Progress | None) -> Progress:
    """Return `progress`, or the logger if None."""
    return LoggingProgress() if progress is None else progress


def path_of(value: str | os.PathLike[str], argument: str) -> Path:
    """Convert an argument to a path.

    Raises:
        VpError: if it is not a string or path.
    """
    if not isinstance(value, str | os.PathLike):
        raise VpError(f"`{argument}` is a {type(value).__name__}", expected="a path")
    return Path(value)


def optional_path(value: str | os.PathLike[str] | None, argument: str) -> Path | None:
    """`path_of` for an argument that may be None."""
    return None if value is None else path_of(value, argument)


def sizes_of(batch_sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Convert batch sizes, or a single one, to a tuple without duplicates.

    Raises:
        VpError: if they are not iterable.
    """
    if isinstance(batch_sizes, int):
        return (batch_sizes,)
    if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Iterable):
        raise VpError(f"`batch_sizes` is {batch_sizes!r}", expected="whole numbers from 1, such as (1, 8)")
    return tuple(dict.fromkeys(batch_sizes))
