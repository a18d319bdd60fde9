"""The plugins in the registry and parser of TensorRT-RTX, which can parse plugins but not run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.exporter.reducers.test_export import EVERY_REDUCER
from tests.exporter.rewrite.test_fused_block import both
from tests.kernels.plugins.isolation import LIBRARY, ROOT, need_plugins
from tests.waiting import LONG
from vp_exporter.lowering import lower_onnx
from vp_kernels.onnx import function_names

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.built
CHILD = """
import sys
import tensorrt_rtx as trt
library, model = sys.argv[1:]
logger = trt.Logger(trt.Logger.INFO)
registry = trt.get_plugin_registry()
if library:
    registry.load_library(library)
print("creators", sorted(each.name for each in registry.all_creators if each.plugin_namespace == "vp"), flush=True)
if library:
    creator = registry.get_creator("GatherNorm", "1", "vp")
    print("fields", [field.name for field in creator.field_names], flush=True)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed", parser.parse_from_file(model), network.num_layers > 0, flush=True)
"""


def in_child(library: str, model: Path) -> list[str]:
    command = [sys.executable, "-c", CHILD, library, str(model)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, cwd=ROOT).stdout.splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_plugins()
    _, fused = both(EVERY_REDUCER[:1])
    return lower_onnx(fused.for_export(), tmp_path_factory.mktemp("plugins") / "model.onnx", plugins=True)


def test_the_registry_takes_the_library(model: Path) -> None:
    lines = in_child(str(LIBRARY), model)
    assert f"creators {sorted(function_names())}" in lines
    assert "fields ['eps']" in lines
    # RTX's parser finds the creator by the node's attributes and creates the plugin, then ends the process.
    said = " ".join(lines)
    assert "plugin_version: 1, plugin_namespace: vp" in said
    assert "Successfully created plugin: " in said


def test_without_the_library_the_parser_takes_the_bodies(model: Path) -> None:
    assert in_child("", model)[0] == "creators []"
    assert "parsed True True" in in_child("", model)
