"""Write a folder atomically: it appears complete or not at all.

A folder is built as a hidden sibling, `.NAME.tmp-XXXX`, and then renamed, under a lock for its name. To replace a
folder, the two are exchanged in one step (renameat2 on Linux), so that a crash at any moment leaves the old one or the
new one. File systems without renameat2 get two renames; a crash between them leaves the old folder as
`.NAME.old-XXXX`, which the next write restores. Leftovers of killed writers are removed by the next write.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vp_engines.errors import BundleError

LOCK_SECONDS = 60.0  # to wait for another writer of the same name


def check_parent(out: Path) -> None:
    """Check that `out` can be created: its parent folders exist or can be made.

    Raises:
        BundleError: if one of them is a file, or is not writable.
    """
    parent = Path(os.path.abspath(out)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not os.path.isdir(parent):
        raise BundleError(f"{parent} is not a folder", expected=f"a folder for {out.name}", fix="choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"the folder {parent} cannot be written to", fix="choose another place")


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """Create a hidden sibling of `out` to build in, under the lock of `out`; removed on exit.

    Missing parent folders of `out` are created.
    """
    folder = out.with_name(f".{out.name}.tmp-{secrets.token_hex(8)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _sweep(out)
            try:
                os.mkdir(folder)
                yield folder
            finally:
                _sweep(out)
    except OSError as error:
        named = f" ({error.filename})" if error.filename else ""
        left = f"a part is left in {folder}" if os.path.lexists(folder) else "nothing was left behind"
        raise BundleError(f"cannot write {out}: {error.strerror or error}{named}; {left}") from None


def put_in_place(folder: Path, out: Path) -> None:
    """Move the finished `folder` (from `building`) to `out` and fsync; an existing `out` is moved to a hidden name.

    The files in `folder` must have been fsynced already; its directories are fsynced here.
    """
    for below, _, _ in os.walk(folder):
        _sync_folder(Path(below))
    if not os.path.lexists(out):
        os.rename(folder, out)
    elif not _exchange(folder, out):
        os.rename(out, out.with_name(f".{out.name}.old-{secrets.token_hex(8)}"))
        os.rename(folder, out)
    _sync_folder(out.parent)


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode that `path` leads to, None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`, a hidden file beside it. The kernel releases it when the process dies.

    Raises:
        BundleError: if another process has held it for LOCK_SECONDS.
    """
    path = out.with_name(f".{out.name}.lock")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if identity(path) == (status.st_dev, status.st_ino):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise BundleError(f"another process is writing {out}", fix="wait for it, or stop it") from None
            time.sleep(0.02)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # lock taken, or its file replaced between open and flock: retry
    try:
        yield
    finally:
        try:
            os.unlink(path)  # unlink before unlocking, or another process could lock the removed file
        finally:
            os.close(fd)


def _sweep(out: Path) -> None:
    """Remove leftovers of other writes. Holding the lock, none of them can be in progress."""
    name = re.compile(rf"\.{re.escape(out.name)}\.(tmp|old)-[0-9a-f]{{16}}")
    for sibling in sorted(os.listdir(out.parent)):
        if match := name.fullmatch(sibling):
            folder = out.with_name(sibling)
            if match[1] == "old" and not os.path.lexists(out):
                os.rename(folder, out)  # left by a crash between the two renames in `put_in_place`
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically; False if the system or file system does not support it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.4
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))
