"""Class names, and the class of each image folder.

Class names come from, in this order: the user, the model's own configuration (`label_names` of a hub or local folder;
ImageNet for timm's pretrained models), the folders of images if their number matches and their order is unambiguous.
`label_folders` determines the class of each folder.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vp_engines.errors import VpError
from vp_exporter.errors import DataError

_SYNSET = re.compile(r"n\d{8}")  # a WordNet noun, as in ImageNet's folder names
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True)
class FolderLabels:
    """The class of each folder.

    Attributes:
        label_of: Folder name -> index of its logit.
        note: How it was determined; "" if not worth a note.
        names: All class names in the order of the logits, if known from the folders.
    """

    label_of: dict[str, int]
    note: str = ""
    names: tuple[str, ...] | None = None


def class_names(given: Sequence[str] | str | os.PathLike[str] | None) -> Sequence[str] | None:
    """Class names as given, or read from a file.

    Raises:
        VpError: as `read_names`.
    """
    return read_names(Path(given)) if isinstance(given, str | os.PathLike) else given


def read_names(path: Path) -> list[str]:
    """Read class names from a file: one per line, or JSON with a list of names, {"0": name} or {name: 0}.

    Raises:
        VpError: if it is unreadable or has no names, or an index is missing or duplicated.
    """
    json_file = path.suffix.lower() == ".json"
    expected, fix = "a JSON list of class names" if json_file else "a class name a line", "check `classes`"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise VpError(f"cannot read {path}: {why}", expected=expected, fix=fix) from error
    if json_file:
        names = _from_json(path, text, expected, fix)
    else:
        names = [line.strip() for line in text.strip().splitlines()]
    for line, name in enumerate(names, 1):
        if not name or any(ord(letter) < 32 for letter in name):
            what = "is empty" if not name else "holds a control character"
            raise VpError(f"name {line} of {path} {what}", expected=expected, fix=fix)
    if not names:
        raise VpError(f"{path} holds no names", expected=expected, fix=fix)
    return names


def _from_json(path: Path, text: str, expected: str, fix: str) -> list[str]:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise VpError(f"cannot read {path}: {error}", expected=expected, fix=fix) from error
    if isinstance(data, dict) and isinstance(data.get("id2label"), dict):  # a configuration of transformers
        data = data["id2label"]
    if isinstance(data, dict):
        pairs = list(data.items())
        if all(type(value) is int for _, value in pairs):  # torchvision's class_to_idx
            pairs = [(str(index), name) for name, index in pairs]
        if sorted(key for key, _ in pairs) != sorted(map(str, range(len(pairs)))):
            raise VpError(f"{path} does not number its names from 0 to {len(pairs) - 1}", expected=expected, fix=fix)
        data = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
        raise VpError(f"{path} holds no list of names", expected=expected, fix=fix)
    return [name.strip() for name in data]


def known_names(vit: Any, num_classes: int, *, pretrained: bool) -> tuple[str, ...] | None:
    """Class names in the configuration of a timm model, or None."""
    config = getattr(vit, "pretrained_cfg", None) or {}
    names = config.get("label_names")
    if names and len(names) == num_classes:
        described = config.get("label_descriptions")
        if all(_SYNSET.fullmatch(str(name)) for name in names) and isinstance(described, dict):
            return tuple(str(described.get(name, name)) for name in names)
        return tuple(map(str, names))
    if pretrained and not config.get("source") and num_classes and num_classes == config.get("num_classes"):
        found = _imagenet(num_classes)
        return None if found is None else tuple(found.label_descriptions())
    return None


def _imagenet(num_classes: int) -> Any:
    """timm's class list of the ImageNet subset with this many classes, or None."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return None if subset is None else ImageNetInfo(subset)


