"""Checks of the documentation site that do not need mkdocs; `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, ignoring unknown tags."""


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in pages(each)]


def test_every_page_is_in_the_navigation() -> None:
    found = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(found) == len(set(found))
    assert set(found) == written | set(HOOKS["COPIED"].values()) | {"reference/commands.md"}


@pytest.mark.parametrize("name", HOOKS["COMMANDS"])
def test_the_reference_has_every_option(name: str) -> None:
    page, command = HOOKS["commands_page"](), HOOKS["command_of"](name)
    for each in getattr(command, "commands", {"": command}).values():
        for option in each.params:
            if option.param_type_name == "option":
                assert f"`{option.opts[0]}`" in page
    assert f"## vp-{name}" in page


def test_pages_of_the_root_link_as_seen_from_docs() -> None:
    for source in HOOKS["COPIED"]:
        page = HOOKS["as_page"]((ROOT / source).read_text())
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page):
            known = {*HOOKS["COPIED"].values(), "reference/commands.md"}
            assert re.match(r"[a-z]+:", target) or target in known or (ROOT / "docs" / target).exists(), target
