"""The ahead-of-time builder on kernels made for the test: its output, its reproducibility, and its errors.

Kernels in this process run in Triton's interpreter (conftest.py), so compiling takes another process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.waiting import LONG
from vp_kernels.aot import check_index
from vp_kernels.aot.index import AotError, grid_size

HELPER = """
import triton


@triton.jit
def half(x):
    return x * 0.5
"""
ROOM = """
import os

if os.environ.get("SCRATCH_DIES") not in (None, str(os.getpid())):
    os._exit(9)

import aot_helper
import triton
import triton.language as tl
from vp_kernels.launch import Config, Variant


@triton.jit
def product(a_ptr, b_ptr, out_ptr, rows, scale, D: tl.constexpr, UNUSED: tl.constexpr = 3):
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D)
    at = i[:, None] * D + i[None, :]
    a = tl.load(a_ptr + image * D * D + at, mask=i[:, None] < rows, other=0.0)
    tl.store(out_ptr + image * D * D + at, aot_helper.half(tl.dot(a, tl.load(b_ptr + at)) * scale))


@triton.jit
def add(a_ptr, out_ptr, count, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(a_ptr + i, mask=i < count) + 1, mask=i < count)


@triton.jit
def spread(a_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(a_ptr + i)  # alive until the sum is known: more than the registers hold
    tl.store(a_ptr + i, a - tl.sum(a, 0))


@triton.jit
def wrong(a_ptr, SIZE: tl.constexpr):
    tl.store(a_ptr + tl.arange(0, SIZE), missing_name)


def variants():
    for dtype in ("fp16", "fp32"):
        for d in (32, 64, 128):
            pointer = "*" + dtype
            yield Variant(
                "scratch", f"{dtype}_d{d}", Config(product, {"D": d}, num_warps=8 if d == 128 else 4),
                {"a_ptr": pointer, "b_ptr": pointer, "out_ptr": pointer, "rows": "i32", "scale": "fp32"},
                ("B", "1", "1"), {"B": (1, 65535), "N": (1, d), "d": d}, dtype, ("a_ptr", "b_ptr", "out_ptr"),
            )
    for name, aligned in (("aligned", ("a_ptr", "out_ptr", "count")), ("loose", ())):
        yield Variant(
            "scratch", "add_" + name, Config(add, {"SIZE": 1024}, num_warps=8),
            {"a_ptr": "*fp32", "out_ptr": "*fp32", "count": "i64"}, ("cdiv(B * N, 1024)", "1", "1"),
            {"B": (1, 1 << 20), "N": (1, 1024)}, "fp32", aligned,
        )
    configs = {"spills": Config(spread, {"SIZE": 16384}, num_warps=1), "wrong": Config(wrong, {"SIZE": 64})}
    for name, config in configs.items():
        yield Variant("scratch", name, config, {"a_ptr": "*fp32"}, ("1",) * 3, {}, "fp32")
"""
# Several commands in one process: starting it takes longer than most of them.
SCRIPT = """
import contextlib, io, json, os, sys
from vp_kernels.aot.command import main

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for module in given["without"]:
        sys.modules[module] = None
    if given["dies"]:
        os.environ["SCRATCH_DIES"] = str(os.getpid())
    answers = []
    for argv in given["commands"]:
        if argv == ["somebody edits"]:
            with open("aot_room.py", "a") as file:
                file.write("# what was imported is older than this")
            continue
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv, rooms={"scratch": "aot_room"})
        answers.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(answers))
"""
CAPABILITIES = (80, 90, 120)
BUILT = ("fp16_d64", "fp16_d128", "add_aligned", "add_loose")
CHOSEN = [word for name in BUILT for word in ("--match", name)] + [f"--sm={sm}" for sm in CAPABILITIES]


def environment(**more: str) -> dict[str, str]:
    """Environment of this process, with kernels that compile."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "SCRATCH"))}
    return {**kept, **more}


