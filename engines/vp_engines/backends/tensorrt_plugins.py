"""Selects the TensorRT plugin library (docs/plugins.md) of this process and checks it against a bundle.

The library is not part of a bundle: a server loads one for all of its engines. The environment variable VP_PLUGINS
names it, for builds and runs; a bundle records its sha256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vp_engines.errors import BuildError, BundleIncompatibleError

VARIABLE = "VP_PLUGINS"
HOW = f"set {VARIABLE} to the path of libvp_plugins.so"


def chosen() -> Path | None:
    """The library that VP_PLUGINS names, or None.

    Raises:
        BuildError: if it names something that is not a file.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    path = Path(named).absolute()
    if not path.is_file():
        raise BuildError(f"{VARIABLE} is {named}, which is no file", expected="libvp_plugins.so", fix=HOW)
    return path


def requirement(library: Path) -> dict[str, str]:
    """Name and sha256 of a library, for the manifest."""
    return {"library": library.name, "sha256": hashlib.sha256(library.read_bytes()).hexdigest()}


def required(wanted: Mapping[str, Any]) -> Path:
    """The library for a bundle whose requirements include `wanted` (from `requirement`).

    Raises:
        BundleIncompatibleError: if this process has no library, or a different one.
    """
    expected = f"{wanted.get('library')} with sha256 {str(wanted.get('sha256'))[:12]}..."
    try:
        library = chosen()
    except BuildError as error:
        raise BundleIncompatibleError(error.found, expected=expected, fix=HOW) from error
    if library is None:
        raise BundleIncompatibleError("no library of TensorRT plugins is given", expected=expected, fix=HOW)
    found = requirement(library)["sha256"]
    if found != wanted.get("sha256"):
        raise BundleIncompatibleError(
            f"{library.name} has sha256 {found[:12]}...", expected=expected, fix=f"{HOW} that the bundle was built with"
        )
    return library
