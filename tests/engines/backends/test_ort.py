"""The ONNX Runtime backend."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.engines.backends import tiny_vit
from tests.engines.backends.tiny_vit import INPUTS, OUTPUTS
from vp_engines.backends import ort_versions
from vp_engines.backends.base import BuildOptions, BuildResult, BuildSource, Runner, RunOptions, version_tuple
from vp_engines.backends.ort import OnnxRuntimeBackend
from vp_engines.errors import BuildError, BundleCorruptError, BundleIncompatibleError, EngineUnavailableError, VpError

BACKEND = OnnxRuntimeBackend()


def build(source: BuildSource, out: Path) -> tuple[BuildResult, dict[str, bytes]]:
    result = BACKEND.build(source, out, BuildOptions())
    return result, tiny_vit.contents(result, out)


@pytest.fixture(scope="module")
def built(fp32: BuildSource, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, dict[str, bytes]]:
    return build(fp32, tmp_path_factory.mktemp("ort"))


def open_(built: tuple[BuildResult, dict[str, bytes]], options: RunOptions | None = None, **changes: object) -> Runner:
    result, files = built
    requirements = {**result.requirements, **changes}
    return BACKEND.open(result.artefact, files, INPUTS, OUTPUTS, requirements, options or RunOptions())


def save(model: onnx.ModelProto, source: BuildSource, path: Path) -> BuildSource:
    onnx.save(model, str(path))
    return replace(source, onnx=path)


@pytest.fixture
def source_with(fp32: BuildSource, tmp_path: Path) -> Callable[..., BuildSource]:
    """Factory of graphs with the model's signature: a product with the flat image, followed by one operator."""

    def make(op_type: str, *, opset: int = 23, **attributes: object) -> BuildSource:
        (images,), (logits,) = INPUTS, OUTPUTS
        pixels, classes = int(np.prod(images.shape[1:])), logits.shape[1]
        weight = numpy_helper.from_array(np.ones((pixels, classes), np.float32), "weight")
        nodes = [
            helper.make_node("Reshape", ["images", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["product"]),
            helper.make_node(op_type, ["product"], ["logits"], **attributes),
        ]
        values = [
            helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape)) for spec in (images, logits)
        ]
        shape = numpy_helper.from_array(np.array([-1, pixels]), "shape")
        graph = helper.make_graph(nodes, "one", values[:1], values[1:], [weight, shape])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        return save(model, fp32, tmp_path / f"{op_type}.onnx")

    return make


def test_same_answers_as_pytorch(built: tuple[BuildResult, dict[str, bytes]], vit: nn.Module) -> None:
    with open_(built, RunOptions(threads=1)) as runner:
        tiny_vit.check_outputs(runner, vit)
        tiny_vit.check_threads(runner, vit)
        tiny_vit.check_bad_inputs(runner)
        tiny_vit.check_closed(runner)


def test_requirements(built: tuple[BuildResult, dict[str, bytes]]) -> None:
    result, _ = built
    assert result.files == ("model.onnx",)
    assert result.requirements["opset"] == 23
    assert version_tuple(result.requirements["onnxruntime_min"]) >= version_tuple(ort_versions.OLDEST)
    assert result.requirements["providers"] == ["CPUExecutionProvider"]
    with pytest.raises(BundleIncompatibleError, match=r"is installed; expected >= 99\.0"):
        open_(built, onnxruntime_min="99.0")


def test_the_minimum_follows_from_the_graph(source_with: Callable[..., BuildSource], tmp_path: Path) -> None:
    """LpNormalization of opset 22 is not supported before 1.25, whatever opset the graph declares."""
    out = tmp_path / "engine"
    out.mkdir()
    result, _ = build(source_with("LpNormalization", axis=-1, p=2), out)
    assert result.requirements["onnxruntime_min"] == result.requirements["onnxruntime_min_graph"] == "1.25.0"
    for op_type, opset, graph in (("Relu", 23, "1.23.0"), ("Relu", 18, "1.18.0"), ("Softsign", 23, BACKEND.version())):
        out = tmp_path / f"{op_type}{opset}"
        out.mkdir()
        found = build(source_with(op_type, opset=opset), out)[0].requirements
        # for an operator without measurements: the version it was built with
        assert found["onnxruntime_min_graph"] == graph
        assert found["onnxruntime_min"] == max(graph, ort_versions.OLDEST, key=version_tuple)


