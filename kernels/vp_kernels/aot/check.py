"""Verify a folder of ahead-of-time builds against its index: file contents, names, and what each PTX declares."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from vp_kernels.aot.index import (
    FORMAT,
    FREE_SHARED_BYTES,
    HIDDEN,
    INDEX,
    VARIANT_NAME,
    VERSION,
    AotError,
    canonical,
    grid_size,
    parameter_type,
)
from vp_kernels.aot.ptx import Ptx, cubin_has, parse

MAX_INDEX_BYTES = 64 * 2**20
MAX_FILE_BYTES = 64 * 2**20
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,199}")
_SHA = re.compile(r"[0-9a-f]{64}")
_TOP = {"format": str, "version": int, "triton": str, "ptxas": dict, "sources": dict, "entries": list}
_ENTRY: dict[str, type] = {
    "operator": str, "variant": str, "kernel": str, "entry": str, "sources": list, "sm": int, "arch": str,
    "ptx_isa": str, "ptx": dict, "cubin": dict, "parameters": list, "shared": dict, "num_warps": int,
    "num_stages": int, "threads": int, "registers": int, "spill_bytes": int, "dtype": str, "constants": dict,
    "shapes": dict, "grid": list,
}  # fmt: skip
_FILE = {"path": str, "sha256": str, "size": int}
_SHARED = {"static": int, "dynamic": int, "raise_limit": bool}
_PARAMETER: dict[str, Any] = {
    "name": str, "type": str, "bytes": int, "hidden": bool, "dtype": (str, type(None)), "divisible_by": int
}  # fmt: skip


def check_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Verify a folder of compiled kernels and return its index.

    Args:
        folder: Folder written by `python -m vp_kernels.aot --out`.

    Returns:
        The index.

    Raises:
        AotError: if the folder differs from its index; names the first difference, in one line.

    Examples:
        >>> from vp_kernels import check_index
        >>> check_index("build/kernels")["format"]  # doctest: +SKIP
        'vp-kernels-aot'
    """
    root = Path(folder)
    index = _read_index(root)
    _fields(index, _TOP, INDEX)
    if index["format"] != FORMAT:
        raise AotError(f"{INDEX}: format is {index['format']!r}; expected {FORMAT!r}")
    if index["version"] != VERSION:
        raise AotError(f"{INDEX}: version is {index['version']}; this checker knows {VERSION}: build it again")
    listed: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(index["entries"]):
        _fields(entry, _ENTRY, f"{INDEX}: entry {number}")
        name = f"{entry['operator']}/{entry['variant']} sm {entry['sm']}"
        try:
            _check_entry(entry, index)
        except AotError as error:
            raise AotError(f"{INDEX}: {name}: {error}") from None
        for kind in ("ptx", "cubin"):
            if entry[kind]["path"] in listed:
                raise AotError(f"{INDEX}: {name} is there twice")
            listed[entry[kind]["path"]] = entry[kind]
    order = [(each["operator"], each["variant"], each["sm"]) for each in index["entries"]]
    if order != sorted(order):
        raise AotError(f"{INDEX}: the entries are not in order of operator, variant and capability")
    _closed_world(root, set(listed) | {INDEX})
    for entry in index["entries"]:
        ptx = _content(root, entry["ptx"])
        cubin = _content(root, entry["cubin"])
        try:
            _hold(entry, parse(ptx.decode("ascii")))
        except UnicodeDecodeError:
            raise AotError(f"{entry['ptx']['path']} is no text; expected PTX") from None
        except AotError as error:
            raise AotError(f"{entry['ptx']['path']}: {error}") from None
        if not cubin_has(cubin, entry["entry"]):
            raise AotError(f"{entry['cubin']['path']} is no cubin with the kernel {entry['entry']}")
    return index


def _read_index(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise AotError(f"{root} is no folder; expected one that `python -m vp_kernels.aot --out` wrote")
    data = _read(root / INDEX, INDEX, MAX_INDEX_BYTES)
    try:
        index = json.loads(data)
        same = isinstance(index, dict) and canonical(index) == data
    except (ValueError, RecursionError):
        raise AotError(f"{INDEX} is no JSON of ours; expected the bytes that the builder wrote") from None
    if not same:
        raise AotError(f"{INDEX} is not in its canonical form; expected the bytes that the builder wrote")
    return index


def _fields(found: Any, wanted: dict[str, Any], where: str) -> None:
    """Check that an object has exactly these keys, with values of these types."""
    if not isinstance(found, dict) or set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted)) if isinstance(found, dict) else []
        raise AotError(f"{where}: fields differ{' in ' + ', '.join(odd) if odd else ''}; expected {', '.join(wanted)}")
    for key, kind in wanted.items():
        value = found[key]
        wrong_number = kind is int and (isinstance(value, bool) or (isinstance(value, int) and value < 0))
        if not isinstance(value, kind) or wrong_number:
            raise AotError(f"{where}: {key} is {value!r:.80}; expected {getattr(kind, '__name__', 'text or null')}")


