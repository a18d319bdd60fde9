"""Help, tracebacks on request, and unexpected errors."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from tests.exporter.cli.samples import Inputs, argv, call, check_error, export_options, snapshot
from vp_engines.errors import VpError
from vp_exporter.cli import console, export, inspect, search, validate


@pytest.mark.parametrize(
    "command", [export, inspect, validate, search], ids=["export", "inspect", "validate", "search"]
)
def test_help_tells_the_exit_codes(command: Any) -> None:
    result = call(command.app, "--help")
    assert result.exit_code == 0
    assert re.search(r"Exit codes: 0 \w+,.* 2 ", " ".join(result.stdout.split()))
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "[depth, patches]" in result.stdout or command is not export


@pytest.mark.parametrize("name", ["export", "inspect", "validate", "search", "serve"])
def test_help_does_not_wait_for_torch(name: str) -> None:
    code = (
        f"import sys; from vp_exporter.cli import {name} as command; sys.argv = ['x', '--help']\n"
        "try: command.main()\n"
        "finally: print([m for m in ('torch', 'timm', 'onnx', 'onnxruntime', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [[], ["--model", "x"], ["--batch", "0"], ["--nonsense"]])
def test_usage_errors_exit_2(words: list[str]) -> None:
    result = call(export.app, *words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(inputs: Inputs, tmp_path: Path) -> None:
    words = argv(export_options(inputs, tmp_path / "new.vpe", mean="1,2", debug=True))
    with pytest.raises(VpError, match="--mean is '1,2'"):
        call(export.app, *words)
    code = "from vp_exporter.cli.export import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", "x", "--out", tmp_path / "x.vpe", "--debug"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "no plan is named" in done.stderr


def test_unexpected_error_is_called_a_bug(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("vp_exporter.exporting.export_bundle", fail)
    words = argv(export_options(inputs, tmp_path / "new.vpe", quiet=True))
    check_error(
        call(export.app, *words), 70,
        r"unexpected RuntimeError: first line; this is a bug: run again with --debug and report it",
    )  # fmt: skip
    with pytest.raises(RuntimeError):
        call(export.app, *words, "--debug")


def test_refused_disk_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    assert console.run(fail) == 2
    assert capsys.readouterr().err == (
        "error: /some/file: No space left on device; check the disk and the permissions\n"
    )


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise KeyboardInterrupt

    assert console.run(fail) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was left half-written\n"


def test_messages_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise VpError("the mask has shape [2, 16] [bold]", expected="no\nbreaks")

    assert console.run(fail) == 2
    assert capsys.readouterr().err == "error: the mask has shape [2, 16] [bold]; expected no breaks\n"
    console.ConsoleProgress().warn("[red]a[/]")
    console.ConsoleProgress().note("[red]b[/]")
    assert capsys.readouterr().err == "warning: [red]a[/]\n[red]b[/]\n"


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_reader_that_leaves_early_does_not_change_the_exit_code(exported: Path, flags: list[str]) -> None:
    code = (
        f"from vp_exporter.cli.inspect import main; import sys; sys.argv = ['x', {str(exported)!r}, *{flags}]; main()"
    )
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        done = subprocess.run([sys.executable, "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("ready_engines")
def test_disk_full_while_writing(bundle: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    words = argv(export_options(inputs, bundle, force=True, no_validate=True, quiet=True))
    check_error(
        call(export.app, *words), 2, r"cannot write .*copy.vpe: No space left on device; nothing was left behind"
    )
    assert snapshot(tmp_path) == before


INTERRUPTED = """
import contextlib, signal, sys
from vp_exporter.cli import console

def body():
    progress = console.ConsoleProgress(quiet=True)
    with contextlib.suppress(KeyboardInterrupt):  # what the C code does
        signal.raise_signal(signal.SIGINT)
    with progress.stage("the next step"):
        raise AssertionError("the next step ran")

before = signal.getsignal(signal.SIGINT)  # a background job of a shell starts with the signal ignored
code = console.run(body)
assert signal.getsignal(signal.SIGINT) is before
sys.exit(code)
"""


def test_an_interrupt_that_c_code_dropped_stops_the_next_step() -> None:
    """Exceptions in a callback from C are dropped, but the Ctrl-C must not be lost.

    In a separate process, since libraries in this one may handle the signal themselves.
    """
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert found.returncode == 130, found.stderr
    assert found.stderr == "error: interrupted; nothing was left half-written\n"


def test_scripts_name_what_they_lack(tmp_path: Path) -> None:
    """An install without dependencies has the scripts but not typer."""
    code = "import sys; sys.modules['typer'] = None; import vp_exporter.cli; vp_exporter.cli.vp_inspect()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 3
    assert found.stderr == "error: vp-inspect needs typer, which is not installed; pip install vp-export\n"


def test_help_of_the_search_names_its_own_defaults() -> None:
    """The command must not import the search to show its defaults."""
    from vp_exporter.searching.settings import EXCHANGES, SCHEDULE_IMAGES, SCHEDULES, STATIC_IMAGES, SearchSettings

    hints = get_type_hints(search.search, include_extras=True)
    for name, static, schedules in [("evaluations", EXCHANGES, SCHEDULES), ("images", STATIC_IMAGES, SCHEDULE_IMAGES)]:
        (option,) = hints[name].__metadata__
        assert f"{static} for vpruner, {schedules} for schedules" in option.help
    assert signature(search.search).parameters["tune_steps"].default == SearchSettings(target_macs=0.5).tune_steps


class _InterruptedAsItGoes:
    """Sends Ctrl-C during a finaliser, whose exceptions the interpreter prints and drops."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_finaliser_prints_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.exc_type))

    def body() -> int:
        for error in (KeyboardInterrupt, ValueError):
            _InterruptedAsItGoes(error)
        return 0

    assert console.run(body) == 0
    assert told == [ValueError]


def test_long_work_away_from_a_terminal_says_where_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, so that --json stays clean; not with --quiet; and no longer than the work takes."""
    monkeypatch.setattr(console, "PULSE", 0.05)
    progress = console.ConsoleProgress()
    with progress.stage("building"):
        time.sleep(0.4)
    assert list(progress.track(_slow(3), total=3, description="comparing")) == [0, 1, 2]
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "building ..."
    assert len([line for line in lines if re.fullmatch(r"building: \d+ s so far \.\.\.", line)]) >= 3
    assert any(re.fullmatch(r"comparing: [12] of 3, \d+ s so far \.\.\.", line) for line in lines)
    assert re.fullmatch(r"comparing: \d+\.\d s", lines[-1])
    with pytest.raises(VpError), progress.stage("failing"):
        raise VpError("no")
    with console.ConsoleProgress(quiet=True).stage("building"):
        time.sleep(0.2)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "vp-progress"]


def _slow(count: int) -> Iterator[int]:
    for i in range(count):
        time.sleep(0.2)
        yield i


def test_the_rate_of_these_lines_is_sensible() -> None:
    assert 10 <= console.PULSE <= 30
