"""The versions installed for the lowest and newest test runs match pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from vp_engines.backends.ort_versions import OLDEST

ROOT = Path(__file__).resolve().parent.parent
# Tools of the test suite rather than requirements of the package; `make test-lowest` takes any version.
TOOLS = {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "import-linter", "torchvision"}
TOOLS |= {"packaging", "setuptools", "vp-export", "mkdocs-material", "mkdocstrings", "nbclient", "ipykernel"}


def declared() -> dict[str, Version]:
    """Package -> its lower bound, over all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, Version] = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.name in TOOLS:
            continue
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if not bounds and requirement.name in found:  # bound given in another extra
            continue
        assert len(bounds) == 1, f"{line} has no lower bound"
        bound = Version(bounds[0])
        assert found.setdefault(requirement.name, bound) == bound, f"{requirement.name} has two lower bounds"
    return found


def constraints(name: str, operator: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    assert all([each.operator for each in line.specifier] == [operator] for line in parsed)
    return {line.name: Version(next(iter(line.specifier)).version) for line in parsed}


def test_the_lowest_leg_installs_the_lower_bounds() -> None:
    assert constraints("constraints-lowest.txt", "==") == declared()


def test_the_newest_leg_is_newer_than_the_suite() -> None:
    """Its file records the newest versions that have passed."""
    newest, pinned = constraints("constraints-newest.txt", ">="), constraints("constraints.txt", "==")
    assert newest["torch"] >= Version("2.14")
    assert newest["torch"] > pinned["torch"]
    older = {name for name in newest if name in pinned and newest[name] < pinned[name]}
    assert not older


def test_the_readers_onnxruntime_is_the_declared_one() -> None:
    assert declared()["onnxruntime"] == declared()["onnxruntime-gpu"] == Version(OLDEST)


@pytest.mark.parametrize("name", ["timm", "torch", "onnxruntime"])
def test_the_suite_runs_with_what_is_declared(name: str) -> None:
    assert constraints("constraints.txt", "==")[name] >= declared()[name]
