"""Checkpoint of a search, from which a new run continues after an interruption.

A search is deterministic: restarted, it asks the same questions in the same order. So its state is not stored, only
results that are slow to compute: the logits of each plan and batch (`Checkpoint.memo`) and a few named results
(`array`, `value`). Files are written atomically and, except for the clock, only once: a kill at any moment loses what
was computed after the last write, and nothing else. No file is a pickle.

    identity.json            inputs of the search
    memo-000001.safetensors  logits [b, C] by plan and batch, those new at each flush
    array-NAME.safetensors, value-NAME.json
    clock.json               seconds of the runs so far
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy
from safetensors import torch as safetensors_torch
from torch import Tensor

from vp_exporter.errors import SearchError, first_line
from vp_exporter.utils import files
from vp_exporter.utils.distributed import Workers, single

FORMAT, VERSION = "vp-search-checkpoint", 1
FLUSH_SECONDS = 10.0
A = TypeVar("A", np.ndarray, Tensor)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_MEMO = re.compile(r"memo-(\d{6,})\.safetensors")
_OURS = re.compile(r"identity\.json|clock\.json|memo-\d{6,}\.safetensors|array-.+\.safetensors|value-.+\.json")
_MISSING = object()


def write_atomically(path: Path, data: bytes) -> None:
    """`vp_exporter.utils.files.write_atomically`, raising a SearchError.

    Raises:
        SearchError: if the folder cannot be written.
    """
    try:
        files.write_atomically(path, data)
    except OSError as error:
        raise SearchError(
            f"cannot write {path}: {error.strerror or error}", expected="a folder that can be written",
            fix="free some space, or choose another `out`",
        ) from error  # fmt: skip


class Memo(MutableMapping[str, list[list[float]]]):
    """Logits by plan and batch (`vp_exporter.searching.scoring.Memo`), as arrays: a tenth of the memory of lists.

    New entries are written periodically. Deleting an entry does not affect the files.
    """

    def __init__(self, write: Callable[[dict[str, np.ndarray]], None] | None) -> None:
        self._rows: dict[str, np.ndarray] = {}
        self._new: list[str] = []
        self._write, self._written = write, time.monotonic()

    def __getitem__(self, key: str) -> list[list[float]]:
        rows: list[list[float]] = self._rows[key].tolist()
        return rows

    def __setitem__(self, key: str, value: list[list[float]]) -> None:
        self._rows[key] = _narrowed(value)
        self._new.append(key)
        self.flush()

    def __delitem__(self, key: str) -> None:
        del self._rows[key]

    def __contains__(self, key: object) -> bool:
        return key in self._rows  # the inherited method would build the lists

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self, force: bool = False) -> None:
        """Write new entries, if FLUSH_SECONDS have passed since the last time, or `force`.

        Raises:
            SearchError: if the folder cannot be written.
        """
        if self._write is None:
            self._new.clear()
        elif force or time.monotonic() - self._written >= FLUSH_SECONDS:
            self._write({key: self._rows[key] for key in self._new if key in self._rows})
            self._new.clear()
            self._written = time.monotonic()

    def known(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add entries that were written by an earlier run."""
        self._rows.update(rows)