def run(folder: Path, *commands: list[str], without: tuple[str, ...] = (), dies: bool = False, **env: str) -> list[Any]:
    """(exit code, stdout, stderr) of each command, in one process that can import the kernels in `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text in (("aot_helper.py", HELPER), ("aot_room.py", ROOM), ("script.py", SCRIPT)):
        (folder / name).write_text(text)
    given = json.dumps({"commands": commands, "without": without, "dies": dies})
    environ = environment(PYTHONPATH=str(folder), TRITON_CACHE_DIR=str(folder / "cache"), **env)
    done = warm.run([folder / "script.py", given], cwd=folder, env=environ)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four variants for three compute capabilities."""
    folder = tmp_path_factory.mktemp("aot")
    ((code, out, err),) = run(folder, ["--out", "built", "--jobs", "1", *CHOSEN])
    assert code == 0, err
    assert not out
    assert len(err.splitlines()) == len(BUILT) * len(CAPABILITIES) + 1
    assert "[1/12] scratch/fp16_d64 for sm_80: " in err
    return folder / "built"


def entries(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    index = json.loads((folder / "index.json").read_text())
    return {(each["variant"], each["sm"]): each for each in index["entries"]}


def declared(text: str) -> dict[str, Any]:
    """What a PTX declares about its kernel, parsed line by line, independently of `vp_kernels.aot.ptx`."""
    found: dict[str, Any] = {"types": [], "dynamic": False}
    for line in text.splitlines():
        words = line.split("//")[0].replace(",", " ").replace("(", " ").split()
        if not words:
            continue
        if words[0] in (".version", ".target"):
            found[words[0]] = words[1]
        elif words[:2] == [".visible", ".entry"]:
            found["entry"] = words[2]
        elif words[0] == ".param":
            found["types"].append(words[1])
        elif words[0] == ".reqntid":
            found["threads"] = int(words[1])
        elif ".shared" in words[:2]:
            found["dynamic"] = words[0] == ".extern"
    return found


def assembled(data: bytes, entry: str) -> dict[str, Any]:
    """What a cubin's .nv.info section says about its kernel: the driver's view of the parameter list."""
    start, size, count, names = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HHH", data, 58)
    sections = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    strings = sections[names][4]
    infos = {}
    for name, _, _, _, offset, length in sections:
        text = data[strings + name : data.index(b"\0", strings + name)].decode()
        infos[text] = data[offset : offset + length]
    info, at = infos[f".nv.info.{entry}"], 0
    found: dict[str, Any] = {"sizes": {}}
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        payload = info[at + 4 : at + 4 + value] if form == 4 else b""
        if attribute == 0x17:  # EIATTR_KPARAM_INFO
            _, ordinal, _, flags = struct.unpack("<IHHI", payload)
            found["sizes"][ordinal] = flags >> 18
        elif attribute == 0x10:  # EIATTR_REQNTID
            found["threads"] = struct.unpack("<III", payload)
        at += 4 + len(payload)
    flags = struct.unpack_from("<I", data, 48)[0]
    # location depends on the ABI version of ptxas, here CUDA 12.9's
    found["sm"] = flags & 0xFF if data[8] == 7 else flags >> 8 & 0xFF
    return found


@pytest.mark.slow
def test_the_folder_says_of_itself_what_it_is(built: Path) -> None:
    index = check_index(built)
    assert (index["format"], index["version"]) == ("vp-kernels-aot", 1)
    assert set(index["sources"]) == {"aot_room.py", "aot_helper.py"}
    for name, text in (("aot_room.py", ROOM), ("aot_helper.py", HELPER)):
        assert index["sources"][name] == hashlib.sha256(text.encode()).hexdigest()
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in index["ptxas"].values())
    assert set(index["ptxas"]) == {"80", "90", "120"}
    found = entries(built)
    assert set(found) == {(name, sm) for name in BUILT for sm in CAPABILITIES}
    assert found["add_loose", 80]["sources"] == ["aot_room.py"]
    one = found["fp16_d64", 90]
    assert one["constants"] == {"D": 64, "UNUSED": 3}
    assert one["shapes"] == {"B": [1, 65535], "N": [1, 64], "d": 64}
    assert (one["kernel"], one["num_warps"], one["num_stages"]) == ("product", 4, 2)
    assert [each["name"] for each in one["parameters"]] == [
        "a_ptr", "b_ptr", "out_ptr", "rows", "scale", "hidden", "hidden"
    ]  # fmt: skip
    assert [each["divisible_by"] for each in one["parameters"]] == [16, 16, 16, 1, 1, 1, 1]