def label_folders(folders: Sequence[str], classes: Sequence[str] | None, num_classes: int, where: Path) -> FolderLabels:
    """Determine the class of each folder of images, by the first of these rules that applies:

    1. The class names are known and include all folders (classes may have no folder): by name. Case, and `_` or `-`
       instead of a space, are ignored if that is unambiguous.
    2. All folders are numbers from 0 to num_classes - 1, with or without leading zeros: by number.
    3. All folders are ImageNet synsets (n01440764), and timm knows a subset of ImageNet with the model's number of
       classes: by timm's list.
    4. There are as many folders as classes, and their order is the same alphabetically (torchvision) and by natural
       sort (timm): in that order.

    Args:
        folders: Names of the folders.
        classes: Class names of the model in the order of its logits; None if unknown.
        num_classes: Number of logits.
        where: Parent folder, for messages.

    Raises:
        DataError: if no rule applies, or only some of the names match.
    """
    folders = sorted(folders)
    strangers: list[str] = []
    if classes is not None:
        found, strangers = _by_name(folders, classes)
        if found is not None:
            return found
        if len(strangers) < len(folders):
            # Only some names match: falling back to order would score a misspelt folder under a wrong class.
            raise DataError(
                f"folders that are no class of the model: {some(strangers)}",
                expected=f"class names such as {some([name for name in classes if name not in folders] or classes)}",
                fix="rename or remove those folders",
            )
    numbers = [int(name) for name in folders if name.isascii() and name.isdigit()]
    if len(set(numbers)) == len(folders) and max(numbers) < num_classes:
        return FolderLabels(
            {name: int(name) for name in folders},
            "folder names are class numbers: folder 0 is class 0, and so on",
        )
    if all(_SYNSET.fullmatch(name) for name in folders) and len(folders) and (info := _imagenet(num_classes)):
        synsets = {name: i for i, name in enumerate(info.label_names())}
        strangers = [name for name in folders if name not in synsets]
        if strangers:
            raise DataError(
                f"folders that are no class of ImageNet's {num_classes}: {some(strangers)}",
                expected=f"synsets such as {some(list(synsets))}",
                fix="rename or remove those folders, or name the classes with `classes=FILE`",
            )
        return FolderLabels(
            {name: synsets[name] for name in folders},
            f"folder names are synsets: labels follow ImageNet's {num_classes} classes",
            tuple(info.label_descriptions()),
        )
    if len(folders) != num_classes:
        named = "" if classes is None else f"folders named like the model's classes ({some(classes)}), or "
        split = next((name for name in folders if name.lower() in _SPLITS), None)
        raise DataError(
            f"{len(folders)} class folders in {where} ({some(folders)})",
            expected=f"{named}exactly {num_classes} folders, one per class",
            fix=f"these look like the parts of a data set: name {where / split}"
            if split
            else "point to a folder laid out so, name the classes with `classes=FILE`, or point to a flat folder of "
            "images to validate without labels",
        )
    natural = sorted(folders, key=_natural)
    if natural != folders:
        at = next(i for i, (a, b) in enumerate(zip(folders, natural, strict=True)) if a != b)
        raise DataError(
            f"the folders of {where} sort in two ways: class {at} is {folders[at]!r} by text, as torchvision sorts, "
            f"and {natural[at]!r} by its number, as timm does",
            expected="class names, to go by them",
            fix="give `classes=FILE`, a name a line in the order of the logits",
        )
    numbered = all(name.isascii() and name.isdigit() for name in folders)
    return FolderLabels(
        {name: i for i, name in enumerate(folders)},
        f"labels follow the sorted order of the folder names: {folders[0]!r} is class 0",
        None if numbered or classes is not None else tuple(folders),
    )


def _by_name(folders: Sequence[str], classes: Sequence[str]) -> tuple[FolderLabels | None, list[str]]:
    """Labels by name, or the folders that match no class."""
    exact = {name: i for i, name in enumerate(classes)}
    strangers = [name for name in folders if name not in exact]
    if not strangers:
        counts = Counter(classes)
        repeated = [name for name in folders if counts[name] > 1]
        if repeated:
            raise DataError(
                f"the model has more than one class named {repeated[0]!r}",
                fix="rename the folders so that their sorted order is the order of the classes",
            )
        return FolderLabels({name: exact[name] for name in folders}), []
    plain = {_plain(name): i for i, name in enumerate(classes)}
    alike = {name: plain[_plain(name)] for name in folders if _plain(name) in plain}
    if len(plain) == len(classes) and len(set(alike.values())) == len(folders):
        return FolderLabels(alike, f"folder names are class names but for their spelling, as {strangers[0]!r}"), []
    return None, strangers


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key of timm's readers for class folders: case-insensitive natural sort."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few names, quoted, for a message."""
    return printable(", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else ""))


def printable(text: str) -> str:
    """Make file names printable: they may contain bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
