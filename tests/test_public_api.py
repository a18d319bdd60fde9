"""The public names of the three packages: fixed lists, documented with examples that run."""

from __future__ import annotations

import ast
import contextlib
import copy
import doctest
import inspect
import pkgutil
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vp_engines
import vp_exporter
import vp_kernels
import vp_kernels.ops
from tests.exporter.cli.samples import Inputs, write_inputs
from vp_engines.backends.base import BuildResult
from vp_engines.backends.ort import OnnxRuntimeBackend

ROOT = Path(__file__).resolve().parents[1]
ERRORS = {
    "BuildError", "BundleCorruptError", "BundleError", "BundleIncompatibleError", "EngineUnavailableError",
    "InputError", "PackageMissingError", "VpError",
}  # fmt: skip
# Removing or renaming one needs a deprecation first (docs/api.md).
PUBLIC: dict[ModuleType, set[str]] = {
    vp_exporter: {
        "DataError", "Engine", "ExportResult", "ModelRequest", "PlanError", "ReducedViT", "ReductionPlan",
        "SearchError", "UnsupportedModelError", "WeightsError", "__version__", "build_plan", "export", "load",
        "profile", "reduce", "search", "validate", *ERRORS,
    },
    vp_engines: {
        "Engine", "Manifest", "Preprocessing", "ServeOptions", "__version__", "load", "read_manifest", "verify_bundle",
        "write_repository", *ERRORS,
    },
    vp_kernels: {"KernelError", "add_functions", "check_index", "function_names", "inline", "ops"},
    vp_kernels.ops: {
        "attention", "density_merge", "gather_norm", "match_merge", "merge_rows", "select", "select_fuse",
    },
}  # fmt: skip
LAZY = [vp_exporter, vp_engines, vp_kernels]


def public() -> dict[str, Any]:
    """Every public class and function by its full name, without duplicates."""
    found = {
        f"{package.__name__}.{name}": getattr(package, name)
        for package in PUBLIC
        for name in sorted(PUBLIC[package])
        if not name.startswith("__") and not inspect.ismodule(getattr(package, name))
    }
    return {name: thing for name, thing in found.items() if name == min(n for n, t in found.items() if t is thing)}


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_the_public_names(package: ModuleType) -> None:
    assert set(package.__all__) == PUBLIC[package]
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        package.exprot  # noqa: B018


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_no_module_has_the_name_of_a_function(package: ModuleType) -> None:
    """Importing package.NAME would replace the function by the module."""
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not {name for name in package.__all__ if not inspect.ismodule(getattr(package, name))} & modules


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_editors_and_type_checkers_see_the_lazy_names(package: ModuleType) -> None:
    """They read the imports under `if TYPE_CHECKING`."""
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text())
    shown = {
        alias.name
        for part in tree.body
        if isinstance(part, ast.If)
        for line in part.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert shown - {"ops"} == set(package._LAZY) - {"__version__"}


@pytest.mark.parametrize("name", public())
def test_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(public()[name]) or ""
    assert len(text) > 20
    if name.endswith("Error") and name not in ("vp_engines.VpError", "vp_kernels.KernelError"):
        return  # raised, never created by a user
    assert "Examples:" in text
    assert ">>> " in text


def parts(thing: Any) -> Iterator[str]:
    """Section headings of a docstring."""
    return (found[1] for found in re.finditer(r"^(\w+):$", inspect.getdoc(thing) or "", re.M))


@pytest.mark.parametrize("name", [name for name, thing in public().items() if inspect.isfunction(thing)])
def test_a_function_says_what_it_takes_and_raises(name: str) -> None:
    function = public()[name]
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    if name == "vp_kernels.function_names":
        return
    assert "Raises" in parts(function)
    for argument in signature.parameters:
        if argument not in ("path", "bundle", "model", "graph"):  # described by the first line
            assert re.search(rf"\b{argument}\b", text), f"{argument} of {name} is not documented"


class Examples:
    """Runs examples in one folder and one namespace, as in a session of a user."""

    def __init__(self, root: Path) -> None:
        self.root, self.names, self.ran = root, {}, 0  # type: ignore[var-annotated]

    def run(self, name: str) -> str:
        """Differences from the expected output of an object's examples, or ""."""
        text = inspect.getdoc(public()[name]) or ""
        examples = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
        examples.globs = self.names
        self.ran += len(examples.examples)
        said: list[str] = []
        with contextlib.chdir(self.root):
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            runner.run(examples, out=said.append, clear_globs=False)
        return "".join(said)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """After the example of `export`, which writes tiny.vpe, with images to calibrate and validate on beside it."""
    root: Path = tmp_path_factory.mktemp("examples")
    inputs: Inputs = write_inputs(root / "made")
    (root / "val").symlink_to(inputs.data)
    (root / "calib").symlink_to(inputs.data)
    (root / "cat.jpg").symlink_to(next(inputs.data.rglob("*.png")))
    found = Examples(root)
    assert found.run("vp_exporter.export") == ""
    return found


@pytest.mark.slow
def test_the_examples_run(examples: Examples) -> None:
    wrong = {name: said for name in public() if name != "vp_exporter.export" and (said := examples.run(name))}
    assert wrong == {}
    assert examples.ran > 60


@pytest.mark.slow
def test_the_first_lines_of_the_readme(
    examples: Examples, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unmodified except for a tiny model, and with the engines built by the examples."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = next(block for block in blocks if "vp_exporter as vp" in block)
    assert lines.count("\n") <= 7
    vit = examples.names["vit"]
    monkeypatch.setattr("timm.create_model", lambda name, **options: copy.deepcopy(vit))
    monkeypatch.setattr("vp_exporter.exporting._lower", lambda *args: None)

    def build(self: OnnxRuntimeBackend, source: Any, folder: Path, options: Any) -> BuildResult:
        shutil.copytree(examples.root / "tiny.vpe" / folder.name, folder, dirs_exist_ok=True)
        return BuildResult("model.onnx", tuple(path.name for path in folder.iterdir()), {})

    monkeypatch.setattr(OnnxRuntimeBackend, "build", build)
    monkeypatch.setitem(vp_exporter.export.__kwdefaults__, "seconds", 0.1)
    with contextlib.chdir(examples.root):
        exec(lines, {})
    assert re.fullmatch(r"Measured, with no budget to hold: .*\.\n", capsys.readouterr().out)
