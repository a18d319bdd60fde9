"""Consistency of pyproject.toml, CHANGELOG.md, CITATION.cff and other files for maintainers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def load(name: str) -> dict:
    found = yaml.safe_load(read(name))
    assert isinstance(found, dict)
    return found


def test_one_version_and_one_date() -> None:
    releases = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", read("CHANGELOG.md"), re.MULTILINE)
    version, date = releases[0]
    citation = load("CITATION.cff")
    assert PROJECT["version"] == version == citation["version"]
    assert date == str(citation["date-released"])
    assert PROJECT["license"] == citation["license"]
    assert sorted(releases, key=lambda each: each[1], reverse=True) == releases
    assert read("CHANGELOG.md").index("## Unreleased") < read("CHANGELOG.md").index(f"## {version}")


def test_addresses_are_true_or_say_that_they_are_none() -> None:
    hosts = {url.split("/")[2] for url in PROJECT["urls"].values()}
    assert hosts == {"vp-export.example"}  # reserved by RFC 2606, so it belongs to nobody
    assert "[project.urls]" in read("docs/releasing.md")


def test_python_versions() -> None:
    lowest = PROJECT["requires-python"].removeprefix(">=")
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert named[0] == lowest


def test_pre_commit_runs_the_tools_of_the_suite() -> None:
    pinned = dict(line.split("==") for line in read("constraints.txt").splitlines() if "==" in line)
    for repository in load(".pre-commit-config.yaml")["repos"]:
        if "ruff" in repository["repo"]:
            assert repository["rev"] == f"v{pinned['ruff']}"


def test_workflows_run_what_exists() -> None:
    """`.ci/run`, and targets of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (legs,) = load(".github/workflows/nightly.yml")["jobs"].values()
    assert set(legs["strategy"]["matrix"]["target"]) <= targets


def test_decisions_are_numbered_and_listed() -> None:
    files = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
    for number, file in enumerate(files, 1):
        title = file.read_text().splitlines()[0].removeprefix(f"# {number}. ")
        assert f"| {number} | [{title}]({file.name}) |" in read("docs/decisions/README.md")


def test_readme_counts_the_models() -> None:
    counted = re.search(r"^(\d+) of \d+ models are supported", read("docs/models.md"), re.MULTILINE)
    assert counted is not None
    assert f"({counted[1]} of timm's ViTs)" in read("README.md")


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.relative_to(ROOT)}: {target}"
