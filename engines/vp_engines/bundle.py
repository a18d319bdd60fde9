"""Read a bundle, verifying every file, and write one atomically.

Reading trusts nothing. The folder must hold exactly the files that the manifest lists, as regular files (no symlinks or
devices), each of the given size and sha256. Files are opened relative to the bundle's directory descriptor without
following links, and the bytes returned are those that were hashed, so swapping a file after the check has no effect.
Hard links are accepted: uv, `cp -al` and Nix store trees create them, and since the content must match the hash, a
link to an outside file reveals nothing.

Writing goes through `atomic`: a crash at any moment leaves the old bundle or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vp_engines.atomic import building, check_parent, identity, put_in_place
from vp_engines.errors import BundleCorruptError, BundleError, BundleIncompatibleError
from vp_engines.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_PATH_PARTS,
    FileEntry,
    Manifest,
    check_path,
    make_manifest,
    parse_manifest,
    utc_now,
)
from vp_engines.version import installed_version

CHUNK = 1 << 18  # bytes per read: small enough to be hashed while in cache

_OPEN_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: opening a FIFO must not hang
_OPEN_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_AGAIN = "copy or export the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        manifest: The manifest.
        contents: Path inside the bundle -> content, for the requested files.
        path: Folder that it was read from.
        digest: sha256 (hex) of the canonical manifest; identifies the whole bundle.
    """

    manifest: Manifest
    contents: dict[str, bytes] = field(repr=False)
    path: Path
    digest: str


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest alone. The files that it lists are NOT checked (see `verify_bundle`).

    Raises:
        BundleError: if there is no bundle, or its manifest is corrupt or of another major version.

    Examples:
        >>> import vp_engines
        >>> manifest = vp_engines.read_manifest("tiny.vpe")
        >>> manifest.model.name, manifest.plan.method, manifest.engine.name
        ('vit_tiny_patch16_224', 'grid', 'ort')
    """
    with _opened(Path(path)) as root:
        return _read_manifest(root)[0]


def verify_bundle(path: str | Path) -> Bundle:
    """Verify every file without keeping any.

    Raises:
        BundleError: if there is no bundle, or it cannot be read.
        BundleCorruptError: if a file is missing, extra, altered or unsafe; names the file.
        BundleIncompatibleError: if the format has another major version.

    Examples:
        >>> import vp_engines
        >>> bundle = vp_engines.verify_bundle("tiny.vpe")
        >>> len(bundle.digest), "plan.json" in {file.path for file in bundle.manifest.files}
        (64, True)
    """
    return read_bundle(path, keep=lambda name: False)


def read_bundle(path: str | Path, keep: Callable[[str], bool] = lambda name: True) -> Bundle:
    """Verify every file of a bundle and return the contents of those requested.

    Args:
        keep: Given a path inside the bundle, whether to return its content; other files are only hashed.

    Raises:
        BundleError: if there is no bundle, or it cannot be read.
        BundleCorruptError: if a file is missing, extra, altered or unsafe; names the file.
        BundleIncompatibleError: if the format has another major version.
    """
    path = Path(path)
    while True:
        before = identity(path)
        try:
            return _read_once(path, keep)
        except BundleError:
            # An export may have replaced the bundle while it was being read.
            if identity(path) == before:
                raise


def _read_once(path: Path, keep: Callable[[str], bool]) -> Bundle:
    with _opened(path) as root:
        manifest, digest = _read_manifest(root)
        _check_closed_world(root, manifest)

        def read(entry: FileEntry) -> bytes | None:
            return _read_file(root, entry, keep(entry.path))

        # The two big files are the engine and its dense counterpart. Hashing releases the GIL, so both cores work.
        entries = sorted(manifest.files, key=lambda entry: -entry.size)
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1, len(entries))) as pool:
            results = list(pool.map(read, entries))
    contents = {entry.path: data for entry, data in zip(entries, results, strict=True) if data is not None}
    return Bundle(manifest, contents, path, digest)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open the bundle's folder; turns an OSError while reading below it into a BundleError."""
    root = _open_root(path)
    try:
        yield root
    except OSError as error:
        raise BundleError(f"cannot read the bundle {path}: {error.strerror or error}") from None
    finally:
        os.close(root)


def _open_root(path: Path) -> int:
    try:
        # The path of the bundle itself may be a link, since the user chose it.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except FileNotFoundError:
        problem = "is not there"
    except NotADirectoryError:
        problem = "is not a folder"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = f"cannot be opened ({getattr(error, 'strerror', error)})"
    raise BundleError(f"'{path}' {problem}", expected="the folder of a bundle (NAME.vpe)")


