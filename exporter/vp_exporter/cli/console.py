"""Shared by all commands: progress on the terminal, one-line errors and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from vp_engines import command_line
from vp_engines.errors import VpError
from vp_engines.extras import missing_package

# Options whose name differs from the argument's.
_OPTIONS = {
    "args": "--model-arg",
    "batch_sizes": "--batch",
    "use_ema=False": "--no-ema",
}
_ARGUMENT_OF = re.compile(r"(method|model) argument `([^`]+)`")
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
EXIT_BUG = 70  # EX_SOFTWARE
PULSE = 20.0  # seconds between lines about long work in a log
T = TypeVar("T")


class _Console(Console):
    """Discards output after a broken pipe (`vp-export ... | head`), so that the exit code is still the verdict's."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


stdout = _Console(highlight=False)
stderr = _Console(stderr=True, highlight=False)


class ConsoleProgress:
    """Shows bars and spinners on a terminal, plain lines elsewhere. Always on stderr, to keep the JSON on stdout clean.

    Args:
        quiet: Show only warnings.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = stderr.is_terminal and not quiet

    @contextlib.contextmanager
    def stage(self, description: str) -> Iterator[None]:
        _stop_if_interrupted()
        start = time.perf_counter()
        if self._live:
            with self._bars(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bars:
                bars.add_task(escape(description), total=None)
                yield
        else:
            self._say(f"{description} ...")  # a log also shows when a long step starts
            with self._pulse(description):
                yield
        _stop_if_interrupted()
        self._say(f"{description}: {time.perf_counter() - start:.1f} s")

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        start = time.perf_counter()
        if self._live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with self._bars(*columns) as bars:
                task = bars.add_task(escape(description), total=total)
                for item in items:
                    yield item
                    _stop_if_interrupted()
                    bars.advance(task)
        else:
            self._say(f"{description} ...")
            done = 0
            with self._pulse(description, lambda: f"{done} of {total}, "):
                for item in items:
                    yield item
                    _stop_if_interrupted()
                    done += 1
        self._say(f"{description}: {time.perf_counter() - start:.1f} s")

    def note(self, text: str) -> None:
        self._say(in_options(text))

    def warn(self, text: str) -> None:
        stderr.print(f"[yellow]warning:[/] {escape(in_options(text))}", soft_wrap=True)

    @contextlib.contextmanager
    def _pulse(self, description: str, where: Callable[[], str] = str) -> Iterator[None]:
        """Print a line every `PULSE` seconds while the block runs."""
        if self._quiet:
            yield
            return
        start, over = time.perf_counter(), threading.Event()

        def tell() -> None:
            while not over.wait(PULSE):
                self._say(f"{description}: {where()}{time.perf_counter() - start:.0f} s so far ...")

        teller = threading.Thread(target=tell, name="vp-progress", daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def _bars(self, *columns: Any) -> RichProgress:
        return RichProgress(*columns, console=stderr, transient=True)

    def _say(self, text: str) -> None:
        if not self._quiet:
            stderr.print(escape(text), soft_wrap=True)


def print_json(data: Any) -> None:
    """Print a JSON document to stdout."""
    try:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        stdout.on_broken_pipe()


def main(app: typer.Typer) -> NoReturn:
    """Run a command-line app and exit. A usage error is printed as one line, like any other error."""
    # Pillow's decompression bomb warning: we raise an error for such images.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a Click exception; typer vendors those, so no isinstance
            raise
        text = error.format_message().rstrip(".")
        _fail(f"{text}; --help lists the options")
        sys.exit(VpError.exit_code)


def show_version(wanted: bool) -> None:
    """Callback of --version."""
    if wanted:
        import vp_engines

        stdout.print(f"vp-export {vp_engines.__version__}")
        raise typer.Exit


def run(command: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command's body and return its exit code. Errors are printed as one line on stderr.

    0: good, 1: budget missed, 2: bad input, 3: engine unavailable, 70: bug, 130: Ctrl-C.
    """
    try:
        with _noting_interrupts():
            return command()
    except VpError as error:
        if debug:
            raise
        _fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left half-written")
        return EXIT_INTERRUPTED
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}; check the disk and the permissions")
        return VpError.exit_code
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ImportError) and (missing := missing_package(error)) is not None:
            _fail(str(missing))
            return missing.exit_code
        first = (str(error).splitlines() or [""])[0]
        _fail(f"unexpected {type(error).__name__}: {first}; this is a bug: run again with --debug and report it")
        return EXIT_BUG


_interrupts: list[int] = []


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[None]:
    """Record Ctrl-C. Python drops a KeyboardInterrupt raised in a callback from C code (common while torch traces a
    model), so the next progress step raises it again (`_stop_if_interrupted`)."""

    def note(number: int, frame: object) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        # In callbacks of weak references and finalisers, Python would print a traceback. The interrupt is recorded, and
        # reported as one line.
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    _interrupts.clear()
    before, hook = signal.signal(signal.SIGINT, note), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        _interrupts.clear()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def _stop_if_interrupted() -> None:
    if _interrupts:
        raise KeyboardInterrupt


def in_options(text: str) -> str:
    """Replace argument names in a message of the library by the options of the command line."""
    return command_line.in_options(_ARGUMENT_OF.sub(r"--\1-arg \2", text), _OPTIONS)


def _fail(text: str) -> None:
    stderr.print(f"[red]error:[/] {escape(in_options(' '.join(text.split())))}", soft_wrap=True)
