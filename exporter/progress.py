"""How long work tells where it is, without knowing who listens (a terminal, a log, nobody)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives progress. The command line draws it (vp_exporter.cli.console); libraries default to `SILENT`."""

    def stage(self, description: str) -> AbstractContextManager[None]:
        """A context: a step of unknown length, as `with progress.stage("building the engine"):`."""
        ...

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        """Yield the items, drawing a bar of `total` steps."""
        ...

    def note(self, text: str) -> None:
        """One line the user should see."""
        ...

    def warn(self, text: str) -> None:
        """One line the user must see."""
        ...


class SilentProgress:
    """Says nothing."""

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        yield

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        yield from items

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


SILENT = SilentProgress()
