"""The commands. The console scripts start here, so that a server-only install says what it lacks in one line."""

from __future__ import annotations

import sys
from importlib import import_module


def _start(command: str) -> None:
    try:
        module = import_module(f"vp_exporter.cli.{command}")
    except ModuleNotFoundError as error:
        from vp_engines.errors import EXIT_ENGINE_UNAVAILABLE

        sys.stderr.write(
            f"error: {error.name} is not installed; expected the export tools; pip install 'vp-export[export,cpu]'\n"
        )
        sys.exit(EXIT_ENGINE_UNAVAILABLE)
    module.main()


def vp_export() -> None:
    """vp-export"""
    _start("export")


def vp_inspect() -> None:
    """vp-inspect"""
    _start("inspect")


def vp_validate() -> None:
    """vp-validate"""
    _start("validate")


def vp_search() -> None:
    """vp-search"""
    _start("search")


def vp_profile() -> None:
    """vp-profile"""
    _start("profile")


def vp_serve() -> None:
    """vp-serve"""
    _start("serve")
