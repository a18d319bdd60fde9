"""Compile kernel variants, optionally in several processes, into one folder with an index."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vp_kernels.aot.check import check_index
from vp_kernels.aot.compile import Built, Task, compile_task, prepare_environment
from vp_kernels.aot.index import FORMAT, INDEX, VERSION, AotError, CompileError, canonical


def build(
    tasks: Sequence[Task],
    out: Path,
    *,
    jobs: int = 1,
    force: bool = False,
    progress: Callable[[int, Built], None] = lambda number, built: None,
) -> dict[str, Any]:
    """Compile the tasks and write the folder.

    Args:
        out: Folder to write. It appears in one step, once everything is compiled and verified.
        jobs: Number of processes; 1 compiles in this one.
        force: Replace `out` if it holds an earlier build.
        progress: Called with the number of finished tasks and the latest result.

    Returns:
        The index.

    Raises:
        AotError: or a subclass, see `vp_kernels.aot.index`; `out` is then left unchanged.
    """
    if not tasks:
        raise AotError("no variant is chosen; expected at least one")
    may_write(out, force)
    prepare_environment()
    with _cache(), _sibling(out) as folder:
        entries: list[dict[str, Any]] = []
        sources: dict[str, str] = {}
        tools: dict[str, str] = {}
        for built in _compiled(tasks, jobs):
            for kind, data in (("ptx", built.ptx), ("cubin", built.cubin)):
                named = built.entry[kind]
                _write(folder / named["path"], data)
                named["size"], named["sha256"] = len(data), hashlib.sha256(data).hexdigest()
            for name, digest in built.sources.items():
                if sources.setdefault(name, digest) != digest:
                    raise AotError(f"{name} changed while it was being compiled; expected one state of it: start again")
            tools[str(built.task.sm)] = built.ptxas
            entries.append(built.entry)
            progress(len(entries), built)
        import triton

        entries.sort(key=lambda each: (each["operator"], each["variant"], each["sm"]))
        index = {"format": FORMAT, "version": VERSION, "triton": triton.__version__, "ptxas": tools}
        index |= {"sources": sources, "entries": entries}
        _write(folder / INDEX, canonical(index))
        check_index(folder)  # never hand out a folder that fails its own check
        may_write(out, force)
        _put_in_place(folder, out)
    return index


def may_write(out: Path, force: bool) -> None:
    """Raise an AotError if `out` exists and may not be replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise AotError(f"{out} exists; expected a new name, or `force=True` to replace it")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not (out / INDEX).is_file()):
        raise AotError(f"{out} is no folder of ahead-of-time builds; expected one (or an empty one) with `force=True`")


def _compiled(tasks: Sequence[Task], jobs: int) -> Iterator[Built]:
    """Yield results as they finish; the first failure stops the build."""
    if jobs <= 1 or len(tasks) == 1:
        yield from map(compile_task, tasks)
        return
    # Spawn, not fork: torch and LLVM hold threads. At most `jobs` tasks are submitted at a time, so if a process dies
    # (LLVM aborts on an internal error) there are few suspects.
    waiting = list(tasks)[::-1]
    running: dict[Future[Built], Task] = {}
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.pop()
                    running[pool.submit(compile_task, task)] = task
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    del running[future]
                    yield result
        except BrokenProcessPool:
            names = ", ".join(sorted(map(str, running.values())))
            raise CompileError(f"a compiling process died; it was at one of: {names}") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _cache() -> Iterator[None]:
    """Use a fresh Triton cache for this build, unless the caller has set one, so that no stale kernel is picked up."""
    if os.environ.get("TRITON_CACHE_DIR"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vp-kernels-aot-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]


@contextmanager
def _sibling(out: Path) -> Iterator[Path]:
    """Create a hidden folder beside `out` and remove it afterwards.

    A killed build leaves .NAME.tmp-XXXX behind; it is safe to delete.
    """
    folder = out.absolute().with_name(f".{out.absolute().name}.tmp-{secrets.token_hex(8)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        named = f" ({error.filename})" if error.filename else ""
        raise AotError(f"cannot write {out}: {error.strerror or error}{named}") from None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename the finished folder into place; an existing one is moved aside first and restored if the rename fails."""
    for below, _, _ in os.walk(folder):
        _sync_folder(Path(below))
    out = out.absolute()
    old = folder.with_name(folder.name.replace(".tmp-", ".old-"))
    replaced = os.path.lexists(out)
    if replaced:
        os.rename(out, old)
    try:
        os.rename(folder, out)
    except OSError:
        if replaced:
            os.rename(old, out)
        raise
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
