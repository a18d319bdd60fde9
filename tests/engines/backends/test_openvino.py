"""The OpenVINO backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.engines.backends import tiny_vit
from tests.engines.backends.tiny_vit import INPUTS, OUTPUTS, TOLERANCES
from vp_engines.backends.base import BuildOptions, BuildResult, BuildSource, Runner, RunOptions
from vp_engines.backends.openvino import OpenVinoBackend
from vp_engines.errors import BuildError, BundleCorruptError, BundleIncompatibleError, EngineUnavailableError

pytest.importorskip("openvino")
BACKEND = OpenVinoBackend()
FP32 = ("f32", "float32")
NAMES = {"fp16": ("f16", "float16"), "bf16": ("bf16", "bfloat16")}
Built = tuple[BuildResult, dict[str, bytes]]


def build(source: BuildSource, out: Path) -> Built:
    result = BACKEND.build(source, out, BuildOptions())
    return result, tiny_vit.contents(result, out)


@pytest.fixture(scope="module")
def built(fp32: BuildSource, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(fp32, tmp_path_factory.mktemp("openvino"))


def open_(built: Built, options: RunOptions | None = None, **changes: object) -> Runner:
    result, files = built
    requirements = {**result.requirements, **changes}
    return BACKEND.open(result.artefact, files, INPUTS, OUTPUTS, requirements, options or RunOptions())


@pytest.mark.slow
def test_same_answers_as_pytorch(built: Built, vit: nn.Module) -> None:
    with open_(built, RunOptions(threads=1)) as runner:
        tiny_vit.check_outputs(runner, vit)
        tiny_vit.check_threads(runner, vit)
        tiny_vit.check_bad_inputs(runner)
        tiny_vit.check_closed(runner)


@pytest.mark.slow
def test_fp32_weights_stay_fp32_and_compute_in_fp32(built: Built, fp32: BuildSource) -> None:
    result, files = built
    assert fp32.onnx is not None
    assert len(files["model.bin"]) > 0.9 * fp32.onnx.stat().st_size
    assert result.requirements["precision_hint"] == "f32"
    with open_(built) as runner:
        hint = runner._compiled.get_property("INFERENCE_PRECISION_HINT")  # type: ignore[attr-defined]
        assert hint.to_string() in FP32


@pytest.mark.slow
def test_half_precisions(fp16: BuildSource, bf16: BuildSource, vit: nn.Module, tmp_path: Path) -> None:
    for source in (fp16, bf16):
        out = tmp_path / source.precision
        out.mkdir()
        made = build(source, out)
        assert made[0].requirements["precision_hint"] == {"fp16": "f16", "bf16": "bf16"}[source.precision]
        with open_(made) as runner:
            tiny_vit.check_outputs(runner, vit, TOLERANCES[source.precision])
            asked = runner._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()  # type: ignore[attr-defined]
            # If the processor lacks fp16, the plugin alone would use bf16.
            assert asked in (*FP32, *NAMES[source.precision])


def test_each_batch_size_is_recorded_by_itself(built: Built) -> None:
    """The profiler's numbers are means over all runs of a compiled model."""
    with open_(built, RunOptions(profile=True, threads=1)) as runner:
        for batch, times in ((1, 200), (64, 3)):
            for _ in range(times):
                runner.run(tiny_vit.some_images(batch, seed=0))
        small, *_, large = (sum(each.duration for each in run.operations) for run in runner.recorded()[199:])
    assert large > 8 * small


def test_only_the_cpu(built: Built) -> None:
    with pytest.raises(EngineUnavailableError, match="asked for device cuda; expected cpu"):
        open_(built, RunOptions(device="cuda"))


def test_requirements(built: Built) -> None:
    with pytest.raises(BundleIncompatibleError, match=r"is installed; expected >= 2099\.1"):
        open_(built, openvino_min="2099.1")
    with pytest.raises(BundleIncompatibleError, match="precision hint 'i4'"):
        open_(built, precision_hint="i4")


def test_damaged_artefact(built: Built, capfd: pytest.CaptureFixture[str]) -> None:
    result, files = built
    for broken in tiny_vit.damaged(files, "model.xml"):
        with pytest.raises(BundleCorruptError):
            open_((result, broken))
    for broken in tiny_vit.damaged(files, "model.bin")[:2]:  # noise of the right size is detected by the bundle's hash
        with pytest.raises(BundleCorruptError):
            open_((result, broken))
    with pytest.raises(BundleCorruptError, match=r"no model\.bin"):
        open_((result, {"model.xml": files["model.xml"]}))
    assert capfd.readouterr() == ("", "")


def test_build_refuses_what_is_not_onnx(fp32: BuildSource, tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x08noise")
    with pytest.raises(BuildError, match=r"OpenVINO 20\d\d\.\d.* refuses the model"):
        BACKEND.build(BuildSource("fp32", INPUTS, OUTPUTS, onnx=path), tmp_path, BuildOptions())


def test_its_profiler(built: Built) -> None:
    with open_(built) as plain, open_(built, RunOptions(profile=True)) as profiled:
        runs = tiny_vit.check_recorded(plain, profiled)
    kinds = [operation.kind.split()[0] for operation in runs[1].operations]
    assert kinds.count("FullyConnected") == 4 * tiny_vit.BLOCKS + 1
