"""The version of vp-export that is installed."""

from __future__ import annotations

from functools import cache


@cache
def installed_version() -> str:
    """As the package's metadata has it; "0+unknown" where it is run from a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vp-export")
    except PackageNotFoundError:
        return "0+unknown"
