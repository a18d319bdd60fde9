"""Entry points of the console scripts. An incomplete install fails with one line that names what is missing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from vp_engines.errors import VpError


def _start(command: str) -> None:
    from vp_engines.errors import VpError
    from vp_engines.extras import EXTRAS, missing_package, require_packages

    try:
        # Required dependencies, which are missing only after an install without dependencies.
        if command != "doctor":  # reports missing packages itself
            require_packages(f"vp-{command}", "", EXTRAS[""], load=False)
        module = import_module(f"vp_exporter.cli.{command}")
    except VpError as error:
        _fail(error)
    except ImportError as error:
        found = missing_package(error)
        if found is None:
            raise
        _fail(found)
    module.main()


def _fail(error: VpError) -> NoReturn:
    from vp_engines.command_line import in_options

    sys.stderr.write(f"error: {in_options(str(error))}\n")
    sys.exit(error.exit_code)


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


def vp_doctor() -> None:
    """vp-doctor"""
    _start("doctor")
