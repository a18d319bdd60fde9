"""Calibration images in numbered batches: some to search on, some held out to accept or reject results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.data.augment import AUGMENTS, cutmix
from vp_exporter.data.image_folder import ImageFolder
from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.utils.distributed import Workers, single
from vp_exporter.utils.progress import SILENT, Progress


@dataclass(frozen=True)
class Calibration:
    """Calibration images and the dense model's outputs. A process holds the images of its own batches, and all logits.

    Attributes:
        search: Batch numbers to search on.
        held: Batch numbers that are held out: used to choose between plans, never to fit them.
        num_classes: Number of classes of the model.
        fingerprint: sha256 of the files' names and sizes; "" for tensors.
        skipped: Files that could not be decoded.
    """

    search: tuple[int, ...]
    held: tuple[int, ...]
    num_classes: int
    _images: Mapping[int, Tensor]
    _dense: Mapping[int, Tensor]
    _labels: Mapping[int, Tensor | None]
    fingerprint: str = ""
    skipped: tuple[tuple[str, str], ...] = field(default=())

    def images(self, batch: int) -> Tensor:
        """float32 [b, 3, H, W] of a batch owned by this process."""
        return self._images[batch]

    def dense(self, batch: int) -> Tensor:
        """float32 [b, C], logits of the dense model, on the CPU."""
        return self._dense[batch]

    def labels(self, batch: int) -> Tensor | None:
        """int64 [b], or None without labels."""
        return self._labels[batch]

    def count(self, batches: Sequence[int]) -> int:
        """Number of images in these batches."""
        return sum(len(self._dense[batch]) for batch in batches)

    def first(self, images: int, batches: Sequence[int] | None = None) -> tuple[int, ...]:
        """The fewest leading batches that hold at least this many images; all batches if there are too few.

        Args:
            batches: Defaults to those to search on.
        """
        among = tuple(self.search if batches is None else batches)
        count = next((k for k in range(1, len(among)) if self.count(among[:k]) >= images), len(among))
        return among[:count]

    def holding_out(self, images: int) -> Calibration:
        """The same images with all but `first(images)` held out, for a search that needs few images to fit."""
        kept = self.first(images)
        return replace(self, search=kept, held=(*self.search[len(kept) :], *self.held))

    @property
    def labelled(self) -> bool:
        return all(labels is not None for labels in self._labels.values())

    @classmethod
    def of_tensors(
        cls,
        images: Tensor,
        labels: Tensor | None,
        vit: nn.Module,
        description: ModelSpec,
        *,
        batch_size: int = 32,
        held_share: float = 0.25,
        workers: Workers | None = None,
    ) -> Calibration:
        """Create from float32 [n, 3, H, W], cut into batches in order.

        Raises:
            SearchError: if there are too few images for two batches, or the share is out of range.
        """
        workers = workers or single()
        count = -(-len(images) // batch_size)
        search, held = split(len(images), batch_size, held_share)
        cut = {i: images[i * batch_size : (i + 1) * batch_size] for i in range(count)}
        named = {i: None if labels is None else labels[i * batch_size : (i + 1) * batch_size] for i in range(count)}
        mine = {i: batch for i, batch in cut.items() if workers.owns(i)}
        dense = _dense_logits(vit, description, mine, range(count), workers, SILENT)
        return cls(search, held, description.num_classes, mine, dense, named)


def split(images: int, batch_size: int, held_share: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch numbers to search on, and held-out batch numbers: the last ones, at least one.

    Raises:
        SearchError: if there are too few images for two batches, or the share is out of range.
    """
    if not 0 < held_share < 1:
        raise SearchError(f"the held-out share is {held_share:g}", expected="above 0 and below 1")
    if images < 2 * batch_size:
        raise SearchError(
            f"{images} calibration images",
            expected=f"at least {2 * batch_size}: one batch of {batch_size} to search on and one held out",
            fix="give more images, or a smaller `search_batch`",
        )
    count = -(-images // batch_size)
    held = min(count - 1, max(1, round(held_share * count)))
    return tuple(range(count - held)), tuple(range(count - held, count))


def load_calibration(
    root: Path,
    prepare: Callable[[Path], np.ndarray],
    vit: nn.Module,
    description: ModelSpec,
    *,
    classes: Sequence[str] | None = None,
    limit: int | None = 512,
    batch_size: int = 32,
    held_share: float = 0.25,
    seed: int = 0,
    strict: bool = False,
    need_labels: bool = False,
    augment: str = "cutmix",
    workers: Workers | None = None,
    progress: Progress = SILENT,
    device: str | torch.device = "cpu",
) -> Calibration:
    """Decode an image folder and run the dense model on it.

    The files are shuffled by `seed` before they are cut into batches, because a folder is sorted by class. Files that
    cannot be decoded are skipped with a warning, making their batch smaller.

    Args:
        root: An ImageFolder (vp_exporter.data.image_folder).
        prepare: Maps an image file to float32 [3, H, W].
        limit: Number of images, evenly spaced over the folder; None for all.
        need_labels: Reject a folder without labels, or with a single class.
        augment: One of vp_exporter.data.augment.AUGMENTS: whether to mix every second image with another one. The label
            remains that of the larger part.

    Raises:
        DataError: if the folder cannot be read, or has no valid image.
        SearchError: if there are too few images, labels are needed but missing, there is a single class, or logits are
            not finite.
    """
    workers = workers or single()
    if augment not in AUGMENTS:
        raise SearchError(f"`augment` is {augment!r}", expected=" or ".join(AUGMENTS))
    if not description.num_classes:
        raise SearchError(
            f"{description.name} gives features, no classes", expected="a model with a head: `num_classes` above 0"
        )
    folder = ImageFolder(
        root, prepare, classes=classes, num_classes=description.num_classes, strict=strict, limit=limit,
        need_labels=need_labels,
        progress=progress if workers.leader else SILENT,
    )  # fmt: skip
    if need_labels and (folder.labels is None or len(np.unique(folder.labels)) < 2):
        found = "no labels" if folder.labels is None else "a single class"
        raise SearchError(
            f"{root} has {found}", expected="a folder for each of two classes or more",
            fix="search without labels: the dense model's own answers are the default target",
        )  # fmt: skip
    fingerprint = folder.fingerprint()
    order = np.random.default_rng(seed).permutation(len(folder))
    search, held = split(len(folder), batch_size, held_share)
    count = len(search) + len(held)
    paths, labels = folder.paths, folder.labels
    images: dict[int, Tensor] = {}
    named: dict[int, Tensor | None] = {}
    skipped: list[tuple[str, str]] = []

    def decode(batch: int) -> Tensor:
        """Decode one batch; returns the positions (in `order`) of the valid images."""
        chosen = order[batch * batch_size : (batch + 1) * batch_size]
        folder.paths = [paths[i] for i in chosen]
        folder.labels = np.arange(len(chosen), dtype=np.int64)
        read = list(folder.batches(batch_size))
        skipped.extend(folder.skipped)
        pixels = torch.from_numpy(np.concatenate([part.images for part in read])).to(device)
        images[batch] = cutmix(pixels, (seed, batch)) if augment == "cutmix" else pixels
        places = np.concatenate([part.labels for part in read if part.labels is not None])
        return torch.from_numpy(chosen[places])

    mine = [batch for batch in range(count) if workers.owns(batch)]
    drawn = iter(progress.track(mine, total=len(mine), description="reading the calibration images"))

    def next_batch(batch: int) -> Tensor:
        next(drawn)
        return decode(batch)

    kept = workers.map(next_batch, range(count))
    next(drawn, None)  # finishes the progress bar
    for batch, places in enumerate(kept):
        named[batch] = None if labels is None else torch.from_numpy(labels[places.numpy()])
    dense = _dense_logits(vit, description, images, range(count), workers, progress)
    return Calibration(
        search, held, description.num_classes, images, dense, named, fingerprint, tuple(sorted(set(skipped)))
    )


@torch.inference_mode()
def _dense_logits(
    vit: nn.Module,
    description: ModelSpec,
    images: Mapping[int, Tensor],
    batches: Sequence[int],
    workers: Workers,
    progress: Progress,
) -> dict[int, Tensor]:
    model = ReducedViT(vit, description).to(next(vit.parameters()).device)
    with progress.stage("running the dense model over them"):
        logits = workers.map(lambda batch: model(images[batch]), batches)
    for part in logits:
        if not torch.isfinite(part).all():
            raise SearchError(
                "the dense model gives NaN or infinite logits on the calibration images", expected="finite logits",
                fix="check the weights and the preprocessing (`mean`, `std`)",
            )  # fmt: skip
    return {batch: part.clone() for batch, part in zip(batches, logits, strict=True)}