def test_an_onnxruntime_that_reads_other_files_is_refused(
    built: tuple[BuildResult, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    line = r"onnxruntime 1\.23\.2 is installed, which reads files outside of the bundle; expected >= 1\.24\.1; pip"
    with pytest.raises(EngineUnavailableError, match=line) as caught:
        open_(built, onnxruntime_min="1.20")
    assert caught.value.exit_code == 3
    assert not BACKEND.available("run").ok
    assert "1.23.2" in BACKEND.available("build").reason


def test_fp16_runs_on_the_cpu_and_says_that_it_is_slow(fp16: BuildSource, vit: nn.Module, tmp_path: Path) -> None:
    made = build(fp16, tmp_path)
    assert "slower" in made[0].notes[0]
    with open_(made) as runner:
        tiny_vit.check_outputs(runner, vit, tiny_vit.TOLERANCES["fp16"])


def test_cuda_without_a_gpu(built: tuple[BuildResult, dict[str, bytes]]) -> None:
    with pytest.raises(EngineUnavailableError, match=r"no working CUDA provider here.*vp-export\[gpu\]"):
        open_(built, RunOptions(device="cuda"))


def test_weights_in_a_second_file(fp32: BuildSource, vit: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(str(fp32.onnx))
    path = tmp_path / "external.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024)
    out = tmp_path / "out"
    out.mkdir()
    result, files = build(replace(fp32, onnx=path), out)
    assert result.files == ("model.onnx", "weights.bin")
    shutil.rmtree(out)  # nothing may be read from disk
    path.unlink()
    with open_((result, files)) as runner:
        tiny_vit.check_outputs(runner, vit)
    with pytest.raises(VpError, match="cannot load"):
        open_((result, {"model.onnx": files["model.onnx"]}))


def test_weights_elsewhere_are_refused(fp32: BuildSource, tmp_path: Path) -> None:
    model = onnx.load(str(fp32.onnx))
    path = tmp_path / "deep" / "external.onnx"
    path.parent.mkdir()
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024)
    (path.parent / "weights.bin").rename(path.parent / "gone.bin")
    with pytest.raises(BuildError, match=r"weights\.bin"):
        BACKEND.build(replace(fp32, onnx=path), tmp_path, BuildOptions())


def test_the_disk_is_not_read_when_opening(
    built: tuple[BuildResult, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that refers to a file on the server must not get its content."""
    result, files = built
    secret = tmp_path / "secret"
    secret.write_bytes(np.ones(4096, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    for location in ("secret", str(secret), "../secret", f"../{tmp_path.name}/secret"):
        model = onnx.load_from_string(files[result.artefact])
        tensor = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) <= 16384)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        with pytest.raises(VpError):
            open_((result, {result.artefact: model.SerializeToString()}))


def test_foreign_domain_and_missing_function_body(fp32: BuildSource, tmp_path: Path) -> None:
    for domain, message in (("evil.ops", "foreign domain; expected one of"), ("vp", "no function body")):
        model = onnx.load(str(fp32.onnx))
        next(node for node in model.graph.node if node.op_type == "Gelu").domain = domain
        model.opset_import.append(helper.make_opsetid(domain, 1))
        with pytest.raises(BuildError, match=message):
            BACKEND.build(save(model, fp32, tmp_path / "changed.onnx"), tmp_path, BuildOptions())


def test_operator_of_ours_with_its_body_runs(fp32: BuildSource, vit: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(str(fp32.onnx))
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.domain = "vp"
    model.opset_import.append(helper.make_opsetid("vp", 1))
    body = helper.make_node("Gelu", ["x"], ["y"])
    model.functions.append(helper.make_function("vp", "Gelu", ["x"], ["y"], [body], [helper.make_opsetid("", 23)]))
    out = tmp_path / "out"
    out.mkdir()
    with open_(build(save(model, fp32, tmp_path / "vp.onnx"), out)) as runner:
        tiny_vit.check_outputs(runner, vit)


def test_a_model_that_onnx_runtime_cannot_run_is_found_when_building(fp32: BuildSource, tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["images"], ["logits"], to=TensorProto.FLOAT)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])
    other = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 32, 32])
    graph = helper.make_graph([node], "g", [images], [other], [numpy_helper.from_array(np.zeros(1), "unused")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    with pytest.raises(BuildError, match="has inputs and outputs"):
        BACKEND.build(save(model, fp32, tmp_path / "other.onnx"), tmp_path, BuildOptions())
    (tmp_path / "noise.onnx").write_bytes(b"\x08noise")
    with pytest.raises(BuildError, match="not a valid ONNX model"):
        BACKEND.build(replace(fp32, onnx=tmp_path / "noise.onnx"), tmp_path, BuildOptions())


def test_damaged_artefact(built: tuple[BuildResult, dict[str, bytes]], capfd: pytest.CaptureFixture[str]) -> None:
    result, files = built
    for broken in tiny_vit.damaged(files, result.artefact):
        with pytest.raises((BundleCorruptError, BundleIncompatibleError)):
            open_((result, broken))
    assert capfd.readouterr() == ("", "")


def test_its_profiler(built: tuple[BuildResult, dict[str, bytes]]) -> None:
    with open_(built) as plain, open_(built, RunOptions(profile=True)) as profiled:
        runs = tiny_vit.check_recorded(plain, profiled)
    kinds = [operation.kind for operation in runs[1].operations]
    assert kinds.count("Attention") == tiny_vit.BLOCKS


def test_a_profile_leaves_nothing_behind(
    built: tuple[BuildResult, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_(built, RunOptions(profile=True)) as runner:
        runner.run(tiny_vit.some_images(1))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with open_(built, RunOptions(profile=True)) as runner:
        runner.recorded()
        assert not list(tmp_path.iterdir())
    with pytest.raises(BundleCorruptError):
        BACKEND.open("model.onnx", {"model.onnx": b"no model"}, INPUTS, OUTPUTS, {}, RunOptions(profile=True))
    assert not list(tmp_path.iterdir())
