"""Write files atomically."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: a crash, a full disk or a kill leaves the old file or the new one.

    Writes a hidden sibling `.NAME.HEX.tmp`, fsyncs and renames it; the sibling is removed on failure. Missing parent
    folders are created.

    Raises:
        OSError: if the folder cannot be written.
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
