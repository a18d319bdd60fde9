"""Installed version of vp-export."""

from __future__ import annotations

from functools import cache


@cache
def installed_version() -> str:
    """Version from the package's metadata; "0+unknown" when run from a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vp-export")
    except PackageNotFoundError:
        return "0+unknown"
