"""Images of three colours, and fake engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vp_engines
from tests.exporter.validation.samples import FakeEngine


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str, dict[str, Any]]]:
    """Records what was loaded, in order; every engine is a fake."""
    calls: list[tuple[Path, str, dict[str, Any]]] = []

    def load(path: Path, *, variant: str, **options: Any) -> FakeEngine:
        calls.append((path, variant, options))
        return FakeEngine()

    monkeypatch.setattr(vp_engines, "load", load)
    return calls


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(4):
            colour = [0, 0, 0]
            colour[i] = 200
            Image.new("RGB", (40, 36), tuple(colour)).save(tmp_path / "images" / name / f"{n}.png")
    return tmp_path / "images"
