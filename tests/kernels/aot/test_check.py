"""The checker of ahead-of-time builds detects modifications, by digest or by content."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.aot.test_command import run
from vp_kernels.aot import check_index
from vp_kernels.aot.index import AotError, canonical


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two variants."""
    folder = tmp_path_factory.mktemp("aot")
    command = ["--out", "built", "--jobs", "1", "--sm", "90", "--match", "fp16_d64", "--match", "add_loose"]
    ((code, _, err),) = run(folder, command)
    assert code == 0, err
    return folder / "built"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy to corrupt."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


@pytest.mark.slow
def test_what_was_written_is_sound(copy: Path) -> None:
    assert len(check_index(copy)["entries"]) == 2
    resign(copy, lambda index: None)  # the tests below only change the content
    assert len(check_index(copy)["entries"]) == 2


def resign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index and update the digests, so that only the content can reveal the change."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["entries"]:
        for kind in ("ptx", "cubin"):
            data = (folder / entry[kind]["path"]).read_bytes()
            entry[kind].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(index)
    (folder / "index.json").write_bytes(canonical(index))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


PTX, CUBIN = "scratch/fp16_d64.sm90.ptx", "scratch/fp16_d64.sm90.cubin"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "altered ptx": (lambda at: flip(at / PTX), f"{PTX} is altered"),
    "altered cubin": (lambda at: flip(at / CUBIN), f"{CUBIN} is altered"),
    "cut short": (lambda at: (at / CUBIN).write_bytes((at / CUBIN).read_bytes()[:-1]), "bytes; expected"),
    "missing": (lambda at: (at / PTX).unlink(), f"{PTX} is missing"),
    "no index": (lambda at: (at / "index.json").unlink(), "index.json is missing"),
    "extra file": (lambda at: (at / "scratch/more.ptx").write_text("x"), "'scratch/more.ptx' is not in index.json"),
    "extra folder": (lambda at: (at / "other").mkdir(), "folder 'other' is not in index.json"),
    "hidden file": (lambda at: (at / ".x").write_text("x"), "'.x' is not in index.json"),
    "link": (lambda at: ((at / PTX).rename(at.parent / "k"), (at / PTX).symlink_to(at.parent / "k")), "cannot be read"),
    "index cut": (lambda at: (at / "index.json").write_text("{"), "is no JSON of ours"),
    "index not canonical": (
        lambda at: (at / "index.json").write_text(json.dumps(json.loads((at / "index.json").read_text()))),
        "canonical",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(copy: Path, kind: str) -> None:
    change, message = DAMAGE[kind]
    change(copy)
    with pytest.raises(AotError, match=re.escape(message)) as caught:
        check_index(copy)
    assert "\n" not in str(caught.value)


def replace(old: str, new: str) -> Callable[[Path], None]:
    """A change of one PTX text."""

    def change(folder: Path) -> None:
        text = (folder / PTX).read_text()
        assert old in text
        (folder / PTX).write_text(text.replace(old, new))

    return change


LAST = "\t.param .u64 .ptr .global .align 1 product_param_6\n"
LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a parameter less": (replace(".align 1 product_param_5,\n" + LAST, ".align 1 product_param_5\n"), "its parameters"),
    "a parameter more": (replace(LAST, LAST.rstrip() + ",\n\t.param .u32 more\n"), "its parameters"),
    "another type": (replace(".param .f32 product_param_4", ".param .u32 product_param_4"), "its parameters"),
    "by value": (replace(".param .f32 product_param_4", ".param .b8 product_param_4[8]"), "one plain value"),
    "another kernel": (replace(".entry product(", ".entry produce("), "its kernel"),
    "another target": (replace(".target sm_90a", ".target sm_90"), "its target"),
    "another version": (replace(".version 8.", ".version 9."), "its PTX version"),
    "another block": (replace(".reqntid 128", ".reqntid 64"), "its block"),
    "a cluster": (replace(".reqntid 128", ".reqntid 128\n.explicitcluster"), "cluster"),
    "own shared memory": (replace("// %bb.0:", ".shared .align 4 .b8 mine[64];"), "its own shared memory"),
    "no dynamic shared memory": (replace(".extern .shared", ".extern .global"), "dynamic shared memory"),
    "reads a hidden one": (replace("\tret;", "\tld.param.b64 %rd1, [product_param_6];\n\tret;"), "hidden parameter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_ptx_that_is_not_what_the_index_says_is_found(copy: Path, kind: str) -> None:
    """Even if its digest is correct."""
    change, message = LIES[kind]
    change(copy)
    resign(copy, lambda index: None)
    with pytest.raises(AotError, match=message) as caught:
        check_index(copy)
    assert PTX in str(caught.value)


def lie(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Change fields of the index's first entry."""
    return lambda index: index["entries"][0].update(fields)


def drop_hidden(index: dict[str, Any]) -> None:
    index["entries"][0]["parameters"].pop()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda index: index.update(format="x"), "format is 'x'"),
    "version": (lambda index: index.update(version=2), "version is 2"),
    "unknown field": (lambda index: index.update(more=1), "fields differ in more"),
    "unknown field of an entry": (lie(more=1), "fields differ in more"),
    "type": (lie(registers="8"), "registers is '8'"),
    "negative": (lie(registers=-8), "registers is -8"),
    "flag for a number": (lie(spill_bytes=True), "spill_bytes is True"),
    "threads": (lie(threads=64), "64 threads"),
    "warps and threads": (lie(threads=64, num_warps=2), "its block"),
    "arch": (lie(arch="sm_120a"), "arch is 'sm_120a'"),
    "another arch": (lie(arch="sm_90f"), "its target"),
    "path": (lie(ptx={"path": "../x", "sha256": "0" * 64, "size": 1}), "path of its ptx"),
    "operator": (lie(operator=".."), "operator is '..'"),
    "shared": (lie(shared={"static": 0, "dynamic": 50000, "raise_limit": False}), "raise_limit is False"),
    "shared without a declaration": (lie(shared={"static": 0, "dynamic": 5, "raise_limit": False}), "dynamic shared"),
    "grid": (lie(grid=["B", "M", "1"]), "M is no symbol"),
    "hostile grid": (lie(grid=["__import__('os').getpid()", "1", "1"]), "not allowed"),
    "grid of two": (lie(grid=["B", "1"]), "three expressions"),
    "shapes": (lie(shapes={"B": [2, 1], "N": 1}), "shape B is"),
    "sources": (lie(sources=["x.py"]), "has no digest"),
    "hidden": (drop_hidden, "hidden"),
    "twice": (lambda index: index["entries"].insert(0, index["entries"][0]), "twice"),
    "order": (lambda index: index["entries"].reverse(), "order"),
    "ptxas": (lambda index: index["ptxas"].clear(), "ptxas"),
    "an entry less": (lambda index: index["entries"].pop(), "is not in index.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_an_index_that_is_wrong_is_refused(copy: Path, kind: str) -> None:
    change, message = WRONG[kind]
    resign(copy, change)
    with pytest.raises(AotError, match=re.escape(message)) as caught:
        check_index(copy)
    assert "\n" not in str(caught.value)


def test_a_cubin_of_another_kernel_is_found(copy: Path) -> None:
    shutil.copy(copy / "scratch/add_loose.sm90.cubin", copy / CUBIN)
    resign(copy, lambda index: None)
    with pytest.raises(AotError, match="no cubin with the kernel product"):
        check_index(copy)
