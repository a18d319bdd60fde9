"""Packages of each pip extra, and a check for missing ones before work starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from vp_engines.errors import PackageMissingError

# extra -> modules that it installs, besides those of the extras that it includes. "" is always installed.
# A test checks this against pyproject.toml.
EXTRAS: dict[str, tuple[str, ...]] = {
    "": ("numpy", "pydantic", "PIL", "typer", "rich", "jinja2"),
    "export": ("torch", "timm", "onnx", "onnxscript", "safetensors"),
    "search": ("scipy", "matplotlib"),
    "profile": ("matplotlib",),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime",),
    "openvino": ("openvino",),
    "aoti": ("torch",),
    "trt": ("tensorrt", "polygraphy"),
    "trt-rtx": ("tensorrt_rtx", "polygraphy"),
    "serve": ("tritonclient.grpc",),
    "ray": ("ray.serve",),
    "demo": ("mlxtend",),
}


def installed(module: str) -> bool:
    """Whether `module` can be found, without importing it (torch takes seconds)."""
    parent = module.rpartition(".")[0]
    if parent and not installed(parent):
        return False
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a broken parent package
        return False


def install_hint(*extras: str) -> str:
    """pip command that installs the extras."""
    wanted = ",".join(dict.fromkeys(extra for extra in extras if extra))
    return f"pip install 'vp-export[{wanted}]'" if wanted else "pip install vp-export"


def require_packages(
    what: str, extra: str, modules: Sequence[str], *, also: Sequence[str] = (), load: bool = True
) -> None:
    """Check for optional packages before work that needs them.

    Args:
        what: What needs them, such as "vp-search".
        extra: The pip extra that installs all of them.
        modules: Import names.
        also: Further missing extras that the work needs, to be included in the pip command.
        load: Import the modules, to detect broken ones; disable if they may not be needed.

    Raises:
        PackageMissingError: if any is missing or broken; names them and the pip command.
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        which = "which is not installed" if len(missing) == 1 else "which are not installed"
        raise PackageMissingError(f"{what} needs {', '.join(missing)}, {which}", fix=install_hint(extra, *also))
    for module in modules if load else ():
        try:
            import_module(module)
        except Exception as error:  # a broken package may raise anything: ImportError, OSError, AttributeError
            raise _broken(what, module, error) from error


def missing_package(error: ImportError) -> PackageMissingError | None:
    """The error to report for a failed import; None if the module is one of ours."""
    module = (error.name or "").split(".")[0]
    if not module or module.startswith("vp_"):
        return None
    if not isinstance(error, ModuleNotFoundError):
        return _broken("this command", module, error)
    if module in sys.stdlib_module_names:
        return PackageMissingError(f"this Python has no module {module}", fix="use a Python that is built with it")
    extra = next((name for name, modules in EXTRAS.items() if module in {each.split(".")[0] for each in modules}), None)
    fix = f"pip install {module.replace('_', '-')}" if extra is None else install_hint(extra)
    return PackageMissingError(f"{module} is not installed", fix=fix)


def _broken(what: str, module: str, error: Exception) -> PackageMissingError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return PackageMissingError(
        f"{what} needs {module}, which is installed but does not import ({reason})",
        fix="install it again, with pip install --force-reinstall",
    )
