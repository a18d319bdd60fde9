"""Engine backends by name. Each engine is a file in this folder."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from vp_engines.backends.base import Backend
from vp_engines.errors import VpError

# Engine -> file. Lists the engines that come first, in order, and those that share a file.
_FILES = {"ort": "ort", "openvino": "openvino", "aoti": "aoti", "trt": "tensorrt", "trt-rtx": "tensorrt"}
# Modules shared by backends.
_SHARED = frozenset({"base", "ort_versions", "recording", "recording_runner", "tensorrt_build", "tensorrt_plugins"})
_FILES |= {
    module.name.replace("_", "-"): module.name
    for module in iter_modules(__path__)
    if module.name not in _SHARED and module.name not in _FILES.values()
}

ENGINES: tuple[str, ...] = tuple(_FILES)


def get_backend(name: str) -> Backend:
    """The backend called `name`; its module is imported on demand.

    Raises:
        VpError: if no engine has that name.
    """
    if name not in _FILES:
        raise VpError(f"unknown engine '{name}'", expected=f"one of {', '.join(ENGINES)}")
    found = vars(import_module(f"{__name__}.{_FILES[name]}")).values()
    kinds = (kind for kind in found if isinstance(kind, type) and issubclass(kind, Backend))
    return next(kind for kind in kinds if getattr(kind, "name", None) == name)()
