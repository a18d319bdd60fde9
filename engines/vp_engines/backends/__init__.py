"""The engine backends by name. Adding an engine: write its file in this folder, add one line here."""

from __future__ import annotations

from importlib import import_module

from vp_engines.backends.base import Backend
from vp_engines.errors import VpError

# --engine name -> module and class; a module is imported only when its engine is asked for.
_BACKENDS = {
    "ort": ("vp_engines.backends.ort", "OnnxRuntimeBackend"),
    "openvino": ("vp_engines.backends.openvino", "OpenVinoBackend"),
    "aoti": ("vp_engines.backends.aoti", "AotInductorBackend"),
    "trt": ("vp_engines.backends.tensorrt", "TensorRtBackend"),
    "trt-rtx": ("vp_engines.backends.tensorrt", "TensorRtRtxBackend"),
}

ENGINES: tuple[str, ...] = tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        VpError: no engine has that name.
    """
    if name not in _BACKENDS:
        raise VpError(f"unknown engine '{name}'", expected=f"one of {', '.join(ENGINES)}")
    module, cls = _BACKENDS[name]
    backend: Backend = getattr(import_module(module), cls)()
    return backend