def test_entries_agree_with_the_ptx(built: Path) -> None:
    for (_, sm), entry in entries(built).items():
        ptx = declared((built / entry["ptx"]["path"]).read_text())
        assert entry["arch"] == ptx[".target"] == ("sm_80" if sm == 80 else f"sm_{sm}a")
        assert entry["ptx_isa"] == ptx[".version"]
        assert entry["entry"] == ptx["entry"]
        assert [each["type"] for each in entry["parameters"]] == ptx["types"]
        assert [each["hidden"] for each in entry["parameters"]] == [False] * (len(ptx["types"]) - 2) + [True, True]
        assert entry["threads"] == ptx["threads"] == 32 * entry["num_warps"]
        assert (entry["shared"]["dynamic"] > 0) == ptx["dynamic"]
        assert entry["shared"]["static"] == 0


def test_entries_agree_with_the_cubin(built: Path) -> None:
    for (_, sm), entry in entries(built).items():
        cubin = assembled((built / entry["cubin"]["path"]).read_bytes(), entry["entry"])
        assert [cubin["sizes"][i] for i in range(len(cubin["sizes"]))] == [
            each["bytes"] for each in entry["parameters"]
        ]
        assert cubin["threads"] == (entry["threads"], 1, 1)
        assert cubin["sm"] == sm
        assert 8 <= entry["registers"] <= 255


def test_shared_memory_above_48_kb_is_marked(built: Path) -> None:
    found = entries(built)
    for sm in CAPABILITIES:
        assert not found["fp16_d64", sm]["shared"]["raise_limit"]
        assert found["fp16_d128", sm]["shared"]["dynamic"] > 48 * 1024
        assert found["fp16_d128", sm]["shared"]["raise_limit"]


def test_alignment_reaches_the_code(built: Path) -> None:
    def wide(name: str) -> bool:
        return ".v4.b32" in (built / f"scratch/{name}.sm90.ptx").read_text()

    assert wide("add_aligned")
    assert not wide("add_loose")


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """Another folder, other processes, another hash seed, no cache."""
    command = ["--out", "deep/er", "--jobs", "2", *CHOSEN]
    ((code, _, err),) = run(tmp_path / "elsewhere", command, PYTHONHASHSEED="77")
    assert code == 0, err
    other = tmp_path / "elsewhere/deep/er"
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in files:
        assert (built / name).read_bytes() == (other / name).read_bytes(), name
    assert not any(path.name.startswith(".er") for path in other.parent.iterdir())


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room/there").mkdir()
    (tmp_path / "room/there/mine.txt").write_text("kept")
    commands: dict[str, tuple[list[str], int, str]] = {
        "no sm": (["--out", "x"], 2, "--sm is missing; expected one or more of 75, 80"),
        "old sm": (["--sm", "70", "--out", "x"], 2, "--sm is '70'; expected one of 75"),
        "no number": (["--sm", "abc", "--out", "x"], 2, "--sm is 'abc'"),
        "one of two": (["--sm", "90", "--sm", "9.0", "--out", "x"], 2, "--sm is '9.0'"),
        "no out": (["--sm", "90"], 2, "--out is missing"),
        "out exists": (["--sm", "90", "--out", "there"], 2, "there exists; expected a new name, or --force"),
        "not ours": (["--sm", "90", "--out", "there", "--force"], 2, "there is no folder of ahead-of-time builds"),
        "operator": (["--sm", "90", "--out", "x", "--operator", "nope"], 2, "--operator is 'nope'; expected one of"),
        "match": (["--sm", "90", "--out", "x", "--match", "nope*"], 2, "no variant matches"),
        "dtype": (["--sm", "90", "--out", "x", "--dtype", "fp8"], 2, "invalid choice: 'fp8'"),
        "jobs": (["--sm", "90", "--out", "x", "--jobs", "-1"], 2, "--jobs is -1"),
        "flag": (["--smm", "90"], 2, "unrecognized arguments: --smm"),
        "check": (["--check", "nowhere"], 2, "nowhere is no folder"),
        "a file in the way": (["--sm", "90", "--out", "script.py/x"], 2, "cannot write script.py/x"),
        "broken": (["--sm", "90", "--out", "x", "--match", "wrong"], 1, "scratch/wrong for sm_90: CompilationError"),
        "broken among others": (
            ["--sm", "90", "--out", "x", "--match", "wrong", "--match", "add_loose", "--jobs", "2"], 1,
            "missing_name is not defined",
        ),
    }  # fmt: skip
    answers = run(tmp_path / "room", *[argv for argv, _, _ in commands.values()])
    for (name, (_, wanted, message)), (code, out, err) in zip(commands.items(), answers, strict=True):
        lines = [line for line in err.splitlines() if not line.startswith("[")]  # without the progress lines
        assert (code, out, len(lines)) == (wanted, "", 1), (name, code, out, err)
        assert message in lines[0], (name, lines[0])
    assert sorted(path.name for path in (tmp_path / "room").iterdir() if "cache" not in path.name) == [
        "aot_helper.py", "aot_room.py", "script.py", "there"
    ]  # fmt: skip
    assert (tmp_path / "room/there/mine.txt").read_text() == "kept"


