"""Every operator's kernels compile for three GPU generations, within their limits of registers and shared memory."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.kernels.aot.test_command import assembled, declared, environment
from tests.pairwise import covering
from vp_kernels.aot import check_index

# Sequential compilation: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.slow
# Shared memory available to a block, from NVIDIA's programming guide for 8.0, 9.0 and 12.0.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# Per thread. Values that live across a long loop may be spilled; a tile that does not fit spills hundreds of bytes.
SPILL_BYTES = 128
# One fp32 and one 16-bit variant of each kernel: of those for ViT-S/16, the middle one, since the first is often
# trivial and the last takes longest to compile.
CHOOSE = """
import json
from vp_kernels.aot.compile import prepare_environment, rooms, variants_of

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
    chosen[operator] = []
    for (kernel, _), found in groups.items():
        names = found[True] or found[False]
        chosen[operator].append([kernel, names[len(names) // 2]])
print(json.dumps(chosen))
"""


def command(*words: str, folder: Path) -> str:
    """Run Python with kernels that compile; returns its stdout."""
    done = warm.run(words, cwd=folder, env=environment(TRITON_CACHE_DIR=str(folder / "cache")))
    assert done.returncode == 0, done.stderr
    return done.stdout


# As a user would build them, one generation after another.
BUILD = """
import json, sys
from vp_kernels.aot.command import main

if __name__ == "__main__":
    for sm, names in json.loads(sys.argv[1]).items():
        words = [f"--match={name}" for name in names]
        assert main(["--out", sm, "--jobs", "1", f"--sm={sm}", *words]) == 0
"""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Kernels and variants of each operator that are built here."""
    found: dict[str, list[tuple[str, str]]] = json.loads(
        command("-c", CHOOSE, folder=tmp_path_factory.mktemp("choose"))
    )
    return found


@pytest.fixture(scope="module", params=["pairs", pytest.param("all", marks=pytest.mark.exhaustive)])
def wanted(chosen: dict[str, list[tuple[str, str]]], request: pytest.FixtureRequest) -> list[tuple[str, str, int]]:
    """(operator, variant, sm): all for all three, or every variant once and every operator for all three."""
    names = [(operator, *each) for operator, names in chosen.items() for each in names]
    rows = [(*each, sm) for each in names for sm in SHARED_BYTES]
    some = covering([{(operator, name), (operator, sm)} for operator, _, name, sm in rows])
    kept = some if request.param == "pairs" else range(len(rows))
    return [(rows[at][0], rows[at][2], rows[at][3]) for at in kept]


@pytest.fixture(scope="module")
def built(wanted: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folder of each generation."""
    folder = tmp_path_factory.mktemp("operators")
    jobs = {sm: [f"{operator}/{name}" for operator, name, each in wanted if each == sm] for sm in SHARED_BYTES}
    (folder / "build.py").write_text(BUILD)  # a file, since the processes that it starts import it
    command("build.py", json.dumps(jobs), folder=folder)
    return [folder / str(sm) for sm in SHARED_BYTES]


def entries(built: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Every entry, with its folder."""
    return [(folder, entry) for folder in built for entry in check_index(folder)["entries"]]


def test_every_operator_is_there(
    chosen: dict[str, list[tuple[str, str]]], wanted: list[tuple[str, str, int]], built: list[Path]
) -> None:
    package = Path(__file__).parents[3] / "kernels" / "vp_kernels"
    operators = {each.parent.name for each in package.glob("*/kernel.py")}
    assert set(chosen) == operators
    assert not [operator for operator, names in chosen.items() if not names], "a kernel.py without variants()"
    found = [entry for _, entry in entries(built)]
    assert {(each["operator"], each["variant"], each["sm"]) for each in found} == set(wanted)
    assert {(each["operator"], each["sm"]) for each in found} == set(itertools.product(operators, SHARED_BYTES))
    for operator in operators:
        dtypes = {each["dtype"] for each in found if each["operator"] == operator}
        assert "fp32" in dtypes, operator
        assert dtypes & {"fp16", "bf16"}, operator
        for folder in built:
            assert f"{operator}/kernel.py" in check_index(folder)["sources"]


def test_each_fits_its_gpu(built: list[Path]) -> None:
    wrong: list[str] = []
    for _, entry in entries(built):
        name = f"{entry['operator']}/{entry['variant']} for sm_{entry['sm']}"
        shared = entry["shared"]["static"] + entry["shared"]["dynamic"]
        if entry["spill_bytes"] > SPILL_BYTES:
            wrong.append(f"{name} spills {entry['spill_bytes']} bytes a thread")
        if shared > SHARED_BYTES[entry["sm"]]:
            wrong.append(f"{name} takes {shared} bytes of shared memory")
        if entry["threads"] > 1024 or entry["registers"] * entry["threads"] > 65536:
            wrong.append(f"{name} takes {entry['registers']} registers in {entry['threads']} threads")
    assert not wrong, "\n".join(wrong)


def test_each_is_what_its_entry_says(built: list[Path]) -> None:
    """By parsers independent of the builder's."""
    for folder, entry in entries(built):
        ptx = declared((folder / entry["ptx"]["path"]).read_text())
        cubin = assembled((folder / entry["cubin"]["path"]).read_bytes(), entry["entry"])
        sizes: list[Any] = [cubin["sizes"][i] for i in range(len(cubin["sizes"]))]
        assert ptx["types"] == [each["type"] for each in entry["parameters"]]
        assert sizes == [each["bytes"] for each in entry["parameters"]]
        assert (ptx["threads"], 1, 1) == cubin["threads"] == (entry["threads"], 1, 1)
        assert (ptx["entry"], ptx[".target"], cubin["sm"]) == (entry["entry"], entry["arch"], entry["sm"])
