"""Which server release supports a graph, and that a bundle names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.serving.triton.samples import write_linear
from vp_engines.backends.base import version_tuple
from vp_engines.bundle import read_manifest, update_bundle
from vp_engines.serving.triton.releases import RELEASES, least_release, server_needed
from vp_engines.serving.triton.repository import write_repository


def test_the_table_is_in_order() -> None:
    for column in zip(*RELEASES, strict=True):
        versions = [version_tuple(text) for text in column]
        assert versions == sorted(set(versions))


@pytest.mark.parametrize(
    ("onnxruntime", "container"),
    [("1.17.1", "24.03"), ("1.18.0", "24.05"), ("1.23.0", "25.08"), ("1.23.2", "25.11"), ("1.25.0", "26.07")],
)
def test_the_first_release_that_has_it(onnxruntime: str, container: str) -> None:
    release = least_release(onnxruntime)
    assert release is not None
    assert release.container == container


def test_a_version_that_no_release_has() -> None:
    assert least_release("9.0") is None
    assert "newer than release 26.07, which has 1.27.0" in server_needed("9.0")


def test_a_bundle_says_which_server_takes_it(tmp_path: Path) -> None:
    """The server's own backend reads the file directly, so the graph's requirements matter, not ours."""
    bundle = write_linear(tmp_path / "linear.vpe")
    variants = {name: variant.model_dump() for name, variant in read_manifest(bundle).variants.items()}
    variants["reduced"]["requirements"] = {"onnxruntime_min": "1.24.1", "onnxruntime_min_graph": "1.18.0"}
    update_bundle(bundle, files={}, variants=variants)
    served = write_repository(bundle, tmp_path / "models")
    assert served.server is not None
    assert served.server.startswith("Triton Inference Server 2.46 (release 24.05) or newer")
