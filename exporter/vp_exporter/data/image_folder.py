"""Labelled or unlabelled image folders, decoded ahead of use."""

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
    """Images float32 [B, 3, H, W], labels int64 [B] (None: unlabelled), and the B files that they came from."""

    images: np.ndarray
    labels: np.ndarray | None
    paths: tuple[Path, ...]


class ImageFolder:
    """An ImageNet-style folder (one sub-folder per class, images below it at any depth), or a flat folder of images.

    Labels come from the folder names, by the rules of `vp_exporter.data.labels.label_folders`. A flat folder has no
    labels: dense and reduced model can still be compared with each other on it. Hidden files and folders are passed
    over. Images are files of the suffixes that Pillow reads here.

    A file that cannot be decoded is named, skipped and counted, so that one bad download does not cost an hour.

    Attributes:
        paths: the files, sorted, after `limit`.
        labels: int64 [len(paths)], or None for a flat folder.
        labelled: whether there are labels.
        num_classes: classes of the model.
        class_names: all names in the order of the logits, where the folders give them; else None.
        notes: how the labels were found and what was left out, one line each.
        skipped: (file relative to `root`, reason) of each file that the latest pass could not decode.

    Args:
        root: the folder.
        prepare: image file -> float32 [3, H, W], preprocessed as the engine wants it; called from several threads.
        classes: the model's class names in the order of its logits; None where they are unknown.
        num_classes: how many logits the model has.
        strict: raise on the first file that cannot be decoded.
        need_labels: False takes class folders that fit no rule as images without labels.
        limit: take this many files, evenly spaced over the sorted list, so that every class is met.
        workers: decoding threads; None takes up to four.

    Raises:
        DataError: the folder is missing, not a folder, unreadable or holds no image; the class folders do not fit
            the model; `limit` is below 1.
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
        """Files listed; a pass yields as many images, less the skipped ones."""
        return len(self.paths)

    def part(self, rank: int, world: int, batch_size: int) -> ImageFolder:
        """One process's share of the files: a run of whole batches, so that each holds the images that it holds in a
        single pass (as far as none is skipped).

        Args:
            rank: of the process, from 0; the shares follow each other in the order of ranks.
            world: how many processes there are.
            batch_size: of the pass.

        Returns:
            A folder with `skipped` of its own. It may be empty, or hold no sound file: a pass over it then yields
            nothing and raises nothing, because only all shares together can tell (`rejoin`).

        Raises:
            DataError: the batch size is below 1.
        """
        _check_batch_size(batch_size)
        batches = -(-len(self) // batch_size)
        # Rounded up: no share is larger than the leader's, whose progress bar stands for all.
        start, stop = (batch_size * -(-each * batches // world) for each in (rank, rank + 1))
        share = copy.copy(self)
        share.paths = self.paths[start:stop]
        share.labels = None if self.labels is None else self.labels[start:stop]
        share.skipped, share._whole = [], False
        return share

    def rejoin(self, skipped: Sequence[tuple[str, str]]) -> None:
        """End a pass that was made in shares.

        Args:
            skipped: what the shares skipped, in the order of ranks.

        Raises:
            DataError: no file could be decoded, as `batches` has it.
        """
        self.skipped[:] = skipped
        if len(self.skipped) == len(self):
            raise self._none_sound()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """One pass over the files in order; every batch but the last is full, whatever is skipped.

        Raises:
            DataError: no file could be decoded, or (strict) one could not; `prepare` gave arrays that do not fit.
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
        """(index, float32 [3, H, W]) of the sound images in order, with at most `ahead` decoded and not yet taken."""
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
                # Decoders raise nearly anything on a broken file (OSError, SyntaxError, struct.error, ...).
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
        """Label of each class folder; None where they fit no rule and none are needed."""
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
    """Sorted images below each class folder of `root` (folders sorted, empty ones kept), those directly in it, and
    images that Pillow cannot read here."""
    if not root.exists():
        raise DataError(f"no folder {root}", fix="check the path")
    if not root.is_dir():
        raise DataError(f"{root} is a file", expected="a folder of images")
    # Links that lead back to the root or above it are not followed, nor is any folder entered twice for one class.
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
    """The entries that are not hidden, sorted, so that what is found does not hang on the file system's order."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        # Leaving an unreadable class folder out would change the accuracy silently.
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
    """A regular file, or a broken link (so that it is counted as skipped); never a pipe or device, which would hang."""
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
    """Why a file could not be decoded. Our own errors say it in a sentence; others need the name of their kind."""
    return error.found if isinstance(error, VpError) else f"{type(error).__name__}: {error}"
