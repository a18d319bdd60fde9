"""Processes that die, are stopped or run out of disk leave the old bundle or the new one, never a part."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vp_exporter.exporting as package
from tests.exporter.cli.samples import Inputs, argv, call, export_options
from tests.waiting import LONG
from tests.warm import Started
from vp_engines.backends.base import BuildResult
from vp_engines.backends.ort import OnnxRuntimeBackend
from vp_engines.bundle import verify_bundle
from vp_exporter.cli.export import app, main

SCRIPT = Path(sys.executable).with_name("vp-export")


def killed(engines: Path, doomed: int, words: list[str]) -> None:
    """vp-export that dies at one fsync while writing the bundle, with ready-made engines (see `ready_engines`)."""

    def build(self: OnnxRuntimeBackend, source: object, folder: Path, options: object) -> BuildResult:
        shutil.copytree(engines / folder.name, folder, dirs_exist_ok=True)
        return BuildResult("model.onnx", ("model.onnx",), {})

    count, fsync = 0, os.fsync

    def dying(fd: int) -> None:
        nonlocal count
        count += 1
        if count == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    package._lower = lambda *args: None  # type: ignore[assignment]
    OnnxRuntimeBackend.build = build  # type: ignore[assignment,method-assign]
    os.fsync = dying  # type: ignore[assignment]
    sys.argv[1:] = words
    main()


def check_nothing_left(folder: Path) -> None:
    """Check that only the temporary folder is left, without our files (torch and ONNX Runtime keep caches there)."""
    assert [path.name for path in folder.iterdir()] == ["tmp"]
    assert list((folder / "tmp").glob("vp-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("nth", "old"), [(1, False), (5, False), (3, True), (8, True)])
@pytest.mark.usefixtures("ready_engines")
def test_killed_while_writing(
    nth: int, old: bool, exported: Path, bundle: Path, inputs: Inputs, tmp_path: Path
) -> None:
    if not old:
        bundle = tmp_path / "new.vpe"
    before = verify_bundle(bundle).digest if old else None
    words = argv(export_options(inputs, bundle, force=True, no_validate=True, quiet=True))
    done = Started(killed, exported, nth, words).communicate()
    assert done.returncode == -signal.SIGKILL, done.stderr
    if old or bundle.exists():
        digest = verify_bundle(bundle).digest
        assert nth == 8 or digest == before  # the last fsync comes after the new bundle is in place
    assert call(app, *words).exit_code == 0
    assert verify_bundle(bundle).digest != before
    left = {path.name for path in tmp_path.iterdir()} - {"copy.vpe"}
    assert left == (set() if old else {"new.vpe"})


@pytest.mark.slow
def test_file_size_limit(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [SCRIPT, *argv(export_options(inputs, tmp_path / "new.vpe", no_validate=True, quiet=True))],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={"TMPDIR": str(tmp_path / "tmp"), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    check_nothing_left(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_full_disk(inputs: Inputs, tmp_path: Path) -> None:
    """A real full file system, if one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        result = call(app, *argv(export_options(inputs, disk / "new.vpe", no_validate=True, quiet=True)))
        assert result.exit_code == 2
        assert result.stderr.startswith("error: cannot write ")
        assert "No space left on device" in result.stderr
        assert result.stderr.count("\n") == 1
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_interrupted_while_building(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    words = argv(export_options(inputs, tmp_path / "new.vpe"))
    with subprocess.Popen(
        [SCRIPT, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(tmp_path / "tmp"), "PATH": "/usr/bin:/bin"},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("lowering the reduced model"):
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(LONG) == 130
    assert rest.splitlines()[-1] == "error: interrupted; nothing was left half-written"
    assert "Traceback" not in rest
    check_nothing_left(tmp_path)
