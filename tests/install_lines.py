"""Install commands in README and docs, and the commands that follow each, parsed from the pages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INSTALL = re.compile(r"pip install '(?:\.|vp-export)\[([a-z0-9,-]+)\]'")
COMMAND = re.compile(r"^(?:vp-[a-z]+|python -m vp_[a-z_.]+)(?=\s|$)")


@dataclass
class Line:
    """An install command and the commands up to the next one on its page."""

    page: str
    extras: tuple[str, ...]
    commands: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.page}-{'+'.join(self.extras)}"


def install_lines() -> list[Line]:
    """All install commands, in page order; equal extras on one page are merged. Records of past runs are excluded."""
    pages = [page for page in PAGES if page.parent.name not in ("decisions", "results")]
    return [line for page in pages for line in _of_page(_name(page), page.read_text())]


def _name(page: Path) -> str:
    """README.md, embedding.md, howto/export.md."""
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


def _of_page(name: str, text: str) -> list[Line]:
    found: dict[tuple[str, ...], Line] = {}
    current: Line | None = None
    in_code, whole = False, ""
    for raw in text.splitlines():
        if raw.startswith("```"):
            in_code = not in_code
            continue
        for extras in INSTALL.findall(raw):
            key = tuple(extras.split(","))
            current = found.setdefault(key, Line(name, key))
        if not in_code and not raw.startswith("    "):
            continue
        whole += raw.strip()
        if whole.endswith("\\"):
            whole = whole[:-1] + " "
            continue
        command, whole = whole, ""
        if current is not None and COMMAND.match(command) and "..." not in command:
            current.commands.append(shlex.join(shlex.split(command, comments=True)))
    return list(found.values())
