"""Model repositories, parsed with the server's own definitions; and rejected inputs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from tests.engines.bundle_samples import fields, linear_model
from tests.engines.serving.triton.samples import write_linear
from vp_engines import atomic
from vp_engines.backends.base import TensorSpec
from vp_engines.bundle import verify_bundle
from vp_engines.errors import (
    BundleCorruptError,
    BundleError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
    VpError,
)
from vp_engines.serving.triton import batching, config, repository
from vp_engines.serving.triton.repository import BACKENDS, NATIVE, ServeOptions, write_repository


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_linear(tmp_path_factory.mktemp("bundle") / "linear.vpe")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models"


def read(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_engine(out: Path, **changes: Any) -> Path:
    return write_linear(out, engine={**fields()["engine"], **changes})


def test_an_onnx_engine_runs_under_the_servers_own_backend(bundle: Path, out: Path) -> None:
    served = write_repository(bundle, out)
    assert (served.name, served.version, served.backend) == ("linear", 1, "onnxruntime")
    assert served.folders == (out / "linear",)
    assert sorted(tree(out)) == ["linear/1/model.onnx", "linear/config.pbtxt", "linear/labels.txt"]
    assert (out / "linear" / "1" / "model.onnx").read_bytes() == linear_model(1.0)
    assert (out / "linear" / "labels.txt").read_text() == "cat\ndog\n"
    found = read(out / "linear")
    assert (found.name, found.backend, found.platform) == ("linear", "onnxruntime", "onnxruntime_onnx")
    assert [(t.name, t.data_type, list(t.dims)) for t in found.input] == [("images", 11, [3, 4, 4])]
    assert [(t.name, list(t.dims), t.label_filename) for t in found.output] == [("logits", [2], "labels.txt")]
    assert found.max_batch_size == 64  # as the engine was built for
    assert list(found.dynamic_batching.preferred_batch_size) == [4]  # 8 has no more images per second
    assert found.dynamic_batching.max_queue_delay_microseconds == 0
    assert [(w.name, w.batch_size, w.inputs["images"].random_data) for w in found.model_warmup] == [
        ("batch-1", 1, True), ("batch-4", 4, True), ("batch-64", 64, True),
    ]  # fmt: skip
    (group,) = found.instance_group
    assert (group.count, group.kind) == (1, ModelInstanceGroup.KIND_CPU)
    assert found.version_policy.latest.num_versions == 1


def test_options_reach_the_configuration(bundle: Path, out: Path) -> None:
    options = ServeOptions(name="other", variant="dense", max_batch=6, delay=250, instances=3, threads=2, warmup=False)
    write_repository(bundle, out, options)
    found = read(out / "other")
    assert found.max_batch_size == 6
    assert found.dynamic_batching.max_queue_delay_microseconds == 250
    assert found.instance_group[0].count == 3
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    assert not found.model_warmup
    assert (out / "other" / "1" / "model.onnx").read_bytes() == linear_model(2.0)


def test_the_python_backend_gets_the_whole_bundle(bundle: Path, out: Path) -> None:
    write_repository(bundle, out, ServeOptions(backend="python", threads=1))
    assert tree(out / "linear" / "1" / "bundle.vpe") == tree(bundle)
    assert verify_bundle(out / "linear" / "1" / "bundle.vpe").digest == verify_bundle(bundle).digest
    compile((out / "linear" / "1" / "model.py").read_text(), "model.py", "exec")
    found = read(out / "linear")
    assert (found.backend, found.platform, found.default_model_filename) == ("python", "", "model.py")
    said = {key: value.string_value for key, value in found.parameters.items()}
    assert said == {"takes": "images", "threads": "1", "variant": "reduced"}


@pytest.mark.parametrize(
    ("engine", "backend", "platform", "file", "names"),
    [
        ("trt", "tensorrt", "tensorrt_plan", "model.plan", ("images", "logits")),
        ("aoti", "pytorch", "torch_aoti", "model.pt2", ("INPUT__0", "OUTPUT__0")),
        ("openvino", "python", "", "model.py", ("images", "logits")),
        ("trt-rtx", "python", "", "model.py", ("images", "logits")),
    ],
)
def test_every_engine_has_its_backend(
    tmp_path: Path, out: Path, engine: str, backend: str, platform: str, file: str, names: tuple[str, str]
) -> None:
    given = with_engine(tmp_path / "a.vpe", name=engine, device="cuda")
    assert write_repository(given, out).backend == backend
    found = read(out / "linear")
    assert (found.backend, found.platform, found.default_model_filename) == (backend, platform, file)
    assert (found.input[0].name, found.output[0].name) == names
    assert (out / "linear" / "1" / file).is_file()
    assert found.instance_group[0].kind == ModelInstanceGroup.KIND_GPU


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_an_ensemble_maps_files_to_answers(bundle: Path, out: Path, backend: str) -> None:
    served = write_repository(bundle, out, ServeOptions(name="row", backend=backend, preprocess="ensemble"))
    assert [folder.name for folder in served.folders] == ["row_preprocess", "row_engine", "row"]
    first, second, row = (read(folder) for folder in served.folders)
    assert (first.backend, second.backend, row.platform) == ("python", backend, "ensemble")
    assert (row.input[0].name, list(row.input[0].dims)) == ("encoded", [1])
    assert row.input[0].data_type == first.input[0].data_type == 13  # TYPE_STRING
    one, two = row.ensemble_scheduling.step
    assert (one.model_name, two.model_name) == ("row_preprocess", "row_engine")
    assert dict(one.input_map) == {"encoded": "encoded"}
    assert dict(one.output_map) == {first.output[0].name: "images"}
    assert dict(two.input_map) == {second.input[0].name: "images"}
    assert dict(two.output_map) == {second.output[0].name: "logits"}
    assert not row.HasField("dynamic_batching")
    assert (out / "row" / "1").is_dir()
    assert {model.max_batch_size for model in (first, second, row)} == {64}


def test_an_ensemble_renames_what_the_backend_numbers(tmp_path: Path, out: Path) -> None:
    given = with_engine(tmp_path / "a.vpe", name="aoti")
    served = write_repository(given, out, ServeOptions(preprocess="ensemble"))
    (_, two) = read(served.folders[-1]).ensemble_scheduling.step
    assert dict(two.input_map) == {"INPUT__0": "images"}
    assert dict(two.output_map) == {"OUTPUT__0": "logits"}


def test_further_bundles_are_further_versions(tmp_path: Path, out: Path) -> None:
    numbers = []
    for scale in (1.0, 2.0):
        served = write_repository(write_linear(tmp_path / f"{scale}.vpe", scale), out)
        numbers.append(served.version)
        assert (out / "linear" / str(served.version) / "model.onnx").read_bytes() == linear_model(scale)
    third = with_engine(tmp_path / "third.vpe", batch={"min": 1, "opt": 1, "max": 2})
    assert write_repository(third, out, ServeOptions(version=7)).version == 7
    assert numbers == [1, 2]
    assert read(out / "linear").max_batch_size == 2
    assert sorted(os.listdir(out / "linear")) == ["1", "2", "7", "config.pbtxt", "labels.txt"]
    assert os.listdir(out) == ["linear"]


def test_what_cannot_be_a_further_version_is_refused(bundle: Path, tmp_path: Path, out: Path) -> None:
    write_repository(bundle, out)
    before = tree(out)
    inputs = [{"name": "pixels", "dtype": "float32", "shape": ["batch", 3, 4, 4]}]
    for number, (changes, options, line) in enumerate(
        [
            ({}, {"version": 1}, "has a version 1; expected a new number"),
            (
                {"inputs": inputs},
                {},
                "inputs pixels TYPE_FP32 [3, 4, 4]; outputs logits TYPE_FP32 [2]; expected the same",
            ),
            ({"classes": ["dog", "cat"]}, {}, "other class names"),
            ({"classes": None}, {}, "other class names"),
            ({}, {"backend": "python"}, "run under onnxruntime, and this one would under python"),
        ]
    ):
        given = write_linear(tmp_path / f"{number}.vpe", **changes)
        with pytest.raises(BundleError, match=line.replace("[", r"\[").replace("]", r"\]")):
            write_repository(given, out, ServeOptions(**options))
    assert tree(out) == before


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "x" * 101, "a\n", "-a"])
def test_names_that_the_server_cannot_take(bundle: Path, out: Path, name: str) -> None:
    with pytest.raises(InputError, match="the model name"):
        write_repository(bundle, out, ServeOptions(name=name))
    assert not out.exists()


def test_the_bundles_own_name_may_not_do(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match=r"'tiny żółw'.*`name`"):
        write_repository(write_linear(tmp_path / "a.vpe", name="tiny żółw"), out)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backend": "onnx"}, f"backend is 'onnx'; expected one of {', '.join(BACKENDS)}"),
        ({"preprocess": "yes"}, "preprocess is 'yes'"),
        ({"variant": "small"}, "variant is 'small'"),
        ({"version": 0}, "version is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"instances": 0}, "instances is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"delay": -1}, "delay is -1 microseconds"),
        ({"preprocess": "model", "backend": "onnxruntime"}, "onnxruntime takes no image files"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        ServeOptions(**options)


def test_requests_that_the_engine_cannot_meet(bundle: Path, tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match="max_batch is 65; expected at most 64"):
        write_repository(bundle, out, ServeOptions(max_batch=65))
    with pytest.raises(InputError, match="tensorrt does not run engines of 'ort'; expected onnxruntime or python"):
        write_repository(bundle, out, ServeOptions(backend="tensorrt"))
    fixed = with_engine(tmp_path / "fixed.vpe", batch={"min": 8, "opt": 8, "max": 8})
    with pytest.raises(BundleIncompatibleError, match="takes 8 images at least"):
        write_repository(fixed, out)
    variants = {"reduced": {**fields()["variants"]["reduced"], "files": ["engine/model.onnx"]}}
    alone = write_linear(tmp_path / "alone.vpe", variants=variants)
    with pytest.raises(VpError, match="holds no dense model"):
        write_repository(alone, out, ServeOptions(variant="dense"))
    assert not out.exists()


def test_a_damaged_bundle_is_refused(tmp_path: Path, out: Path) -> None:
    given = write_linear(tmp_path / "a.vpe")
    (given / "engine" / "model.onnx").write_bytes(linear_model(3.0))
    with pytest.raises(BundleCorruptError, match=r"'engine/model\.onnx'"):
        write_repository(given, out)
    assert not out.exists()


def test_missing_folders_above_are_made(bundle: Path, out: Path) -> None:
    write_repository(bundle, out / "deep" / "models")
    assert (out / "deep" / "models" / "linear" / "config.pbtxt").is_file()


def test_places_that_will_not_do(bundle: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "file").write_text("")
    with pytest.raises(BundleError, match="file is not a folder; expected a folder for models"):
        write_repository(bundle, out.parent / "file" / "models")
    (out / "linear").mkdir(parents=True)
    with pytest.raises(BundleError, match="is not a model of a repository"):
        write_repository(bundle, out)
    (out / "linear" / "config.pbtxt").write_text("name: {")
    with pytest.raises(BundleError, match=r"config.pbtxt is not a model configuration"):
        write_repository(bundle, out)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("fail_at", [1, 2, 4, 7, 9, 11])
def test_a_full_disk_leaves_nothing(
    bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, later: bool
) -> None:
    options = ServeOptions(backend="python", preprocess="ensemble")
    out.mkdir()
    if later:
        write_repository(bundle, out, options)
    before, count, store = tree(out), 0, repository._store

    def full(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == fail_at:
            raise OSError(28, "No space left on device", str(path))
        store(path, content)

    monkeypatch.setattr(repository, "_store", full)
    with pytest.raises(BundleError, match="No space left on device"):
        write_repository(bundle, out, options)
    assert tree(out) == before
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_without_renameat2_and_without_tritonclient(bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    assert write_repository(bundle, out).version == 1
    assert write_repository(bundle, out).version == 2
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(EngineUnavailableError, match=r"needs tritonclient.*vp-export\[serve\]"):
        write_repository(bundle, out)


@pytest.mark.parametrize("parent_is_ours", [True, False])
def test_a_server_that_polls_never_sees_a_model_being_built(
    bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch, parent_is_ours: bool
) -> None:
    """A polling server takes every folder in the repository for a model."""
    seen, store, access = set(), repository._store, os.access

    def look(path: Path, content: bytes) -> None:
        seen.update(os.listdir(out))
        store(path, content)

    out.mkdir(parents=True)
    monkeypatch.setattr(repository, "_store", look)
    monkeypatch.setattr(os, "access", lambda path, mode: (parent_is_ours or path != out.parent) and access(path, mode))
    write_repository(bundle, out)
    write_repository(bundle, out)
    assert os.listdir(out) == ["linear"]
    assert not [name for name in os.listdir(out.parent) if name.startswith(".")]
    if parent_is_ours:
        assert seen == {"linear"}  # while the second version was being written


def test_a_dtype_that_the_server_does_not_know() -> None:
    tensor = TensorSpec("images", "complex64", ("batch", 3))
    spec = config.ModelSpec("a", (tensor,), (tensor,), 1)
    with pytest.raises(BundleError, match="'images' is of complex64"):
        config.model_config(spec)
    known = dataclasses.replace(tensor, dtype="float16", shape=("batch", "tokens", 3))
    (found,) = config.model_config(dataclasses.replace(spec, inputs=(known,), outputs=(known,))).input
    assert list(found.dims) == [-1, 3]


@pytest.mark.parametrize(
    ("rates", "most", "expected"),
    [
        ({}, 64, []),
        ({1: 100.0}, 64, []),
        ({1: 100.0, 8: 101.0}, 64, []),
        ({1: 100.0, 8: 150.0}, 64, [8]),
        ({1: 100.0, 2: 120.0, 4: 110.0, 8: 130.0}, 64, [2, 8]),
        ({1: 100.0, 8: 150.0, 64: 400.0}, 8, [8]),
        ({8: 150.0, 64: 400.0}, 64, [64]),
    ],
)
def test_preferred_batch_sizes_are_those_that_pay(rates: dict[int, float], most: int, expected: list[int]) -> None:
    assert batching.preferred(rates, most) == expected


def test_the_largest_batch() -> None:
    assert batching.largest({}, 32) == (32, "what the engine was built for")
    most, why = batching.largest({1: 1.0, 16: 2.0}, None)
    assert most == 16
    assert "report timed; the engine takes any" in why
    most, why = batching.largest({}, None)
    assert most == batching.UNMEASURED
    assert "nothing was timed" in why
    assert batching.throughput(None, "reduced") == batching.throughput(b'{"latency": null}', "reduced") == {}


def test_every_native_backend_is_one_to_choose() -> None:
    assert {native.backend for native in NATIVE.values()} | {"python"} == set(BACKENDS)
