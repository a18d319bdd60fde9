"""Models without weights: the ones that papers publish figures for, and small or unusual ones."""

from __future__ import annotations

import pytest

from tests.exporter.tiny import tiny_vit
from vp_exporter.model.describe import ViTDescription
from vp_exporter.model.loading import describe_by_name


@pytest.fixture(scope="session")
def deit_s() -> ViTDescription:
    return describe_by_name("deit_small_patch16_224", {})


@pytest.fixture(scope="session")
def distilled() -> ViTDescription:
    return describe_by_name("deit_small_distilled_patch16_224", {})


@pytest.fixture(scope="session")
def vit_l() -> ViTDescription:
    return describe_by_name("vit_large_patch16_384", {})


@pytest.fixture(scope="session")
def tiny() -> ViTDescription:
    """4 blocks, 16 patches and a class token."""
    return tiny_vit()[1]


@pytest.fixture(scope="session")
def without_class_token() -> ViTDescription:
    return tiny_vit("average-pool")[1]
