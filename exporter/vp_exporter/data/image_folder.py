"""Labelled or unlabelled image folders, decoded in the background."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vp_engines.errors import VpError
from vp_engines.preprocess import IMAGE_SUFFIXES, readable_suffixes
from vp_exporter.data.labels import label_folders, printable
from vp_exporter.errors import DataError
from vp_exporter.utils.progress import SILENT, Progress


class Batch(NamedTuple):
    """Images float32 [B, 3, H, W], labels int64 [B] (None if unlabelled), and the B files."""

    images: np.ndarray
    labels: np.ndarray | None
    paths: tuple[Path, ...]


class ImageFolder:
    """An ImageNet-style folder (one sub-folder per class, with images at any depth), or a flat folder of images.

    Labels come from the folder names, see `vp_exporter.data.labels.label_folders`. A flat folder has no labels, but can
    still be used to compare the dense and the reduced model. Hidden files and folders are ignored. Files count as
    images by the suffixes that Pillow can read here.

    Files that cannot be decoded are reported, skipped and counted, so that one bad file does not abort a long run.

    Attributes:
        paths: Image files, sorted, after `limit`.
        labels: int64 [len(paths)], or None for a flat folder.
        labelled: Whether there are labels.
        num_classes: Number of classes of the model.
        class_names: All class names in the order of the logits, if known from the folders; else None.
        notes: How labels were determined and what was left out, one line each.
        skipped: (file relative to `root`, reason) of each file that could not be decoded in the latest pass.

    Args:
        root: The folder.
        prepare: Maps an image file to float32 [3, H, W], preprocessed for the engine; called from several threads.
        classes: Class names of the model in the order of its logits; None if unknown.
        num_classes: Number of logits.
        strict: Raise on the first file that cannot be decoded.
        need_labels: If False, treat class folders that fit no rule as unlabelled images.
        limit: Use this many files, evenly spaced over the sorted list so that every class is covered.
        workers: Number of decoding threads; None for up to four.

    Raises:
        DataError: if the folder is missing, not a folder, unreadable or without images, the class folders do not match
            the model, or `limit` is below 1.
    """

    def __init__(
        self,
        root: str | Path,
        prepare: Callable[[Path], np.ndarray],
        *,
        classes: Sequence[str] | None,
        num_classes: int,
        strict: bool = False,
        need_labels: bool = True,
        limit: int | None = None,
        workers: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.root = Path(root)
        self.num_classes = num_classes
        self.class_names: tuple[str, ...] | None = None
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._prepare, self._strict, self._progress = prepare, strict, progress
        self._workers = workers or min(4, os.cpu_count() or 1)
        self._warned: set[str] = set()
        self._whole = True
        if classes is not None and len(classes) != num_classes:
            raise DataError(
                f"{len(classes)} class names for a model of {num_classes} classes", expected="one per class"
            )
        if limit is not None and limit < 1:
            raise DataError(f"an image limit of {limit}", expected="1 or more", fix="leave it out to use every image")

        folders, loose, unread = _list(self.root)
        labels: list[int] | None = None
        if unread:
            self._note(_left_out(unread))
        if any(folders.values()):
            label_of = self._label_folders(list(folders), classes, need_labels)
            paths = [path for images in folders.values() for path in images]
            if label_of is not None:
                labels = [label_of[name] for name, images in folders.items() for _ in images]
            if loose:
                self._note(f"{len(loose)} images directly in {self.root} have no class folder and are left out")
        else:
            paths = loose
            self._note(f"{self.root} has no class folders: without labels only agreement and KL are measured")
        if not paths:
            raise DataError(
                f"no image in {self.root} or its folders",
                expected="files ending in " + ", ".join(sorted(readable_suffixes())),
            )
        if limit is not None and limit < len(paths):
            self._note(f"{limit} of the {len(paths)} images in {self.root}, evenly spaced")
            index = [i * len(paths) // limit for i in range(limit)]
            paths = [paths[i] for i in index]
            labels = None if labels is None else [labels[i] for i in index]
        self.paths = paths
        self.labels = None if labels is None else np.asarray(labels, np.int64)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        """Number of files; a pass yields this many images, minus those skipped."""
        return len(self.paths)

    def part(self, rank: int, world: int, batch_size: int) -> ImageFolder:
        """One process's share of the files.

        A share is a run of whole batches, so that batches are the same as in a single pass (unless files are skipped).

        Args:
            rank: Rank of the process, from 0; shares are in the order of ranks.
            world: Number of processes.
            batch_size: Batch size of the pass.

        Returns:
            A folder with its own `skipped`. If it is empty or has no valid file, a pass yields nothing without raising,
            because only all shares together can tell (`rejoin`).

        Raises:
            DataError: if the batch size is below 1.
        """
        _check_batch_size(batch_size)
        batches = -(-len(self) // batch_size)
        # Rounded up, so that the leader, which shows the progress bar, has the largest share.
        start, stop = (batch_size * -(-each * batches // world) for each in (rank, rank + 1))
        share = copy.copy(self)
        share.paths = self.paths[start:stop]
        share.labels = None if self.labels is None else self.labels[start:stop]
        share.skipped, share._whole = [], False
        return share

    def rejoin(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Finish a pass made in shares.

        Args:
            skipped: Files skipped by all shares, in the order of ranks.

        Raises:
            DataError: if no file could be decoded, as in `batches`.
        """
        self.skipped[:] = skipped
        if len(self.skipped) == len(self):
            raise self._none_sound()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterate over the files in order; every batch but the last is full, even if files are skipped.

        Raises:
            DataError: if no file could be decoded, or (strict) any could not, or `prepare` returned arrays of the wrong
                shape or dtype.
        """
        _check_batch_size(batch_size)
        self.skipped.clear()
        decoded = self._decoded(ahead=max(2 * batch_size, self._workers))
        empty = True
        while chunk := list(islice(decoded, batch_size)):
            empty = False
            index = [i for i, _ in chunk]
            yield Batch(
                np.stack([image for _, image in chunk]),
                None if self.labels is None else self.labels[index],
                tuple(self.paths[i] for i in index),
            )
        if empty and self._whole:
            raise self._none_sound()

    def fingerprint(self) -> str:
        """sha256 over the names (relative to `root`) and sizes of the files, in order, as 64 hex digits."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                size = path.stat().st_size
            except OSError:
                size = -1
            digest.update(os.fsencode(path.relative_to(self.root).as_posix()) + b"\0%d\n" % size)
        return digest.hexdigest()

    def _decoded(self, ahead: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, float32 [3, H, W]) of valid images in order, with at most `ahead` decoded in advance."""
        shape: tuple[int, ...] | None = None
        todo = iter(enumerate(self.paths))
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="vp-decode")
        try:
            waiting: deque[tuple[int, Future[np.ndarray]]] = deque()
            while True:
                for i, path in islice(todo, ahead - len(waiting)):
                    waiting.append((i, pool.submit(self._prepare, path)))
                if not waiting:
                    return
                i, future = waiting.popleft()
                # Decoders raise many types on a broken file (OSError, SyntaxError, struct.error, ...).
                try:
                    image = future.result()
                except Exception as error:
                    self._skip(self.paths[i], _reason(error), error)
                    continue
                if shape is None:
                    shape = image.shape
                if image.dtype != np.float32 or image.ndim != 3 or image.shape != shape:
                    want = list(shape) if len(shape) == 3 else "[3, height, width]"
                    raise DataError(
                        f"{self._name(self.paths[i])} was prepared as {image.dtype} {list(image.shape)}",
                        expected=f"float32 {want}, as for every image",
                    )
                if not np.isfinite(image).all():
                    self._skip(self.paths[i], "it holds NaN or infinite values", None)
                    continue
                yield i, image
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _none_sound(self) -> DataError:
        name, reason = self.skipped[0]
        return DataError(
            f"none of the {len(self)} images in {self.root} can be decoded, the first ({name}) because: {reason}",
            fix="point to a folder of sound images",
        )

    def _skip(self, path: Path, reason: str, cause: Exception | None) -> None:
        name, reason = self._name(path), printable(" ".join(reason.split()))
        if self._strict:
            raise DataError(
                f"{name} in {self.root} cannot be decoded: {reason}",
                fix="repair or remove it, or leave out `strict=True` to skip such files",
            ) from cause
        self.skipped.append((name, reason))
        if name not in self._warned:
            self._warned.add(name)
            self._progress.warn(f"skipped {name}: {reason}")

    def _name(self, path: Path) -> str:
        return printable(path.relative_to(self.root).as_posix())

    def _note(self, text: str) -> None:
        self.notes.append(printable(text))
        self._progress.note(printable(text))

    def _label_folders(
        self, names: list[str], classes: Sequence[str] | None, need_labels: bool
    ) -> dict[str, int] | None:
        """Label of each class folder; None if they fit no rule and labels are not needed."""
        try:
            found = label_folders(names, classes, self.num_classes, self.root)
        except DataError as error:
            if need_labels:
                raise
            self._note(f"the images of {self.root} are taken without labels: {error.found}")
            return None
        if found.note:
            self._note(found.note)
        self.class_names = found.names
        return found.label_of


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"a batch size of {batch_size}", expected="1 or more")


def _list(root: Path) -> tuple[dict[str, list[Path]], list[Path], list[Path]]:
    """Sorted images of each class folder of `root`, images directly in `root`, and images that Pillow cannot read here.

    Class folders are sorted; empty ones are included.
    """
    if not root.exists():
        raise DataError(f"no folder {root}", fix="check the path")
    if not root.is_dir():
        raise DataError(f"{root} is a file", expected="a folder of images")
    # Do not follow links to the root or above, nor enter a folder twice for one class.
    above = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    folders: dict[str, list[Path]] = {}
    loose: list[Path] = []
    unread: list[Path] = []
    for entry in _scan(root):
        if _is_folder(entry):
            if _identity(Path(entry.path)) not in above:
                folders[entry.name] = _images_below(Path(entry.path), set(above), unread)
        elif _is_image(entry, unread):
            loose.append(Path(entry.path))
    return dict(sorted(folders.items())), sorted(loose), unread


def _images_below(top: Path, seen: set[tuple[int, int]], unread: list[Path]) -> list[Path]:
    found, todo = [], [top]
    while todo:
        folder = todo.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        for entry in _scan(folder):
            if _is_folder(entry):
                todo.append(Path(entry.path))
            elif _is_image(entry, unread):
                found.append(Path(entry.path))
    return sorted(found)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Entries that are not hidden, sorted, so that the result does not depend on the file system."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        # Ignoring an unreadable class folder would silently change the accuracy.
        raise DataError(
            f"cannot read folder {folder}: {error.strerror or error}", fix="check its permissions"
        ) from error


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _left_out(unread: Sequence[Path]) -> str:
    kinds = sorted({path.suffix.lower() for path in unread})
    heif = "; 'pip install pillow-heif' reads HEIC" if {".heic", ".heif"} & set(kinds) else ""
    return f"{len(unread)} files ending in {', '.join(kinds)} are left out: Pillow does not read them here{heif}"


def _is_image(entry: os.DirEntry[str], unread: list[Path]) -> bool:
    """Whether an entry is a regular file or a broken link (to be counted as skipped); pipes and devices would block."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in readable_suffixes():
        if suffix in IMAGE_SUFFIXES:
            unread.append(Path(entry.path))
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _reason(error: Exception) -> str:
    """Reason why a file could not be decoded; errors other than our own are prefixed by their type."""
    return error.found if isinstance(error, VpError) else f"{type(error).__name__}: {error}"
