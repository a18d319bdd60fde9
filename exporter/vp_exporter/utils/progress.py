"""Interface for reporting the progress of long work to a terminal, a log, or nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives progress.

    The command line draws it (vp_exporter.cli.console), the public functions log it (`LoggingProgress`); elsewhere the
    default is `SILENT`.
    """

    def stage(self, description: str) -> AbstractContextManager[None]:
        """Context of a step of unknown length: `with progress.stage("building the engine"):`."""
        ...

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        """Yield the items, showing a bar of `total` steps."""
        ...

    def note(self, text: str) -> None:
        """Report a line for information."""
        ...

    def warn(self, text: str) -> None:
        """Report a warning."""
        ...


class SilentProgress:
    """Ignores all progress."""

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        yield

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        yield from items

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


SILENT = SilentProgress()


class LoggingProgress:
    """Writes to the logger "vp_exporter": warnings as such, everything else as info."""

    def __init__(self) -> None:
        self._log = logging.getLogger("vp_exporter")

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        self._log.info("%s ...", description)
        yield

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        self._log.info("%s: %d ...", description, total)
        yield from items

    def note(self, text: str) -> None:
        self._log.info("%s", text)

    def warn(self, text: str) -> None:
        self._log.warning("%s", text)


class Recording:
    """Forwards progress and keeps the warnings, which also belong in the report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.warnings: list[str] = []

    def stage(self, description: str) -> AbstractContextManager[None]:
        return self._progress.stage(description)

    def track(self, items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
        return self._progress.track(items, total=total, description=description)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._progress.warn(text)


def recording(progress: Progress) -> Recording:
    """Wrap `progress`, unless it already records, so that earlier warnings are kept."""
    return progress if isinstance(progress, Recording) else Recording(progress)
