"""Lowered models, created once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.engines.backends import tiny_vit
from vp_engines.backends.base import BuildSource


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    return tiny_vit.make_vit()


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lowered")


@pytest.fixture(scope="session")
def fp32(lowered: Path) -> BuildSource:
    return tiny_vit.lower("fp32", lowered)


@pytest.fixture(scope="session")
def fp16(lowered: Path) -> BuildSource:
    return tiny_vit.lower("fp16", lowered)


@pytest.fixture(scope="session")
def bf16(lowered: Path) -> BuildSource:
    return tiny_vit.lower("bf16", lowered)
