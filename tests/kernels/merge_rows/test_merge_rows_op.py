"""vp::merge_rows in torch: argument checks, gradients, export and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.merge_rows.test_merge_rows_kernel import WEIGHTS, case
from tests.kernels.support import assert_within, seeded
from vp_kernels.errors import KernelError
from vp_kernels.merge_rows.op import merge_rows, merge_rows_torch
from vp_kernels.merge_rows.reference import merge_rows_gradients, merge_rows_reference


def test_by_hand() -> None:
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    keep, source, into = torch.tensor([[3, 0]]), torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    merged, mass = merge_rows(x, keep, source, into)
    assert (merged.tolist(), mass.tolist()) == ([[[8.0], [pytest.approx(7 / 3)]]], [[1.0, 3.0]])
    weights = torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    for form in (merge_rows, merge_rows_reference):
        merged, mass = form(x, keep, source, into, *weights)
        assert (merged.tolist(), mass.tolist()) == ([[[8.0], [3.25]]], [[2.0, 4.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_torch_form_is_the_reference(weights: str, dtype: torch.dtype) -> None:
    arguments = case(3, 41, 20, 24, dtype, weights)
    merged, mass = merge_rows_torch(*arguments)
    truth = merge_rows_reference(arguments[0].double(), *arguments[1:])
    bound, bound_mass = bounds.merge_rows(*arguments)
    assert_within("merged", merged, truth[0], bound, dtype)
    assert_within("mass", mass, truth[1], bound_mass, torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradients_are_those_of_the_torch_form() -> None:
    for weights in WEIGHTS:
        x, keep, source, into, weight, own = case(2, 12, 7, 3, torch.float64, weights)
        keep[0, 1] = keep[0, 0]  # a row may be kept twice
        weight = torch.ones(2, 5) if weight is None else weight
        own = torch.ones(2, 7) if own is None else own
        assert bool((weight == 0).any()) == (weights in ("source", "both"))
        x, weight, own = x.requires_grad_(), weight.double().requires_grad_(), own.double().requires_grad_()
        merged, mass = merge_rows_torch(x, keep, source, into, weight, own)
        above = seeded(2, 7, 3).double(), seeded(2, 7).double()
        expected = torch.autograd.grad((merged, mass), (x, weight, own), above)
        found = merge_rows_gradients(x, keep, source, into, weight, own, *above)
        part = weight.detach() != 0  # ignored sources have no share to change
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1][part], expected[1][part])
        torch.testing.assert_close(found[2], expected[2])


def test_autograd() -> None:
    x, keep, source, into, weight, own = case(2, 12, 7, 3, torch.float32, "both")
    assert weight is not None
    assert own is not None
    leaves = [each.clone().requires_grad_() for each in (x, weight + 0.1, own)]
    found = []
    for form in (merge_rows, merge_rows_torch):
        merged, mass = form(leaves[0], keep, source, into, leaves[1], leaves[2])
        found.append(torch.autograd.grad((merged.sin() * 2).sum() + mass.square().sum(), leaves))
    torch.testing.assert_close(found[0], found[1])
    only = torch.autograd.grad(merge_rows(leaves[0], keep, source, into)[0].sum(), leaves[0])[0]
    torch.testing.assert_close(only.sum(), torch.tensor(2.0 * 7 * 3))  # each output row consists of parts that sum to 1


def test_opcheck() -> None:
    x, *rest = case(2, 9, 5, 4, weights="both")
    torch.library.opcheck(torch.ops.vp.merge_rows.default, (x.requires_grad_(), *rest))
    tests = ("test_schema", "test_faketensor")
    x, *rest = case(2, 9, 5, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.vp.merge_rows.default, (x, *rest), test_utils=tests)


class Merge(torch.nn.Module):
    def forward(self, x: Tensor, keep: Tensor, source: Tensor, into: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        merged, mass = merge_rows(x * 2, keep, source, into, weight)
        return merged + 1, mass


def test_export_keeps_one_node_and_a_dynamic_batch() -> None:
    some = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Merge(), case(3, 9, 5, 4, weights="source")[:5], dynamic_shapes=(some,) * 5)
    nodes = [str(node.target) for node in program.run_decompositions({}).graph.nodes if "vp." in str(node.target)]
    assert nodes == ["vp.merge_rows.default"]
    other = case(5, 9, 5, 4, weights="source", seed=1)[:5]
    for found, expected in zip(program.module()(*other), Merge()(*other), strict=True):
        torch.testing.assert_close(found, expected)


def test_compile() -> None:
    arguments = case(3, 9, 5, 4, weights="source")[:5]
    compiled = torch.compile(Merge(), fullgraph=True, backend="aot_eager")  # Inductor would take 10 s in a C++ compiler
    for found, expected in zip(compiled(*arguments), Merge()(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


GOOD: dict[str, Any] = dict(
    zip(("x", "keep", "source", "into", "source_weight", "keep_weight"), case(2, 9, 5, 4, weights="both"), strict=True)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": seeded(2, 9)}, r"vp::merge_rows: the shape of x is \[2, 9\]; expected \[B, N, D\]"),
        ({"x": seeded(2, 9, 4).double()}, "the dtype of x is float64"),
        ({"x": seeded(2, 9, 8)[:, :, ::2]}, "the stride of x"),
        ({"x": seeded(2, 1025, 4)}, "the number of tokens N of x is 1025; expected 1 to 1024"),
        ({"x": seeded(2, 9, 0)}, "the width D of x is 0"),
        ({"keep": torch.zeros(3, 5, dtype=torch.int64)}, r"the shape of keep is \[3, 5\]; expected \[2, K\]"),
        ({"keep": torch.zeros(2, 5, dtype=torch.int32)}, "the dtype of keep is int32; expected int64"),
        ({"keep": torch.zeros(2, 0, dtype=torch.int64)}, "the number of rows K of keep is 0"),
        ({"into": torch.zeros(2, 3, dtype=torch.int64)}, r"the shape of into is \[2, 3\]; expected \[2, 4\]"),
        ({"source_weight": torch.ones(2, 4).half()}, "the dtype of source_weight is float16; expected float32"),
        ({"keep_weight": torch.ones(2, 4)}, r"the shape of keep_weight is \[2, 4\]; expected \[2, 5\]"),
        ({"keep": torch.full((2, 5), 9)}, r"keep is 9 \(in it\); expected 0 to 8"),
        ({"source": torch.full((2, 4), -1)}, r"source is -1 \(in it\); expected 0 to 8"),
        ({"into": torch.full((2, 4), 5)}, r"into is 5 \(in it\); expected 0 to 4"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    merge_rows(**GOOD)
    with pytest.raises(KernelError, match=message):
        merge_rows(**{**GOOD, **change})