def _corrupt(problem: str, expected: str = "") -> BundleCorruptError:
    return BundleCorruptError(problem, expected=expected, fix=_AGAIN)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def _open_inside(root: int, path: str) -> Iterator[IO[bytes]]:
    """Open a regular file at a checked path inside the bundle, without following links."""
    *folders, name = path.split("/")
    here = os.dup(root)
    try:
        for folder in folders:
            parent, here = here, os.open(folder, _OPEN_FOLDER, dir_fd=here)
            os.close(parent)
        fd = os.open(name, _OPEN_FILE, dir_fd=here)
    except FileNotFoundError:
        raise _corrupt(f"'{path}' is missing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EMLINK):
            raise _corrupt(f"'{path}' or a folder on its way is a link or no plain file") from None
        raise
    finally:
        os.close(here)
    with os.fdopen(fd, "rb", buffering=0) as file:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise _corrupt(f"'{path}' is {_kind(mode)}", expected="a plain file")
        yield file


def _read_manifest(root: int) -> tuple[Manifest, str]:
    if not any(name == MANIFEST_NAME for name in os.listdir(root)):
        raise BundleCorruptError(
            f"{MANIFEST_NAME} is missing: this folder is not a bundle, or not a whole one",
            expected="a folder that vp-export wrote",
            fix="check the path, or export again",
        )
    with _open_inside(root, MANIFEST_NAME) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MANIFEST_BYTES:
            raise _corrupt(f"{MANIFEST_NAME} is {size} bytes long", expected=f"at most {MAX_MANIFEST_BYTES}")
        return parse_manifest(_read_all(file, size))


def _read_all(file: IO[bytes], size: int) -> bytes:
    """Read `size` bytes, or fewer at the end of the file."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):  # one read() returns at most 2 GiB
        data += more
    return data


def _chunks(file: IO[bytes], size: int) -> Iterator[memoryview]:
    """Read up to `size` bytes in chunks; each chunk is overwritten by the next."""
    buffer = memoryview(bytearray(CHUNK))
    while size > 0 and (count := file.readinto(buffer[: min(size, CHUNK)])):  # type: ignore[attr-defined]
        size -= count
        yield buffer[:count]


def _check_closed_world(root: int, manifest: Manifest) -> None:
    """Check that the folder holds exactly the files that the manifest lists, by name and file type."""
    expected = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    folders = {path.rsplit("/", cut)[0] for path in expected for cut in range(1, path.count("/") + 1)}
    found, problems = set(), []
    for path, mode in _walk(root, ""):
        found.add(path)
        if stat.S_ISDIR(mode):
            wanted, right = folders, True
        else:
            wanted, right = expected, stat.S_ISREG(mode)
        if not right:
            problems.append(f"{path!r} is {_kind(mode)}")
        elif path not in wanted:
            problems.append(f"{path!r} is not in the manifest")
    problems += [f"{path!r} is missing" for path in sorted((expected | folders) - found)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise _corrupt(", ".join(problems[:5]) + more, expected="exactly the files that the manifest lists")


def _walk(folder: int, prefix: str) -> Iterator[tuple[str, int]]:
    """Path and mode of everything below, bounded in number, without following links."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            if count > 2 * MAX_FILES or prefix.count("/") > MAX_PATH_PARTS:
                raise _corrupt(f"{prefix or 'the bundle'!r} holds too much", expected=f"at most {MAX_FILES} files")
            mode = entry.stat(follow_symlinks=False).st_mode
            yield prefix + entry.name, mode
            if stat.S_ISDIR(mode):
                below = os.open(entry.name, _OPEN_FOLDER, dir_fd=folder)
                try:
                    yield from _walk(below, f"{prefix}{entry.name}/")
                finally:
                    os.close(below)


def _read_file(root: int, entry: FileEntry, keep: bool) -> bytes | None:
    """Check one file; returns its content if `keep`, else None."""
    with _open_inside(root, entry.path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:  # before reading, so that a huge file costs nothing
            raise _corrupt(f"'{entry.path}' has {size} bytes", expected=f"{entry.size}")
        content = _read_all(file, size) if keep else None
        hasher = hashlib.sha256()
        for chunk in _chunks(file, size) if content is None else (content,):
            hasher.update(chunk)
    if hasher.hexdigest() != entry.sha256:
        raise _corrupt(f"'{entry.path}' has sha256 {hasher.hexdigest()[:16]}...", expected=f"{entry.sha256[:16]}...")
    return content


def check_target(out: str | Path, *, force: bool = False) -> None:
    """Check that a bundle can be written to `out`. Call it before a long build.

    Raises:
        BundleError: if `out` exists and `force` is not set, exists but is not a bundle, or its parent is not usable.
    """
    out = _absolute(out)
    check_parent(out)
    if not os.path.lexists(out):
        return
    if not force:
        raise BundleError(f"{out} is already there", fix="choose another name, or pass `force=True` to replace it")
    if out.is_symlink() or not _looks_like_bundle(out):
        # force=True replaces a bundle, valid or broken, but never removes any other folder.
        raise BundleError(f"{out} is not a bundle", fix="remove it yourself or choose another name")


def write_bundle(out: str | Path, *, files: Mapping[str, Path | bytes], force: bool = False, **fields: Any) -> Manifest:
    """Write a bundle atomically.

    Args:
        out: Folder of the bundle; missing parent folders are created.
        files: Path inside the bundle -> content, or the file to copy it from.
        force: Replace an existing bundle.
        fields: Fields of Manifest, as models or as plain dicts and lists, except `files` and the format; `created` and
            `tool` default to now and this package.

    Returns:
        The manifest.

    Raises:
        BundleError: if a field or path is invalid, `out` exists, or writing fails; nothing is left behind.
    """
    out = _absolute(out)
    check_target(out, force=force)
    fields = {"created": utc_now(), "tool": {"name": "vp-export", "version": installed_version()}, **fields}
    with building(out) as folder:
        check_target(out, force=force)  # again, now under the lock: another export may have finished
        entries = [_store(folder, path, source) for path, source in sorted(files.items())]
        manifest = make_manifest(files=entries, **fields)
        _commit(folder, manifest, out)
    return manifest


def update_bundle(
    path: str | Path, *, files: Mapping[str, Path | bytes | None], out: str | Path | None = None, **changes: Any
) -> Manifest:
    """Rewrite a bundle with some files and fields changed; the others are verified and copied.

    Args:
        out: Where to write a changed copy, leaving the bundle as it is; None changes the bundle itself.
        files: Path inside the bundle -> new content, or the file to copy it from; None removes the file.
        changes: New values of fields of Manifest.

    Returns:
        The new manifest.

    Raises:
        BundleError: as `read_bundle` and `write_bundle`; the bundle is then unchanged.
    """
    source = Path(os.path.realpath(path))  # change the folder that a link points to, not the link
    if out is not None:
        check_target(out)
    out = source if out is None else _absolute(out)
    with building(out) as folder:
        root = _open_root(source)
        try:
            old, _ = _read_manifest(root)
            if old.format_version != FORMAT_VERSION:
                raise BundleIncompatibleError(
                    f"{source} has format version {old.format_version}, which this version can run but not rewrite",
                    expected=FORMAT_VERSION,
                    fix="upgrade with 'pip install -U vp-export'",
                )
            _check_closed_world(root, old)
            entries = [_store(folder, name, source) for name, source in files.items() if source is not None]
            for entry in old.files:
                if entry.path not in files:
                    with _open_inside(root, entry.path) as file:
                        same_size = os.fstat(file.fileno()).st_size == entry.size
                        if not same_size or _store(folder, entry.path, file) != entry:
                            raise _corrupt(f"'{entry.path}' is not what the manifest says")
                    entries.append(entry)
        finally:
            os.close(root)
        fields = {name: getattr(old, name) for name in Manifest.model_fields}
        fields |= {"files": sorted(entries, key=lambda entry: entry.path), **changes}
        manifest = make_manifest(**fields)
        _commit(folder, manifest, out)
    return manifest


def _absolute(out: str | Path) -> Path:
    return Path(os.path.abspath(out))


def _looks_like_bundle(folder: Path) -> bool:
    try:
        with open(folder / MANIFEST_NAME, "rb") as file:
            return re.search(rb'"format"\s*:\s*"vpe"', file.read(MAX_MANIFEST_BYTES)) is not None
    except OSError:
        return False


def _store(folder: Path, path: str, source: Path | bytes | IO[bytes]) -> FileEntry:
    """Write one file into `folder` and fsync it."""
    try:
        target = folder / check_path(path)
    except ValueError as error:
        raise BundleError(str(error)) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if isinstance(source, Path):
            source = stack.enter_context(open(source, "rb", buffering=0))
        hasher, size = hashlib.sha256(), 0
        with open(target, "xb") as file:
            for piece in (source,) if isinstance(source, bytes) else _chunks(source, MAX_FILE_BYTES + 1):
                file.write(piece)
                hasher.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
    if size > MAX_FILE_BYTES:
        raise BundleError(f"'{path}' is too large", expected=f"at most {MAX_FILE_BYTES} bytes")
    return FileEntry(path=path, size=size, sha256=hasher.hexdigest())


def _commit(folder: Path, manifest: Manifest, out: Path) -> None:
    """Add the manifest to the finished `folder` and move it to `out`; an old bundle is moved to a hidden name."""
    _store(folder, MANIFEST_NAME, manifest.to_bytes())
    put_in_place(folder, out)
