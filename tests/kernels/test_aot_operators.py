"""Every operator's kernels compile for three generations of GPUs, inside what those have: registers, shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.test_aot import assembled, declared, environment
from tests.waiting import LONG
from vp_kernels.aot import check_index

# One compilation after another: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.slow
# Shared memory that one block may take, as NVIDIA's programming guide has it for 8.0, 9.0 and 12.0.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# Of a thread. What is alive across a long loop may rest in local memory; a tile that does not fit spills hundreds.
SPILL_BYTES = 128
# One variant in fp32 and one in 16 bits of each kernel: of those that ViT-S/16 can use, the middle one, since the first
# is often trivial and the last takes longest to compile.
CHOOSE = """
import json
from vp_kernels.aot_compile import prepare_environment, rooms, variants_of

SIZES = {"d": 64, "D": 384, "H": 6, "N": 197, "n": 196}


def fits(limit, size):
    low, high = limit if isinstance(limit, (tuple, list)) else (limit, limit)
    return low <= size <= high


prepare_environment()
chosen = {}
for operator, module in rooms().items():
    groups = {}
    for each in variants_of(module, operator).values():
        usual = all(fits(each.shapes.get(name, size), size) for name, size in SIZES.items())
        key = (each.config.kernel.fn.__name__, each.dtype == "fp32")
        groups.setdefault(key, {True: [], False: []})[usual].append(each.name)
    chosen[operator] = [(found[True] or found[False]) for found in groups.values()]
    chosen[operator] = [names[len(names) // 2] for names in chosen[operator]]
print(json.dumps(chosen))
"""


def command(*words: str, folder: Path) -> str:
    """Run Python with kernels that compile; its stdout."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=LONG,
        env=environment(TRITON_CACHE_DIR=str(folder / "cache")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The variants of each operator that are built here."""
    found: dict[str, list[str]] = json.loads(command("-c", CHOOSE, folder=tmp_path_factory.mktemp("choose")))
    return found


@pytest.fixture(scope="module")
def built(chosen: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them for all three, as a user would build them."""
    folder = tmp_path_factory.mktemp("operators")
    words = [f"--match={operator}/{name}" for operator, names in chosen.items() for name in names]
    words += [f"--sm={sm}" for sm in SHARED_BYTES]
    command("-m", "vp_kernels.aot", "--out", "built", "--jobs", "2", *words, folder=folder)
    return folder / "built"


def test_every_operator_is_there(chosen: dict[str, list[str]], built: Path) -> None:
    package = Path(__file__).parents[2] / "kernels"
    operators = {each.parent.name for each in package.glob("*/kernel.py")}
    assert set(chosen) == operators
    assert not [operator for operator, names in chosen.items() if not names], "a kernel.py without variants()"
    index = check_index(built)
    built_names = {(each["operator"], each["variant"], each["sm"]) for each in index["entries"]}
    wanted = {(operator, name) for operator, names in chosen.items() for name in names}
    assert built_names == {(*each, sm) for each in wanted for sm in SHARED_BYTES}
    for operator in operators:
        dtypes = {each["dtype"] for each in index["entries"] if each["operator"] == operator}
        assert "fp32" in dtypes, operator
        assert dtypes & {"fp16", "bf16"}, operator
        assert f"{operator}/kernel.py" in index["sources"]


def test_each_fits_its_gpu(built: Path) -> None:
    wrong: list[str] = []
    for entry in check_index(built)["entries"]:
        name = f"{entry['operator']}/{entry['variant']} for sm_{entry['sm']}"
        shared = entry["shared"]["static"] + entry["shared"]["dynamic"]
        if entry["spill_bytes"] > SPILL_BYTES:
            wrong.append(f"{name} spills {entry['spill_bytes']} bytes a thread")
        if shared > SHARED_BYTES[entry["sm"]]:
            wrong.append(f"{name} takes {shared} bytes of shared memory")
        if entry["threads"] > 1024 or entry["registers"] * entry["threads"] > 65536:
            wrong.append(f"{name} takes {entry['registers']} registers in {entry['threads']} threads")
    assert not wrong, "\n".join(wrong)


def test_each_is_what_its_entry_says(built: Path) -> None:
    """By readers that share nothing with the builder's."""
    for entry in check_index(built)["entries"]:
        ptx = declared((built / entry["ptx"]["path"]).read_text())
        cubin = assembled((built / entry["cubin"]["path"]).read_bytes(), entry["entry"])
        sizes: list[Any] = [cubin["sizes"][i] for i in range(len(cubin["sizes"]))]
        assert ptx["types"] == [each["type"] for each in entry["parameters"]]
        assert sizes == [each["bytes"] for each in entry["parameters"]]
        assert (ptx["threads"], 1, 1) == cubin["threads"] == (entry["threads"], 1, 1)
        assert (ptx["entry"], ptx[".target"], cubin["sm"]) == (entry["entry"], entry["arch"], entry["sm"])
