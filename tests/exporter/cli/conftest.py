"""One export per session; tests that modify a bundle get a copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.cli.samples import Inputs, argv, call, export_options, write_inputs
from vp_engines.backends.base import BuildResult
from vp_engines.backends.ort import OnnxRuntimeBackend
from vp_engines.bundle import read_manifest, update_bundle
from vp_exporter.cli.export import app


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def exported(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle validated on the images. Must not be modified."""
    out = tmp_path_factory.mktemp("exported") / "tiny.vpe"
    result = call(app, *argv(export_options(inputs, out, data=inputs.data, max_drop=50)))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def without_dense(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle without its dense baseline."""
    out = tmp_path_factory.mktemp("without") / "tiny.vpe"
    shutil.copytree(exported, out)
    variants = dict(read_manifest(out).variants)
    update_bundle(out, files=dict.fromkeys(variants.pop("dense").files), variants=variants)
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be modified."""
    return Path(shutil.copytree(exported, tmp_path / "copy.vpe"))


@pytest.fixture
def ready_engines(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip lowering, which takes seconds, and use the engines of `exported`."""
    variants = {Path(variant.artefact).parts[0]: variant for variant in read_manifest(exported).variants.values()}

    def build(self: OnnxRuntimeBackend, source: Any, folder: Path, options: Any) -> BuildResult:
        shutil.copytree(exported / folder.name, folder, dirs_exist_ok=True)
        found = variants[folder.name]
        files = tuple(name.split("/", 1)[1] for name in found.files)
        return BuildResult(found.artefact.split("/", 1)[1], files, dict(found.requirements))

    monkeypatch.setattr("vp_exporter.exporting._lower", lambda *args: None)
    monkeypatch.setattr(OnnxRuntimeBackend, "build", build)
