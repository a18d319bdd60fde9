"""Function bodies in half precision, inlined on OpenVINO, and as functions on TensorRT-RTX."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

from tests.kernels.test_functions import by_case, check, export, exported, run, shared
from tests.kernels.test_functions_cases import CASES, Case
from vp_engines.backends import tensorrt_build
from vp_engines.backends.openvino import _make_stable
from vp_engines.backends.tensorrt import TensorRtRtxBackend
from vp_kernels.onnx import add_functions, function_names, inline

needs_rtx = pytest.mark.skipif(
    not TensorRtRtxBackend().available("build").ok, reason="TensorRT-RTX or Polygraphy is not installed"
)


@cache
def _every_type() -> tuple[list[Case], onnx.ModelProto]:
    """A case of every operator type, in half precision, as one model."""
    cases = [case for make in CASES.values() for case in make(torch.float16) if not _nothing_left(case)]
    cases = list({case.op_type: case for case in reversed(cases)}.values())
    model = export(cases)
    assert add_functions(model) == sorted(function_names())
    return cases, model


@pytest.mark.slow
def test_half_precision() -> None:
    """Decisions, sizes and importances are those of fp32; rows are rounded once."""
    cases, model = _every_type()
    onnx.checker.check_model(model, full_check=True)
    for case, found in zip(cases, run(model, cases), strict=True):
        check(case, found)


def _nothing_left(case: Case) -> bool:
    """Whether a list of the case is empty: OpenVINO 2026.4 rejects some operations on empty tensors."""
    return case.note in ("nothing-kept", "no-source") or (case.op_type == "SelectFuse" and case.note.endswith("20"))


@pytest.mark.slow
@pytest.mark.parametrize("operator", CASES)
def test_inlined_twin_on_openvino(operator: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    cases, model = exported(operator)
    if any(_nothing_left(case) for case in cases):
        cases = [case for case in cases if not _nothing_left(case)]
        model = export(cases)
    onnx.save(inline(model), str(tmp_path / "twin.onnx"))
    core = openvino.Core()
    read = core.read_model(tmp_path / "twin.onnx")
    _make_stable(read)  # as in the backend: OpenVINO's reader does not break ties as ONNX requires
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    answers = compiled([value.numpy() for value in shared(cases).values()])
    flat = [torch.from_numpy(answers[port]) for port in compiled.outputs]
    for case, found in zip(cases, by_case(flat, cases), strict=True):
        check(case, found)


def _six(dtype: torch.dtype) -> list[Case]:
    """A case of each operator, those with the most inputs."""
    wanted = (
        "AttentionBiasClass",
        "GatherNormImageResidualExtra",
        "SelectFuse-7",
        "MergeRowsSourceWeightKeepWeight",
        "MatchMergeSizeScores-17-1-8",  # all of A merges: the list of the rest is empty
        "DensityMergeClustersPairsSize-14-5-1",
    )
    named = {case.name: case for make in CASES.values() for case in make(dtype)}
    return [named[name] for name in wanted]


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_functions_build_in_tensorrt(dtype: torch.dtype, tmp_path: Path) -> None:
    """One model of all six, unmodified: TensorRT's parser inlines the bodies, and recognises the attention in one."""
    model = export(_six(dtype))
    assert len(add_functions(model)) == 6
    answer = _build(model, tmp_path, attentions=1, decomposable=dtype == torch.float32)
    assert answer["error"] == ""
    assert (tmp_path / "model.engine").stat().st_size > 10_000


@pytest.mark.slow
@needs_rtx
def test_every_type_builds_in_tensorrt(tmp_path: Path) -> None:
    """By name: an operator type named like a standard one would be taken for it."""
    _, model = _every_type()
    assert _build(model, tmp_path, attentions=4)["error"] == ""  # the two with the mean spell out the map


def _build(model: onnx.ModelProto, folder: Path, *, attentions: int = 0, decomposable: bool = False) -> dict[str, str]:
    """Build a TensorRT-RTX engine for batches 1 to 8."""
    onnx.save(model, str(folder / "model.onnx"))
    profile = {}
    for value in model.graph.input:
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        profile[value.name] = [[batch, *sizes[1:]] for batch in (1, 2, 8)]
    request = {
        "rtx": True,
        "onnx": str(folder / "model.onnx"),
        "engine": str(folder / "model.engine"),
        "profile": profile,
        "compute_capability": "8.9",
        "decomposable": decomposable,
        "attention_blocks": attentions,
        "timing_cache": None,
    }
    return tensorrt_build.in_child(request)
