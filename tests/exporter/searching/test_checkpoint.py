"""Checkpoints of killed searches are complete, exact and not mixed up with others."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exporter.tiny import tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.searching import checkpoint as module
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.checkpoint import Checkpoint, write_atomically
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.scoring import Scorer
from vp_exporter.utils.distributed import Workers

IDENTITY = {"model": "tiny", "weights": "ab12", "settings": {"budget": 0.5, "seeds": [0, 1]}}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never() -> np.ndarray:
    raise AssertionError("it was stored")


def test_everything_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "checkpoint"
    rng = np.random.default_rng(0)
    rows = {f"plan/{i}": torch.randn(3, 5).tolist() for i in range(4)}
    arrays = {
        "fisher": rng.normal(size=(2, 3)),
        "life": np.arange(5),
        "mask": rng.random((2, 4)) > 0.5,
        "one": np.array(3.5),
    }
    first = Checkpoint(folder, IDENTITY)
    first.memo.update(rows)
    for name, array in arrays.items():
        assert first.array(name, lambda array=array: array) is array
    tensor = torch.randn(2, 3, 4).half().transpose(0, 1)
    first.array("tensor", lambda: tensor)
    assert first.value("best", lambda: {"loss": 0.1, "pair": (1, 2)}) == {"loss": 0.1, "pair": [1, 2]}
    assert first.value("none", lambda: None) is None
    first.flush(force=True)

    second = Checkpoint(folder, json.loads(json.dumps(IDENTITY)))
    assert dict(second.memo) == rows
    assert "plan/2" in second.memo
    assert "plan/9" not in second.memo
    for name, array in arrays.items():
        again = second.array(name, never)
        assert isinstance(again, np.ndarray)
        assert (again.dtype, again.shape) == (array.dtype, array.shape)
        assert np.array_equal(again, array)
    stored = second.array("tensor", never)
    assert stored.dtype == torch.float16
    assert torch.equal(stored, tensor)
    assert second.value("best", never) == {"loss": 0.1, "pair": [1, 2]}
    assert second.value("none", never) is None
    second.remove()
    assert not folder.exists()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_floats_are_exact(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    number = st.floats(width=width, allow_nan=False)  # type: ignore[arg-type]
    columns = data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.lists(number, min_size=columns, max_size=columns), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        first = Checkpoint(Path(folder), IDENTITY)
        first.memo["plan/0"] = rows
        assert repr(first.memo["plan/0"]) == repr(rows)  # repr distinguishes -0.0 from 0.0
        first.flush(force=True)
        assert first.value("rows", lambda: rows) == rows
        second = Checkpoint(Path(folder), IDENTITY)
        assert repr(second.memo["plan/0"]) == repr(rows)
        assert repr(second.value("rows", never)) == repr(rows)


def test_writes_only_now_and_then_and_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    first = Checkpoint(tmp_path, IDENTITY)
    first.memo["a"] = [[1.0]]
    now[0] += module.FLUSH_SECONDS - 0.1
    first.memo["b"] = [[2.0]]
    assert files(tmp_path) == ["identity.json"]
    now[0] += 0.2
    first.memo["c"] = [[3.0]]
    assert files(tmp_path) == ["clock.json", "identity.json", "memo-000001.safetensors"]
    first.memo["d"] = [[4.0]]
    assert set(Checkpoint(tmp_path, IDENTITY).memo) == {"a", "b", "c"}
    first.flush(force=True)
    assert set(module._read_memo(tmp_path / "memo-000002.safetensors")) == {"d"}
    second = Checkpoint(tmp_path, IDENTITY)
    assert set(second.memo) == {"a", "b", "c", "d"}
    assert second.elapsed == pytest.approx(module.FLUSH_SECONDS + 0.1)
    now[0] += 7
    second.memo["a"] = [[5.0]]
    second.flush(force=True)
    third = Checkpoint(tmp_path, IDENTITY)
    assert third.memo["a"] == [[5.0]]
    assert third.elapsed == pytest.approx(module.FLUSH_SECONDS + 7.1)


def test_without_a_folder_all_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Checkpoint(None, IDENTITY)
    kept.memo["a"] = [[1.0]]
    kept.flush(force=True)
    made: list[int] = []
    for _ in range(2):
        assert kept.value("v", lambda: made.append(1) or (1,)) == [1]  # type: ignore[func-returns-value]
        assert kept.array("v", lambda: made.append(2) or np.ones(2)).sum() == 2  # type: ignore[func-returns-value]
    assert made == [1, 2]
    assert kept.elapsed == 0
    kept.remove()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "cd34"}, 'weights was "ab12" and is "cd34"'),
        ({"settings": {"budget": 0.5, "seeds": [0, 2]}}, "settings.seeds was [0, 1] and is [0, 2]"),
        ({"settings": {"budget": 0.5}}, "settings.seeds was [0, 1] and is not set"),
        ({"extra": 1}, "extra was not set and is 1"),
        ({"weights": None}, 'weights was "ab12" and is null'),
        ({"weights": 1, "model": "x" * 500}, 'model was "tiny" and is "xxx'),
    ],
)
def test_another_search_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    Checkpoint(tmp_path, IDENTITY).flush(force=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SearchError) as caught:
        Checkpoint(tmp_path, {**IDENTITY, **change})
    message = str(caught.value)
    assert words in message
    assert "expected the same search; remove the folder, or choose another `out`" in message
    assert len(message) < 500
    assert "\n" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_partly_written_file_is_swept_away(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path, IDENTITY)
    first.memo["a"] = [[1.0]]
    first.flush(force=True)
    (tmp_path / f".memo-000002.safetensors.{'0a' * 8}.tmp").write_bytes(b"\x40\0\0")
    (tmp_path / f".identity.json.{'1b' * 8}.tmp").write_bytes(b'{"format')
    assert dict(Checkpoint(tmp_path, IDENTITY).memo) == {"a": [[1.0]]}
    assert files(tmp_path) == ["clock.json", "identity.json", "memo-000001.safetensors"]


def test_killed_before_its_identity_was_written(tmp_path: Path) -> None:
    (tmp_path / f".identity.json.{'1b' * 8}.tmp").write_bytes(b'{"format')
    assert len(Checkpoint(tmp_path, IDENTITY).memo) == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SearchError, match=r"is not a checkpoint: it holds thesis\.tex"):
        Checkpoint(tmp_path, IDENTITY)
    assert files(tmp_path) == ["thesis.tex"]


def test_remove_takes_only_its_own_files(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, IDENTITY)
    kept.array("a", lambda: np.ones(2))
    kept.value("b", lambda: 1)
    (tmp_path / "notes.txt").write_text("mine")
    kept.remove()
    assert files(tmp_path) == ["notes.txt"]
    kept.memo["a"] = [[1.0]]
    kept.flush(force=True)
    kept.value("c", lambda: 1)
    assert files(tmp_path) == ["notes.txt"]


def _read_all(folder: Path) -> None:
    again = Checkpoint(folder, IDENTITY)
    again.array("a", never)
    again.value("b", never)


@pytest.mark.parametrize("cut", [0, 5, 30, -1])
@pytest.mark.parametrize(
    "name", ["identity.json", "clock.json", "memo-000001.safetensors", "array-a.safetensors", "value-b.json"]
)
def test_damaged_files_are_named(tmp_path: Path, name: str, cut: int) -> None:
    first = Checkpoint(tmp_path, IDENTITY)
    first.memo["a"] = torch.randn(2, 3).tolist()
    first.flush(force=True)
    first.array("a", lambda: np.arange(12.0))
    first.value("b", lambda: {"numbers": list(range(20))})
    path = tmp_path / name
    whole = path.read_bytes().rstrip(b"\n")  # JSON without its last newline is still complete
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(SearchError, match=rf"{name} in the checkpoint is damaged: .+; expected .+; remove ") as caught:
        _read_all(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("identity.json", b"[1]"), ("identity.json", b"\xff\xfe{"), ("clock.json", b"[]"), ("value-b.json", b"3")],
)
def test_files_of_another_shape_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    Checkpoint(tmp_path, IDENTITY)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SearchError, match=name):
        Checkpoint(tmp_path, IDENTITY).value("b", never)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match=r"cannot use .*file/inner for the checkpoint: Not a directory"):
        Checkpoint(tmp_path / "file" / "inner", IDENTITY)

    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is not accessible to other users
        os.chmod(name, 0o555)
        with _as_nobody():
            with pytest.raises(
                SearchError, match=r"cannot write .*identity\.json: Permission denied; expected a folder"
            ):
                Checkpoint(Path(name), IDENTITY)
            with pytest.raises(SearchError, match=r"cannot use .*inner for the checkpoint: Permission denied"):
                Checkpoint(Path(name) / "inner", IDENTITY)
        assert os.listdir(name) == []
        os.chmod(name, 0o755)


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Drop root's privileges for files in this thread, since root can write anywhere."""
    root = os.geteuid() == 0
    if root:
        ctypes.CDLL(None).setfsuid(65534)
    try:
        yield
    finally:
        if root:
            ctypes.CDLL(None).setfsuid(0)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "f", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SearchError, match="No space left on device; expected a folder that can be written; free"):
        write_atomically(tmp_path / "f", b"new")
    assert files(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_others_than_the_leader_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoint(tmp_path, IDENTITY)
    before = files(tmp_path)
    follower = Workers(rank=1, world=2)
    # The leader's result would arrive over the network; here it is in the folder.
    monkeypatch.setattr(Workers, "from_leader", lambda self, make: make())
    other = Checkpoint(tmp_path, IDENTITY, follower)
    other.memo["a"] = [[1.0]]
    other.flush(force=True)
    assert files(tmp_path) == before


WRITER = """
import sys
from pathlib import Path
from vp_exporter.searching import checkpoint
checkpoint.FLUSH_SECONDS = 0.0
kept = checkpoint.Checkpoint(Path(sys.argv[1]), {"model": "tiny"})
print("open", len(kept.memo), flush=True)
number = 0
while True:
    key = f"plan/{number}"
    if key not in kept.memo:
        kept.memo[key] = [[number + column / 1024 for column in range(2000)]] * 8
    kept.value(f"v{number}", lambda: number)  # a kill may have come between the two
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_leaves_all_that_was_written(tmp_path: Path) -> None:
    folder, known = tmp_path / "checkpoint", 0
    for wait in (0.02, 0.11, 0.3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert int(process.stdout.readline().split()[1]) >= known  # the previous run left at least what it announced
        announced = [int(process.stdout.readline())]  # in progress: may be killed at any moment
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].splitlines()
        assert process.returncode == -signal.SIGKILL
        announced += [int(line) for line in lines[:-1]]  # the last one may be cut off
        again = Checkpoint(folder, {"model": "tiny"})
        assert again.elapsed > 0
        assert len(again.memo) >= known
        for number in range(announced[-1] + 1):
            assert again.memo[f"plan/{number}"][7] == [number + column / 1024 for column in range(2000)]
            assert again.value(f"v{number}", never) == number
        assert all(rows == [[int(key[5:]) + c / 1024 for c in range(2000)]] * 8 for key, rows in again.memo.items())
        known = len(again.memo)


def test_a_scorer_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model, description = tiny_vit()
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    calibration = Calibration.of_tensors(images, None, model, description, batch_size=4)
    life = np.random.default_rng(0).integers(1, description.depth + 1, description.patches)
    life[0] = description.depth
    plans = [plan_of(np.roll(life, shift), description) for shift in range(3)]
    kept = Checkpoint(tmp_path, IDENTITY)
    first = Scorer(model, description, calibration, memo=kept.memo)
    losses = [first.losses(plan, calibration.search) for plan in plans[:2]]
    kept.flush(force=True)
    second = Scorer(model, description, calibration, memo=Checkpoint(tmp_path, IDENTITY).memo)
    for plan, before in zip(plans, losses, strict=False):
        assert torch.equal(second.losses(plan, calibration.search), before)
    assert second.evaluations == 0
    second.losses(plans[2], calibration.search)
    assert second.evaluations == 1
