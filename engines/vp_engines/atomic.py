"""Put a whole folder in place in one step, or not at all.

It is built as a hidden sibling, `.NAME.tmp-XXXX`, and then renamed, under a lock for its name. Where something is
replaced, the two folders trade names in one step (renameat2 on Linux), so that a crash at any moment leaves the old
one or the new one. File systems without that step get two renames; a crash between them leaves the old folder as
`.NAME.old-XXXX`, and the next write puts it back. What a killed writer left is removed by the next one.
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

LOCK_SECONDS = 60.0  # how long a writer waits for another one of the same name


def check_parent(out: Path) -> None:
    """Whether `out` can be made: the folders above it are there, or can be made with it.

    Raises:
        BundleError: one of them is a file, or is not ours to write to.
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
    """A new hidden sibling of `out` to build in, under the lock of `out`; gone at the end, whatever happens.

    Folders above `out` that are missing are made.
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
    """Make the finished `folder` (from `building`) be `out`, through to the disk; what was there takes a hidden name.

    The files in `folder` must have been fsynced already; its folders are here.
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
    """Device and inode of what `path` leads to, None where that is nothing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`: a hidden file beside it. The kernel lets go of it when the process dies.

    Raises:
        BundleError: another process has held it for LOCK_SECONDS.
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
        os.close(fd)  # held by somebody else, or removed by him between our open and our lock: start again
    try:
        yield
    finally:
        try:
            os.unlink(path)  # still locked, so that nobody can be holding the same file and think it is the lock
        finally:
            os.close(fd)


def _sweep(out: Path) -> None:
    """Remove the siblings of writes that are over. Under the lock there is no live one, so all of them are."""
    name = re.compile(rf"\.{re.escape(out.name)}\.(tmp|old)-[0-9a-f]{{16}}")
    for sibling in sorted(os.listdir(out.parent)):
        if match := name.fullmatch(sibling):
            folder = out.with_name(sibling)
            if match[1] == "old" and not os.path.lexists(out):
                os.rename(folder, out)  # a crash between the two renames of `put_in_place`
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders trade names in one step; False where the system or the file system cannot."""
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
