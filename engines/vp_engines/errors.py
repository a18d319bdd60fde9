"""Exceptions of the project, and the exit code of each.

Every message says what was found, what was expected and what to do, in one line; the constructor takes these three
parts.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUDGET_MISSED = 1
EXIT_BAD_INPUT = 2
EXIT_ENGINE_UNAVAILABLE = 3


class VpError(Exception):
    """An error that the user can act on.

    Args:
        found: What was found, including the offending value.
        expected: What was expected; omit if `found` implies it.
        fix: What to do about it.

    Examples:
        >>> from vp_engines import VpError
        >>> print(VpError("`threads` is 0", expected="1 or more", fix="leave it out"))
        `threads` is 0; expected 1 or more; leave it out
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found, f"expected {expected}" if expected else "", fix]
        super().__init__("; ".join(part for part in parts if part))


class InputError(VpError):
    """An array passed to a runner has the wrong shape, dtype or name."""


class EngineUnavailableError(VpError):
    """An engine cannot work here: a package, device or library is missing."""

    exit_code = EXIT_ENGINE_UNAVAILABLE


class PackageMissingError(VpError):
    """A package of an extra is missing or broken."""

    exit_code = EXIT_ENGINE_UNAVAILABLE


class BuildError(VpError):
    """An engine cannot build the model."""


class BundleError(VpError):
    """A bundle cannot be used or written."""


class BundleCorruptError(BundleError):
    """A bundle differs from its manifest: a missing, extra, altered or truncated file, or an unsafe path."""


class BundleIncompatibleError(BundleError):
    """A valid bundle that this version or machine cannot run."""