class Checkpoint:
    """A checkpoint folder beside the plan.

    All processes must call each method together; only the leader accesses files.

    Args:
        folder: Created if missing; None keeps everything in memory.
        identity: JSON values that determine the result: model, weights, images, settings, seeds, versions.

    Attributes:
        memo: For `Scorer`.
        elapsed: Seconds of earlier runs, up to the last write of each.

    Raises:
        SearchError: if the folder cannot be created, read or written, holds something else or another search, or a file
            in it is damaged.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], workers: Workers | None = None) -> None:
        self.folder = folder
        self._workers = workers or single()
        self._arrays: dict[str, Any] = {}
        self._values: dict[str, Any] = {}
        self._start, self.elapsed, self._segment = time.monotonic(), 0.0, 0
        # Only the leader writes; on other processes the memo is never flushed.
        self.memo = Memo(self._write_memo if folder is not None and self._workers.leader else None)
        if folder is not None:
            wanted = json.loads(json.dumps(identity))
            self.elapsed, segments = self._workers.from_leader(lambda: _open(folder, wanted))
            for segment in segments:  # one at a time, to limit memory
                path = folder / segment
                self.memo.known(self._workers.from_leader(lambda path=path: _read_memo(path)))  # type: ignore[misc]
                self._segment = int(segment.split("-")[1].split(".")[0])

    def array(self, name: str, make: Callable[[], A]) -> A:
        """Load a named array or CPU tensor, or compute and store it.

        Args:
            name: Letters, digits, ".", "_" and "-".
            make: Called on every process, so it may distribute its work; must return the same on all.

        Raises:
            SearchError: if the stored file is damaged, or cannot be written.
        """
        if name not in self._arrays:
            path = self._path("array", name, ".safetensors")
            found = _MISSING if path is None else self._workers.from_leader(lambda: _stored(path, _read_array))
            if not isinstance(found, np.ndarray | Tensor):
                found = make()
                if path is not None:
                    data = _array_bytes(found)
                    self._workers.from_leader(lambda: write_atomically(path, data))
            self._arrays[name] = found
        return self._arrays[name]

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """Load a named JSON value, or compute and store it.

        The value is always returned as decoded from JSON: tuples become lists.

        Raises:
            SearchError: if the stored file is damaged, or cannot be written.
        """
        if name not in self._values:
            path = self._path("value", name, ".json")
            found = None if path is None else self._workers.from_leader(lambda: _stored(path, _read_value))
            if not isinstance(found, dict):
                found = {"value": json.loads(json.dumps(make()))}
                if path is not None:
                    data = _json_bytes(found)
                    self._workers.from_leader(lambda: write_atomically(path, data))
            self._values[name] = found["value"]
        return self._values[name]

    def flush(self, force: bool = False) -> None:
        """Write new entries of the memo, if FLUSH_SECONDS have passed since the last time, or `force`."""
        self.memo.flush(force)

    def remove(self) -> None:
        """Remove the files after a successful search, and the folder if it is empty. Later writes are ignored.

        Raises:
            SearchError: if something cannot be removed.
        """
        folder, self.folder = self.folder, None
        self.memo._write = None
        if folder is not None:
            self._workers.from_leader(lambda: _remove(folder))

    def _path(self, kind: str, name: str, ending: str) -> Path | None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a file")
        return None if self.folder is None else self.folder / f"{kind}-{name}{ending}"

    def _write_memo(self, rows: dict[str, np.ndarray]) -> None:
        assert self.folder is not None
        if rows:
            self._segment += 1
            write_atomically(self.folder / f"memo-{self._segment:06d}.safetensors", safetensors_numpy.save(rows))
        seconds = self.elapsed + time.monotonic() - self._start
        write_atomically(self.folder / "clock.json", _json_bytes({"seconds": seconds}))


def _narrowed(rows: list[list[float]]) -> np.ndarray:
    """Convert to float32 if that is exact (logits are float32), else to float64."""
    wide = np.asarray(rows, dtype=np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return narrow if np.array_equal(narrow, wide) else wide


def _open(folder: Path, identity: Any) -> tuple[float, list[str]]:
    """Create or check the folder. Returns the seconds of earlier runs and the memo's files in order."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(folder))
        for name in [name for name in names if _PARTIAL.fullmatch(name)]:  # partial files of a killed run
            (folder / name).unlink(missing_ok=True)
            names.remove(name)
    except OSError as error:
        raise SearchError(
            f"cannot use {folder} for the checkpoint: {error.strerror or error}",
            expected="a folder that can be written", fix="choose another `out`",
        ) from error  # fmt: skip
    path = folder / "identity.json"
    if not names:
        write_atomically(path, _json_bytes({"format": FORMAT, "version": VERSION, "identity": identity}))
        return 0.0, []
    if path.name not in names:
        raise SearchError(
            f"{folder} is not a checkpoint: it holds {names[0]}", expected="no such folder, or the one of this search",
            fix="remove the folder, or choose another `out`",
        )  # fmt: skip
    stored = _read_json(path, f"remove {folder}: the search starts again")
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or stored.get("version") != VERSION:
        raise SearchError(
            f"{path} is not of a checkpoint that this version reads", expected=f"{FORMAT}, version {VERSION}",
            fix="remove the folder, or choose another `out`",
        )  # fmt: skip
    if difference := _difference(stored.get("identity"), identity):
        key, before, now = difference
        raise SearchError(
            f"the checkpoint {folder} is of another search: {key} was {before} and is {now}",
            expected="the same search", fix="remove the folder, or choose another `out`",
        )  # fmt: skip
    seconds = 0.0
    if "clock.json" in names:
        clock = folder / "clock.json"
        try:
            seconds = float(_read_json(clock, f"remove {clock}")["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(clock, "it holds no seconds", f"remove {clock}") from error
    segments = [(int(match[1]), name) for name in names if (match := _MEMO.fullmatch(name))]
    return seconds, [name for _, name in sorted(segments)]


def _difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """First difference of two JSON values: (dotted key, old value, new value)."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in before if name not in now)]:
            inner = _difference(before.get(name, _MISSING), now.get(name, _MISSING), f"{key}.{name}" if key else name)
            if inner:
                return inner
        return None
    texts = ["not set" if value is _MISSING else json.dumps(value, sort_keys=True) for value in (before, now)]
    if texts[0] == texts[1]:
        return None
    shown = [text if len(text) <= 80 else text[:77] + "..." for text in texts]
    return key or "it", shown[0], shown[1]


def _remove(folder: Path) -> None:
    try:
        # Remove the identity last, so that an interrupted removal still leaves a valid checkpoint.
        names = sorted(os.listdir(folder), key=lambda name: name == "identity.json")
        ours = [name for name in names if _OURS.fullmatch(name) or _PARTIAL.fullmatch(name)]
        for name in ours:
            (folder / name).unlink(missing_ok=True)
        if len(ours) == len(names):
            folder.rmdir()
    except FileNotFoundError:
        return  # already removed
    except OSError as error:
        raise SearchError(f"cannot remove {folder}: {error.strerror or error}", fix="remove it by hand") from error


def _stored(path: Path, read: Callable[[Path], Any]) -> Any:
    return read(path) if os.path.lexists(path) else None


def _read_memo(path: Path) -> dict[str, np.ndarray]:
    try:
        rows: dict[str, np.ndarray] = safetensors_numpy.load(path.read_bytes())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    if any(array.ndim != 2 or array.dtype.kind != "f" for array in rows.values()):
        raise _damaged(path, "it holds something other than logits")
    return rows


def _array_bytes(array: np.ndarray | Tensor) -> bytes:
    kind = "numpy" if isinstance(array, np.ndarray) else "torch"
    tensor = torch.from_numpy(array.copy()) if isinstance(array, np.ndarray) else array.detach().cpu().contiguous()
    data: bytes = safetensors_torch.save({"array": tensor}, metadata={"kind": kind})
    return data


def _read_array(path: Path) -> np.ndarray | Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("array")
            return tensor.numpy() if (file.metadata() or {}).get("kind") == "numpy" else tensor
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_value(path: Path) -> dict[str, Any]:
    stored = _read_json(path)
    if not isinstance(stored, dict) or "value" not in stored:
        raise _damaged(path, "it holds no value")
    return stored


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_json(path: Path, fix: str = "") -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error, fix) from error


def _damaged(path: Path, why: object, fix: str = "") -> SearchError:
    reason = first_line(why)
    return SearchError(
        f"{path} in the checkpoint is damaged: {reason}", expected="a file as the search wrote it",
        fix=fix or f"remove {path}: what it held is computed again",
    )  # fmt: skip