@pytest.mark.slow
def test_list_default_set_and_force(built: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    shutil.copytree(built, room / "old")
    listed, everything, failed, same, replaced = run(
        room,
        ["--list"],
        ["--list", "--all"],
        ["--out", "old", "--force", "--sm", "80", "--match", "wrong"],
        ["--check", "old"],
        ["somebody edits"],
        ["--out", "old", "--force", "--sm=80", "--jobs=1", "--match", "scratch/add_l*", "--match", "spills"],
    )
    # 16 bits and head dimension 64 of the one kernel, fp32 of those that have nothing else.
    assert listed[:2] == [
        0,
        "scratch/fp16_d64\nscratch/add_aligned\nscratch/add_loose\nscratch/spills\nscratch/wrong\n",
    ]
    assert "scratch: 5 chosen, 5 by default, 10 in all" in listed[2]
    assert len(everything[1].splitlines()) == 10
    assert failed[0] == 1
    assert same[:2] == [0, "old: 12 kernels, all as the index says\n"]  # the failure leaves existing files untouched
    assert replaced[0] == 0, replaced[2]
    found = entries(room / "old")
    assert set(found) == {("add_loose", 80), ("spills", 80)}
    assert check_index(room / "old")["sources"]["aot_room.py"] == hashlib.sha256(ROOM.encode()).hexdigest()
    assert found["add_loose", 80]["spill_bytes"] == 0
    assert found["spills", 80]["spill_bytes"] > 1000
    assert "bytes spilled" in replaced[2]
    assert not [path for path in room.iterdir() if path.name.startswith(".")]


def test_a_dying_compiler_is_named(tmp_path: Path) -> None:
    command = ["--out", "x", "--sm", "80", "--match", "add_*", "--jobs", "2"]
    ((code, _, err),) = run(tmp_path / "room", command, dies=True)
    assert code == 1
    assert "a compiling process died; it was at one of: scratch/add_aligned for sm_80" in err
    assert not (tmp_path / "room/x").exists()


def test_without_triton(built: Path, tmp_path: Path) -> None:
    """Nothing can be compiled, but a folder can be checked, even without torch."""
    build, check = run(
        tmp_path / "room", ["--sm", "80", "--out", "x"], ["--check", str(built)], without=("triton", "torch")
    )
    assert build[0] == 3
    assert "triton cannot be imported" in build[2]
    assert check[0] == 0


@pytest.mark.parametrize("name", ["TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION", "PTXAS_OPTIONS"])
def test_an_environment_that_changes_the_code_is_refused(tmp_path: Path, name: str) -> None:
    """Through the command, as a user starts it; set to "0" if that is not the default, else to "1"."""
    value = "0" if name == "TRITON_DEFAULT_FP_FUSION" else "1"
    done = subprocess.run(
        [sys.executable, "-m", "vp_kernels.aot", "--sm", "80", "--out", str(tmp_path / "x")],
        capture_output=True, text=True, timeout=LONG, env=environment(**{name: value}),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"vp_kernels.aot: {name} is set, and changes what is compiled; "
        f"expected it unset: env -u {name} python ...\n"
    )  # fmt: skip


def test_grid_expressions() -> None:
    sizes = {"B": 3, "N": 197}
    assert grid_size("cdiv(N, 64) * B", sizes) == 12
    assert grid_size("min(B, 2) + max(N // 2, 7) - 1", sizes) == 99
    for bad in ("B / 2", "B ** 9", "len(B)", "B if N else 1", "M", "1.5", "True", "", "cdiv(B)", "B // 0", "(" * 999):
        with pytest.raises(AotError, match="grid expression"):
            grid_size(bad, sizes)
