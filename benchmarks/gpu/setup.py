"""Bootstrap of the GPU benchmark, before any of our packages can be imported: names, folders, the tests' criterion.

The target machine has torch, triton, timm and numpy, but neither our packages nor pydantic.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"vp_exporter": "exporter", "vp_kernels": "kernels", "vp_engines": "engines"}
OPERATORS = ("attention", "gather_norm", "select", "merge_rows", "match_merge", "density_merge")


def bootstrap() -> bool:
    """Make the packages of this working tree importable.

    An installation from another tree is ignored: the code beside this script is what is measured. The folders are added
    to PYTHONPATH too, for child processes of ours and of the compiler.

    Returns:
        Whether the path had to change.
    """
    if all(_is_ours(name, folder) for name, folder in PACKAGES.items()):
        return False
    folders = [str(ROOT / folder) for folder in PACKAGES.values()]
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH", "")]))
    importlib.invalidate_caches()
    return True


def _is_ours(name: str, folder: str) -> bool:
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return any(Path(place).resolve() == ROOT / folder / name for place in places)


@cache
def of_the_tests(name: str) -> ModuleType:
    """Load tests/kernels/NAME.py, for the tests' accuracy criterion. By path, since `tests` may be another package."""
    spec = importlib.util.spec_from_file_location(f"vp_kernel_test_{name}", ROOT / "tests" / "kernels" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def complete_interpreter() -> None:
    """Patch Triton's interpreter as the tests do: rounds to bf16 as a GPU does."""
    of_the_tests("interpreter").complete_interpreter()


def part_of(operator: str, file: str, name: str) -> Any:
    """A function of an operator's package: part_of("attention", "reference", "attention_reference").

    Raises:
        LookupError: if the package has no such file or function (yet).
    """
    try:
        module = importlib.import_module(f"vp_kernels.{operator}.{file}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("vp_kernels"):
            raise LookupError(f"kernels/vp_kernels/{operator}/{file}.py does not exist") from error
        raise
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise LookupError(f"kernels/vp_kernels/{operator}/{file}.py has no {name}") from error


def fingerprint(*places: str) -> str:
    """Short hash of source files and folders of the repository: rows measured with other sources are measured again."""
    found = hashlib.sha256()
    for path in sorted(_sources(places)):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _sources(places: Iterable[str]) -> Iterable[Path]:
    for place in places:
        path = ROOT / place
        yield from path.rglob("*.py") if path.is_dir() else [path] if path.is_file() else []


def first_line(error: BaseException) -> str:
    """First non-empty line of an error, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
