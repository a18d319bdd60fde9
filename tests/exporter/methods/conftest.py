"""Models without weights: those with published figures, and small or unusual ones."""

from __future__ import annotations

import pytest

from tests.exporter.tiny import tiny_vit
from vp_exporter.model.loading import describe_by_name
from vp_exporter.model.spec import ModelSpec


@pytest.fixture(scope="session")
def deit_s() -> ModelSpec:
    return describe_by_name("deit_small_patch16_224", {})


@pytest.fixture(scope="session")
def distilled() -> ModelSpec:
    return describe_by_name("deit_small_distilled_patch16_224", {})


@pytest.fixture(scope="session")
def vit_l() -> ModelSpec:
    return describe_by_name("vit_large_patch16_384", {})


@pytest.fixture(scope="session")
def tiny() -> ModelSpec:
    """4 blocks, 16 patches and a class token."""
    return tiny_vit()[1]


@pytest.fixture(scope="session")
def without_class_token() -> ModelSpec:
    return tiny_vit("average-pool")[1]
