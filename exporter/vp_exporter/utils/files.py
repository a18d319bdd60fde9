"""Write one file so that a crash, a full disk or a kill leaves the old one or the new one, never half of it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` a file of these bytes, through to the disk.

    Written as a hidden sibling `.NAME.HEX.tmp`, fsynced and renamed; the sibling goes where that fails. Folders above
    `path` that are missing are made.

    Raises:
        OSError: the folder cannot be written; callers say it in their own words.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
