"""`import vp_exporter as vp`: the names that it offers, each there when it is first used."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

import vp_exporter as vp

INIT = Path(vp.__file__)


def test_every_name_is_there_and_listed() -> None:
    assert set(vp.__all__) <= set(dir(vp))
    for name in vp.__all__:
        assert getattr(vp, name).__class__.__name__ != "module"
    with pytest.raises(AttributeError, match="module 'vp_exporter' has no attribute 'exprot'"):
        vp.exprot  # noqa: B018


def test_no_room_has_a_function_s_name() -> None:
    """Importing vp_exporter.NAME puts the module on the package, in the place of the function."""
    assert not set(vp.__all__) & {module.name for module in pkgutil.iter_modules(vp.__path__)}


def test_editors_and_type_checkers_see_the_same_names() -> None:
    """What is imported lazily stands under `if TYPE_CHECKING` too."""
    tree = ast.parse(INIT.read_text())
    shown = {
        alias.asname or alias.name
        for part in tree.body
        if isinstance(part, ast.If)
        for line in part.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert shown | {"__version__"} == set(vp._LAZY)
