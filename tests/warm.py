"""Python processes forked from one that has already imported torch and timm, which takes seconds."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.waiting import LONG

# No module that is run as a program: Python warns if it has been imported before.
IMPORTED = ("torch", "timm", "torchvision.transforms", "onnxscript", "torch.onnx._internal.exporter._core")


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "vp_exporter.exporting", "vp_exporter.searching.pipeline"])
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it on import
    try:
        forkserver.ensure_running()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    return context


class Started:
    """A process that runs a function; its output goes to files."""

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._arguments = arguments
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        given = dict(os.environ if env is None else env)
        self._process = _context().Process(
            target=_begin, args=(function, arguments, given, str(cwd or os.getcwd()), *map(str, self._files))
        )
        self._process.start()

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def communicate(self, timeout: float = LONG) -> subprocess.CompletedProcess[str]:
        """Exit code and output; a process that takes longer than `timeout` seconds is killed."""
        self._process.join(timeout)
        try:
            if not self.ended():
                raise subprocess.TimeoutExpired([str(each) for each in self._arguments], timeout)
            out, err = (path.read_text() if path.exists() else "" for path in self._files)
            assert self._process.exitcode is not None
            return subprocess.CompletedProcess(self._arguments, self._process.exitcode, out, err)
        finally:
            self._process.kill()
            self._process.join()
            self._folder.cleanup()


def start(
    words: Sequence[str | Path],
    *,
    given: str = "",
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Started:
    """Start `python WORDS`: a script, a module after -m, or code after -c; `given` is its input.

    Kernels are compiled in it, regardless of TRITON_INTERPRET in `env`.
    """
    return Started(_python, given, *map(str, words), env=env, cwd=cwd)


def run(words: Sequence[str | Path], **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Start a process as `start` does, and wait for it to end."""
    return start(words, **arguments).communicate()


def _begin(
    function: Callable[..., object], arguments: Sequence[Any], env: dict[str, str], cwd: str, out: str, err: str
) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _python(given: str, *words: str) -> None:
    sys.stdin = io.StringIO(given)
    sys.path[:0] = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if words[0] in ("-m", "-c"):
        sys.path.insert(0, os.getcwd())
        sys.argv = list(words[1:])
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = list(words)
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv[0] = "-c"
        exec(compile(words[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")
