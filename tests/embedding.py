"""Code and commands from docs/embedding.md, for tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "embedding.md"


def blocks(title: str, language: str) -> list[str]:
    """Code blocks of a section.

    Args:
        title: Title of the section.
        language: Language of the blocks: "bash", "python", "c", "cmake".
    """
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return [
        text
        for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", found[1], re.MULTILINE | re.DOTALL)
        if kind == language
    ]


def replaced(text: str, names: dict[str, str]) -> str:
    """Replace names in a block; each must occur."""
    for old, new in names.items():
        assert old in text, f"{old!r} is not in:\n{text}"
        text = text.replace(old, new)
    return text


def words(line: str, names: dict[str, str]) -> list[str]:
    """Split a shell command into words with names replaced (values may contain spaces); each must occur."""
    for old in names:
        assert old in line, f"{old!r} is not in:\n{line}"
    found = shlex.split(line)
    for old, new in names.items():
        found = [word.replace(old, new) for word in found]
    return found
