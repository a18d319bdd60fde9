"""Function bodies of the vp operators give the operators' results on ONNX Runtime, in every form.

All cases of an operator are one graph, exported once like a model: with a dynamic batch, from a batch of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from tests.kernels.support import assert_within
from tests.kernels.test_functions_cases import CASES, Case, outputs
from tests.pairwise import thinned
from vp_kernels.onnx import add_functions, inline

FORMS = ("functions", "inlined", "functions without optimisation")
# Operators that must not appear in a body, or remain in ONNX Runtime's optimised graph.
NEVER = {"If", "Loop", "Scan", "NonZero", "ScatterElements", "ScatterND", "Shape", "Range", "Expand", "Mod", "CastLike"}


class Graph(nn.Module):
    """All cases side by side."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = list(cases)
        for index, case in enumerate(cases):
            for name, value in case.fixed.items():
                self.register_buffer(f"fixed_{index}_{name}", value)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        by_id, found = dict(zip(shared(self.cases), given, strict=True)), []
        for index, case in enumerate(self.cases):
            tensors = {name: by_id[id(value)] for name, value in case.tensors.items()}
            fixed = {name: getattr(self, f"fixed_{index}_{name}") for name in case.fixed}
            found += outputs(case.node(**tensors, **fixed, **case.settings))
        return tuple(found)


def shared(cases: Sequence[Case]) -> dict[int, Tensor]:
    """The tensors of all cases, without duplicates, by identity: the inputs of their graph."""
    return {id(value): value for case in cases for value in case.tensors.values()}


def export(cases: Sequence[Case]) -> onnx.ModelProto:
    """The cases as one ONNX graph of `vp` nodes, without their functions."""
    given = tuple(value[:2].clone() for value in shared(cases).values())
    batch = tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in given)
    program = torch.onnx.export(
        Graph(cases).eval(), given, dynamic_shapes=(batch,), opset_version=23, dynamo=True, verbose=False
    )
    assert program is not None
    return program.model_proto


def run(
    model: onnx.ModelProto, cases: Sequence[Case], *, optimised: bool = True, save: Path | None = None
) -> list[tuple[Tensor, ...]]:
    """Results of ONNX Runtime, per case."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save:
        options.optimized_model_filepath = str(save)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = shared(cases).values()
    feeds = {each.name: value.numpy() for each, value in zip(session.get_inputs(), values, strict=True)}
    return by_case([torch.from_numpy(each) for each in session.run(None, feeds)], cases)


def by_case(flat: list[Tensor], cases: Sequence[Case]) -> list[tuple[Tensor, ...]]:
    """Group an engine's outputs by case."""
    found = [tuple(flat.pop(0) for _ in case.expected()) for case in cases]
    assert not flat
    return found


def check(case: Case, found: Sequence[Tensor]) -> None:
    """Integers must equal the operator's; others may differ by the rounding of both."""
    expected = case.expected()
    limits = iter(case.rounding() if any(one.is_floating_point() for one in expected) else ())
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        name = f"{case.name}, output {place}"
        if theirs.is_floating_point():
            assert_within(name, mine, theirs, 2 * next(limits), theirs.dtype)
        else:
            assert torch.equal(mine, theirs), f"{name}: {mine.tolist()}, expected {theirs.tolist()}"


@cache
def exported(operator: str) -> tuple[list[Case], onnx.ModelProto]:
    """The cases of an operator and their graph, functions added."""
    cases = CASES[operator](torch.float32)
    model = export(cases)
    add_functions(model)
    return cases, model


@cache
def answers(operator: str, form: str) -> list[tuple[Tensor, ...]]:
    cases, model = exported(operator)
    model = inline(model) if form.startswith("inlined") else model
    onnx.checker.check_model(model, full_check=True)
    return run(model, cases, optimised="without" not in form)


@pytest.mark.slow
@pytest.mark.parametrize("operator", CASES)
def test_one_node_of_the_right_type_for_each_case(operator: str) -> None:
    cases, model = exported(operator)
    assert [each.op_type for each in model.graph.node if each.domain == "vp"] == [case.op_type for case in cases]
    assert {function.name for function in model.functions if function.domain == "vp"} == {c.op_type for c in cases}


EVERY = [
    (operator, index, case.op_type, case.name, form)
    for operator in CASES
    for index, case in enumerate(CASES[operator](torch.float32))
    for form in FORMS
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "index", "op_type", "name", "form"),
    thinned(EVERY, lambda operator, index, op_type, name, form: {name, (op_type, form)}),
)
def test_as_the_operator(operator: str, index: int, op_type: str, name: str, form: str) -> None:
    """Every case, and every operator type in every form."""
    case = exported(operator)[0][index]
    assert (case.op_type, case.name) == (op_type, name)
    check(case, answers(operator, form)[index])


@pytest.mark.slow
@pytest.mark.parametrize("operator", CASES)
def test_what_is_static_is_computed_before_the_first_run(operator: str, tmp_path: Path) -> None:
    cases, model = exported(operator)
    run(model, cases, save=tmp_path / "optimised.onnx")
    left = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    # Expanding a [1, N] key bias to a mask for every query is folded; the Expand for [B, N] remains.
    assert left & NEVER == ({"Expand"} if operator == "attention" else set())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("operator", CASES)
def test_any_batch(operator: str, batch: int) -> None:
    """The batch is the only dynamic axis: exported with 2, run with 3 above."""
    cases, model = exported(operator)
    resized = {key: torch.cat([value, value.flip(0)])[:batch].contiguous() for key, value in shared(cases).items()}
    others = [
        replace(case, tensors={name: resized[id(value)] for name, value in case.tensors.items()}) for case in cases
    ]
    for case, found in zip(others, run(model, others), strict=True):
        check(case, found)
