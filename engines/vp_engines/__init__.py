"""Load and run the bundles that vp-export writes.

    import vp_engines

    with vp_engines.load("deit_small.vpe") as engine:
        logits = engine.run(engine.preprocess(["cat.jpg"]))["logits"]

Importing this package imports no engine, no pydantic and no Pillow; they are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vp_engines.errors import (
    BuildError,
    BundleCorruptError,
    BundleError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
    PackageMissingError,
    VpError,
)
from vp_engines.version import installed_version

if TYPE_CHECKING:
    from vp_engines.bundle import read_manifest, verify_bundle
    from vp_engines.engine import Engine, load
    from vp_engines.manifest import Manifest, Preprocessing
    from vp_engines.serving.triton.repository import ServeOptions, write_repository

    __version__: str

__all__ = [
    "BuildError",
    "BundleCorruptError",
    "BundleError",
    "BundleIncompatibleError",
    "Engine",
    "EngineUnavailableError",
    "InputError",
    "Manifest",
    "PackageMissingError",
    "Preprocessing",
    "ServeOptions",
    "VpError",
    "__version__",
    "load",
    "read_manifest",
    "verify_bundle",
    "write_repository",
]

_LAZY = {
    "Engine": "vp_engines.engine",
    "Manifest": "vp_engines.manifest",
    "Preprocessing": "vp_engines.manifest",
    "ServeOptions": "vp_engines.serving.triton.repository",
    "load": "vp_engines.engine",
    "read_manifest": "vp_engines.bundle",
    "verify_bundle": "vp_engines.bundle",
    "write_repository": "vp_engines.serving.triton.repository",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = installed_version()
    elif name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'vp_engines' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
