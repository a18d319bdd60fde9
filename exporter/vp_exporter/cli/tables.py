"""Tables for terminals of any width.

Text that does not fit is laid out differently, never truncated: digests and figures must be readable in full.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vp_exporter.cli.console import stdout

_NBSP = "\N{NO-BREAK SPACE}"


def words(value: Any) -> str:
    """Format a JSON value as readable text: {"a": [1, 2], "b": None} -> "a 1, 2; b none"."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        parts = [f"{key} {words(entry)}" for key, entry in value.items()]
        return ("; " if any(isinstance(entry, (list, tuple, Mapping)) for entry in value.values()) else ", ").join(
            parts
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(f"({words(entry)})" if isinstance(entry, Mapping) else words(entry) for entry in value)
    return str(value)


def heading(title: str) -> None:
    """Print a title as a separate line, because rich pads the title of a table with spaces."""
    stdout.print(Text(title, style="bold"), soft_wrap=True)


def bare(**options: Any) -> Table:
    """Create a table without borders and without padding at the edges."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **options)


def facts(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print names and values side by side.

    If a word (such as a digest) is longer than the space next to the names, the value is printed on a separate line and
    wrapped by the terminal, so that it can be copied without gaps.
    """
    if title:
        heading(title)
    indent = max(len(key) for key, _ in rows) + 2
    room = stdout.width - indent
    for key, value in rows:
        text = words(value)
        longest = max(map(len, text.split()), default=0)
        name = Text(key.ljust(indent) if text else key, style="dim")
        if longest > room:
            stdout.print(Text(key, style="dim"), soft_wrap=True)
            stdout.print(Text(f"  {text}"), soft_wrap=True)
            continue
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
        stdout.print(name + lines[0], soft_wrap=True)
        for line in lines[1:]:
            stdout.print(" " * indent + line, soft_wrap=True, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, dim: int = 0) -> None:
    """Print a table with all columns but the first right-aligned, or a paragraph per row if the terminal is too narrow.

    Args:
        columns: Column names; the first column names the rows.
        rows: Short texts.
        dim: Number of rows at the end to print dimmed.
    """
    widths = [max(len(row[column]) for row in (columns, *rows)) for column in range(len(columns))]
    first_dim = len(rows) - dim
    if sum(widths) + 2 * len(widths) <= stdout.width:
        heading(title)
        drawn = bare()
        for column, name in enumerate(columns):
            drawn.add_column(escape(name), justify="left" if column == 0 else "right", no_wrap=True)
        for number, row in enumerate(rows):
            drawn.add_row(*(escape(text) for text in row), style="dim" if number >= first_dim else "")
        stdout.print(drawn)
        return
    heading(title)
    for row in rows:
        stdout.print(Text(f"{columns[0]} {row[0]}".strip()), soft_wrap=True)
        # Do not break lines between a name and its value.
        pairs = [f"{name} {text}".replace(" ", _NBSP) for name, text in zip(columns[1:], row[1:], strict=True) if text]
        room = max(stdout.width - 2, 1)
        wrapped = textwrap.wrap(", ".join(pairs), room, break_long_words=False, break_on_hyphens=False)
        for line in wrapped:
            stdout.print("  " + line.replace(_NBSP, " "), soft_wrap=True, markup=False)