def _check_entry(entry: dict[str, Any], index: dict[str, Any]) -> None:
    """Check that an entry is consistent in itself."""
    for key, name in (("operator", _NAME), ("variant", VARIANT_NAME), ("entry", _NAME)):
        if not name.fullmatch(entry[key]):
            raise AotError(f"{key} is {entry[key]!r:.80}; expected letters, digits and underscores")
    for kind in ("ptx", "cubin"):
        _fields(entry[kind], _FILE, kind)
        path = f"{entry['operator']}/{entry['variant']}.sm{entry['sm']}.{kind}"
        if entry[kind]["path"] != path:
            raise AotError(f"the path of its {kind} is {entry[kind]['path']!r:.80}; expected {path}")
        if not _SHA.fullmatch(entry[kind]["sha256"]):
            raise AotError(f"the sha256 of its {kind} is no such digest")
    _fields(entry["shared"], _SHARED, "shared")
    raise_limit = entry["shared"]["static"] + entry["shared"]["dynamic"] > FREE_SHARED_BYTES
    if entry["shared"]["raise_limit"] != raise_limit:
        raise AotError(f"raise_limit is {entry['shared']['raise_limit']}; expected {raise_limit}")
    if entry["threads"] != 32 * entry["num_warps"]:
        raise AotError(f"{entry['threads']} threads; expected 32 for each of {entry['num_warps']} warps")
    if not re.fullmatch(rf"sm_{entry['sm']}[af]?", entry["arch"]):
        raise AotError(
            f"arch is {entry['arch']!r:.80}; expected sm_{entry['sm']}, sm_{entry['sm']}a or sm_{entry['sm']}f"
        )
    if str(entry["sm"]) not in index["ptxas"]:
        raise AotError("no ptxas version is given for its capability")
    for source in entry["sources"]:
        if not isinstance(source, str) or not _SHA.fullmatch(str(index["sources"].get(source))):
            raise AotError(f"its source {source!r:.80} has no digest")
    for symbol, limit in entry["shapes"].items():
        both = limit if isinstance(limit, list) else [limit, limit]
        if len(both) != 2 or not all(type(each) is int for each in both) or not 0 <= both[0] <= both[1]:
            raise AotError(f"the shape {symbol} is {limit!r:.80}; expected a number or [low, high]")
    if len(entry["grid"]) != 3 or not all(isinstance(each, str) and len(each) <= 200 for each in entry["grid"]):
        raise AotError("the grid is not three expressions")
    for each in entry["grid"]:
        grid_size(each, dict.fromkeys(entry["shapes"], 1))
    _check_parameters(entry["parameters"])


def _check_parameters(parameters: list[Any]) -> None:
    for number, each in enumerate(parameters):
        _fields(each, _PARAMETER, f"parameter {number}")
        hidden = number >= len(parameters) - HIDDEN
        if each["hidden"] != hidden or (each["name"] == "hidden") != hidden or (each["dtype"] is None) != hidden:
            raise AotError(f"parameter {number}: expected the last {HIDDEN} to be hidden, and no other")
        wanted = parameter_type("*" if hidden else each["dtype"])
        if (each["type"], each["bytes"]) != wanted:
            raise AotError(f"parameter {number} is {each['bytes']} bytes of {each['type']}; expected {wanted}")
    if len(parameters) < HIDDEN:
        raise AotError(f"{len(parameters)} parameters; expected at least the {HIDDEN} hidden ones")


def _closed_world(root: Path, expected: set[str]) -> None:
    """Check that the folder holds exactly the expected files and subfolders."""
    found: set[str] = set()
    folders = {path.rsplit("/", 1)[0] for path in expected if "/" in path}
    for below, names, files in os.walk(root):
        for name in names + files:
            path = Path(below, name).relative_to(root).as_posix()
            if name in files or Path(below, name).is_symlink():
                found.add(path)
            elif path not in folders:
                raise AotError(f"the folder {path!r} is not in {INDEX}")
    if missing := sorted(expected - found):
        raise AotError(f"{missing[0]} is missing")
    if extra := sorted(found - expected):
        raise AotError(f"{extra[0]!r} is not in {INDEX}")


def _content(root: Path, listed: dict[str, Any]) -> bytes:
    data = _read(root / listed["path"], listed["path"], MAX_FILE_BYTES)
    if len(data) != listed["size"]:
        raise AotError(f"{listed['path']} has {len(data)} bytes; expected {listed['size']}")
    if hashlib.sha256(data).hexdigest() != listed["sha256"]:
        raise AotError(f"{listed['path']} is altered: its sha256 is not the index's")
    return data


def _read(path: Path, name: str, most: int) -> bytes:
    """Read a regular file, without following links."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AotError(f"{name} is no plain file")
            if status.st_size > most:
                raise AotError(f"{name} has {status.st_size} bytes; expected at most {most}")
            return file.read(most + 1)
    except FileNotFoundError:
        raise AotError(f"{name} is missing") from None
    except OSError as error:
        raise AotError(f"{name} cannot be read: {error.strerror or error}") from None


def _hold(entry: dict[str, Any], ptx: Ptx) -> None:
    """Check that a PTX declares what its entry states."""
    shared = entry["shared"]
    pairs: list[tuple[str, Any, Any]] = [
        ("its kernel", ptx.entry, entry["entry"]),
        ("its target", ptx.target, entry["arch"]),
        ("its PTX version", ptx.isa, entry["ptx_isa"]),
        ("its parameters", list(ptx.parameters), [each["type"] for each in entry["parameters"]]),
        ("its block", ptx.threads, entry["threads"]),
        ("its own shared memory", ptx.static_shared, shared["static"]),
        ("whether it takes dynamic shared memory", ptx.dynamic_shared or not shared["dynamic"], True),
    ]
    for what, found, expected in pairs:
        if found != expected:
            raise AotError(f"{what}: {found}; expected {expected}, as the index has it")
    if any(ptx.read[-HIDDEN:]):
        raise AotError("it reads a hidden parameter; expected none to, since launchers pass null")
