"""vp::gather_norm in torch: argument checks, gradients, export and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.support import seeded
from vp_kernels.errors import KernelError
from vp_kernels.gather_norm.op import gather_norm

EPS = 1e-6
SHORT = ("test_schema", "test_autograd_registration", "test_faketensor")  # without the slow tracing


def arguments(dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Any]:
    tensors = {
        "x": seeded(3, 7, 8, dtype=dtype),
        "weight": seeded(8, seed=1, dtype=dtype),
        "bias": seeded(8, seed=2, dtype=dtype),
        "residual": seeded(3, 7, 8, seed=3, dtype=dtype),
        "extra": seeded(3, 2, 8, seed=4, dtype=dtype),
    }
    return {
        **{name: value.requires_grad_(grad) for name, value in tensors.items()},
        "index": torch.tensor([[0, 2, 2], [1, 5, 6], [3, 3, 3]]),
        "eps": EPS,
    }


def by_hand(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """In standard operators, differentiated by torch."""
    index = given["index"].expand(3, -1)
    rows = torch.stack([(given["x"] + given["residual"])[b][index[b]] for b in range(3)])
    rows = torch.cat([rows, given["extra"]], dim=1)
    return rows, F.layer_norm(rows, (8,), given["weight"], given["bias"], EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_cpu_it_is_the_reference(dtype: torch.dtype) -> None:
    given = arguments(dtype)
    for found, expected in zip(gather_norm(**given), by_hand(given), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=0.03 if dtype != torch.float32 else 1e-5, rtol=0.01)


def test_opcheck() -> None:
    names = ("x", "index", "weight", "bias", "eps", "residual", "extra")
    full = arguments(grad=True)
    operator = torch.ops.vp.gather_norm.default
    torch.library.opcheck(operator, tuple(full[name] for name in names))
    full["index"] = full["index"][0]
    torch.library.opcheck(operator, tuple(full[name] for name in names[:5]), test_utils=SHORT)
    torch.library.opcheck(operator, tuple(arguments(torch.bfloat16)[name] for name in names[:6]), test_utils=SHORT)


@pytest.mark.parametrize("shared", [False, True], ids=["each image", "one index"])
def test_gradients(shared: bool) -> None:
    ours, theirs = arguments(grad=True), arguments(grad=True)
    if shared:
        ours["index"] = theirs["index"] = torch.tensor([6, 1, 6, 6])
    for given, (kept, normed) in ((ours, gather_norm(**ours)), (theirs, by_hand(theirs))):
        loss = (kept * seeded(*kept.shape, seed=5)).sum() + (normed * seeded(*normed.shape, seed=6)).sum()
        loss.backward()
        assert given["x"].grad.abs().max() > 0.1
    for name in ("x", "weight", "bias", "residual", "extra"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_gradient_without_options_and_of_one_output() -> None:
    x = seeded(1, 4, 8).requires_grad_()
    index, weight, bias = torch.tensor([1, 1]), torch.ones(8), torch.zeros(8)
    _, normed = gather_norm(x, index, weight, bias, EPS)
    (normed * seeded(1, 2, 8)).sum().backward()
    again = x.detach().requires_grad_()
    (F.layer_norm(again[:, index], (8,), eps=EPS) * seeded(1, 2, 8)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, atol=1e-5, rtol=1e-4)
    assert weight.grad is None


class Reduced(torch.nn.Module):
    def forward(self, x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        return gather_norm(x, index, weight, bias, EPS, x, extra)


def test_export_keeps_one_node_and_a_dynamic_batch() -> None:
    given = tuple(arguments()[name] for name in ("x", "index", "weight", "bias", "extra"))
    batch = torch.export.Dim("batch", min=1)
    some = {0: batch}
    program = torch.export.export(Reduced(), given, dynamic_shapes=(some, some, None, None, some)).run_decompositions(
        {}
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [each for each in targets if "getitem" not in each] == ["vp.gather_norm.default"]
    other = tuple(seeded(5, *t.shape[1:], seed=9) if t.is_floating_point() and t.ndim > 1 else t for t in given)
    other = (other[0], torch.tensor([[1, 2, 0]]).expand(5, 3).contiguous(), *other[2:])
    for found, expected in zip(program.module()(*other), Reduced()(*other), strict=True):
        assert torch.equal(found, expected)


def test_compile() -> None:
    given = tuple(arguments()[name] for name in ("x", "index", "weight", "bias", "extra"))
    compiled = torch.compile(
        Reduced(), fullgraph=True, backend="aot_eager"
    )  # Inductor would take 10 s in a C++ compiler
    for found, expected in zip(compiled(*given), Reduced()(*given), strict=True):
        torch.testing.assert_close(found, expected)
    outside = (given[0], given[1] + 4, *given[2:])  # 9 is not one of 7 rows; compiled code cannot raise
    kept, normed = compiled(*outside)
    bad = torch.cat([outside[1] > 6, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    assert torch.equal(kept.isnan().all(2), bad)
    assert torch.equal(normed.isnan().any(2), bad)


def test_compiled_gradients() -> None:
    others = arguments()

    def loss(x: Tensor, extra: Tensor) -> Tensor:
        given = {**others, "x": x, "extra": extra}
        return torch.stack([each.square().sum() for each in gather_norm(**given)]).sum()

    eager, compiled = (arguments(grad=True) for _ in range(2))
    loss(eager["x"], eager["extra"]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled["x"], compiled["extra"]).backward()
    for name in ("x", "extra"):
        torch.testing.assert_close(eager[name].grad, compiled[name].grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": seeded(3, 7)}, r"vp::gather_norm: the shape of x is \[3, 7\]; expected \[B, N, D\]"),
        ({"x": seeded(3, 7, 8).double()}, "the dtype of x is float64; expected float32 or float16 or bfloat16"),
        ({"x": seeded(7, 3, 8).transpose(0, 1)}, "the stride of x"),
        ({"x": seeded(3, 1025, 8)}, "the number of tokens of x is 1025; expected 1 to 1024"),
        ({"x": seeded(3, 7, 4097)}, "the width of x is 4097"),
        ({"index": torch.zeros(2, 3, dtype=torch.int64)}, r"the shape of index is \[2, 3\]; expected \[3, K\]"),
        ({"index": torch.zeros(1, 3, 3, dtype=torch.int64)}, r"the shape of index is \[1, 3, 3\]; expected \[K\] or"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "the dtype of index is int32; expected int64"),
        ({"index": torch.tensor([0, 7])}, r"index is 7 \(in it\); expected 0 to 6"),
        ({"index": torch.tensor([-1, 6])}, r"index is -1 \(in it\); expected 0 to 6"),
        ({"weight": seeded(7)}, r"the shape of weight is \[7\]; expected \[8\]"),
        ({"bias": seeded(8).half()}, "the dtype of bias is float16; expected float32"),
        ({"eps": -1e-6}, "eps is -1e-06; expected 0 or more"),
        ({"residual": seeded(3, 6, 8)}, r"the shape of residual is \[3, 6, 8\]; expected \[3, 7, 8\]"),
        ({"extra": seeded(2, 2, 8)}, r"the shape of extra is \[2, 2, 8\]; expected \[3, E, 8\]"),
        ({"extra": seeded(3, 2, 8).bfloat16()}, "the dtype of extra is bfloat16; expected float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        gather_norm(**{**arguments(), **change})


def test_empty_index_on_a_cpu() -> None:
    given = arguments()
    given["index"] = torch.zeros(0, dtype=torch.int64)
    kept, normed = gather_norm(**given)
    assert torch.equal(kept, given["extra"])
    assert normed.shape == (3, 2, 8)
