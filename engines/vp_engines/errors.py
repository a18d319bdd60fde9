"""The one exception tree of the project, and the exit code that each branch means on the command line.

Every message says what was found, what was expected and what to do, in one line: the constructor asks for the
three parts, so that none is forgotten.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUDGET_MISSED = 1
EXIT_BAD_INPUT = 2
EXIT_ENGINE_UNAVAILABLE = 3


class VpError(Exception):
    """An error whose message a user can act on.

    Args:
        found: what was found, with the offending value.
        expected: what should have been there; left out where `found` says it already.
        fix: what to do about it.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found, f"expected {expected}" if expected else "", fix]
        super().__init__("; ".join(part for part in parts if part))


class InputError(VpError):
    """An array given to a runner has the wrong shape, dtype or name."""


class EngineUnavailableError(VpError):
    """An engine cannot work here: a package, a device or a library is missing."""

    exit_code = EXIT_ENGINE_UNAVAILABLE


class PackageMissingError(VpError):
    """A package that an extra installs is missing or broken."""

    exit_code = EXIT_ENGINE_UNAVAILABLE


class BuildError(VpError):
    """An engine refused to build what it was given."""


class BundleError(VpError):
    """A bundle cannot be used or written."""


class BundleCorruptError(BundleError):
    """A bundle is not what its manifest says: a missing, extra, altered or truncated file, or an unsafe path."""


class BundleIncompatibleError(BundleError):
    """A sound bundle that this version or this machine cannot run."""
