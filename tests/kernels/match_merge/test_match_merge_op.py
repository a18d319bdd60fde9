"""vp::match_merge in torch: argument checks, gradients, export, compilation and Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.match_merge.cases import MARGIN, few_directions, keys, margins, peaked, sizes
from tests.kernels.support import DTYPES, assert_within, seeded, without_interpreter
from vp_kernels.errors import KernelError
from vp_kernels.match_merge.op import match_merge, match_merge_torch, match_torch
from vp_kernels.match_merge.reference import match_merge_reference, match_reference


def test_by_hand() -> None:
    """Prefix 0, A = 1, 3, B = 2, 4: 3 is most similar to 4, and the tokens of size 2 and 1 merge in 4."""
    x = torch.tensor([[[9.0], [4.0], [1.0], [7.0], [2.0]]])
    metric = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [3.0, 3.0]]])
    metric[0, 4] = torch.tensor([0.0, 5.0])  # with B at odd positions: 1 and 3; A at even ones: 2 and 4
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]])
    merged, new = match_merge(x, metric, size, 1, 1)
    assert new.tolist() == [[1.0, 1.0, 3.0, 1.0]]  # class, 2, 1 with 4 in it, 3
    torch.testing.assert_close(merged, torch.tensor([[[9.0], [1.0], [8.0 / 3.0], [7.0]]]))
    scores = torch.tensor([[0.1, 0.6, 0.2, 0.1]])  # peaked: the lowest is dropped, of two equal ones the last
    pruned, left = match_merge(x, metric, size, 1, 1, scores, 0.01)
    assert (pruned.flatten().tolist(), left.tolist()) == ([9.0, 1.0, 7.0, 4.0], [[1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(match_merge(x, metric, size, 1, 1, scores, 0.5)[0], merged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "prefix"), [(2, 0), (17, 1), (50, 2), (65, 1)])
def test_torch_form_is_the_reference(tokens: int, prefix: int, dtype: torch.dtype) -> None:
    x, metric = seeded(3, tokens, 12, dtype=dtype), keys(3, tokens, 3, 8, dtype)
    scores, tau = peaked(3, tokens - prefix)
    for r in sorted({1, (tokens - prefix) // 2}):
        for size, given in ((None, None), (sizes(3, tokens), None), (None, scores), (sizes(3, tokens), scores)):
            clear = margins(metric, r, prefix, given, tau) >= MARGIN
            assert bool(clear.any())
            chosen = (metric, size, r, prefix, given, tau)
            truth = match_merge_reference(x.double(), metric.double(), *chosen[1:])
            limits = bounds.merge_rows(x, *match_reference(metric.double(), *chosen[1:]))
            for name, *each, of in zip(
                ("x", "size"), match_merge_torch(x, *chosen), truth, limits, (dtype, torch.float32), strict=True
            ):
                assert_within(name, *(one[clear] for one in each), of)


def test_ties_go_to_the_lowest_index_and_nan_is_above_everything() -> None:
    metric = few_directions(3, 40, 8)
    metric[1, 11] = metric[1, 14] = torch.nan
    scores = torch.randint(1, 4, (3, 39), generator=torch.Generator().manual_seed(0)).float()
    scores[2, 7] = torch.nan
    for r in (1, 8, 19):
        for given in (None, scores):
            found, expected = (
                match_torch(metric, None, r, 1, given, 1.0),
                match_reference(metric, None, r, 1, given, 1.0),
            )
            for ours, theirs in zip(found[:4], expected[:4], strict=True):
                assert torch.equal(torch.ones(3, r) if ours is None else ours, theirs)


def test_gradients_go_through_the_map() -> None:
    x, metric, size = seeded(3, 20, 4).requires_grad_(), keys(3, 20, 2, 8), sizes(3, 20).requires_grad_()
    scores, tau = peaked(3, 19)
    for arguments in ((metric, size, 6, 1), (metric, size, 6, 1, scores, tau), (metric, None, 6, 1, scores, tau)):
        leaves = (x,) if arguments[1] is None else (x, size)
        found = []
        for form in (match_merge, match_merge_torch):
            merged, new = form(x, *arguments)
            loss = merged.sin().sum() + (new.square().sum() if new.requires_grad else 0.0)
            found.append(torch.autograd.grad(loss, leaves))
        torch.testing.assert_close(found[0], found[1])
        assert all(bool(each.any()) for each in found[0])
    assert not match_merge(x.detach(), metric, None, 6, 1)[0].requires_grad


@pytest.mark.slow
def test_opcheck() -> None:
    scores, tau = peaked(2, 11)
    x, metric, size = seeded(2, 12, 4), keys(2, 12, 2, 8), sizes(2, 12)
    operator = torch.ops.vp.match_merge.default
    torch.library.opcheck(operator, (x.requires_grad_(), metric, size, 4, 1, scores, tau))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (x.bfloat16(), metric[:, :, 0], None, 4, 1), test_utils=tests)


class Layer(torch.nn.Module):
    """The operator between others, as in a reduced block."""

    def __init__(self, sized: bool = True, scored: bool = True) -> None:
        super().__init__()
        self.sized, self.scored = sized, scored

    def forward(self, x: Tensor, qkv: Tensor, size: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        given = scores[:, 1:] if self.scored else None
        merged, new = match_merge(x * 2, qkv[:, :, 1], size if self.sized else None, 3, 1, given, 1e-3)
        return merged + 1, new


class Packed(Layer):
    """The same, computed from one tensor [B, N, 3, H, d]."""

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        query = qkv[:, :, 0].flatten(2)
        return super().forward(query, qkv, query[:, :, 0].float() + 1, query[:, :, 1].float().softmax(1))


def inputs(batch: int = 3, tokens: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    scores = torch.softmax(seeded(batch, tokens), dim=1)
    return (
        seeded(batch, tokens, 16, dtype=dtype),
        seeded(batch, tokens, 3, 2, 8, dtype=dtype),
        sizes(batch, tokens),
        scores,
    )


def test_export_keeps_one_node_and_a_dynamic_batch() -> None:
    some = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Layer(), inputs(), dynamic_shapes=(some,) * 4)
    nodes = [str(node.target) for node in program.run_decompositions({}).graph.nodes if "vp." in str(node.target)]
    assert nodes == ["vp.match_merge.default"]
    for found, expected in zip(program.module()(*inputs(5)), Layer()(*inputs(5)), strict=True):
        torch.testing.assert_close(found, expected)


def test_compile() -> None:
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")  # Inductor would take 10 s in a C++ compiler
    for found, expected in zip(compiled(*inputs()), Layer()(*inputs()), strict=True):
        torch.testing.assert_close(found, expected)


# Run in the child: Inductor's code for a GPU, of both operators, and which tensors it believes to be written.
INDUCTOR = """
import torch
from tests.kernels import fake_cuda
fake_cuda.pretend()
from torch._higher_order_ops import triton_kernel_wrap as wrap
from tests.kernels.match_merge.test_match_merge_op import Packed
original, written = wrap.identify_mutated_tensors, set()

def identify(kernel, *rest):
    found = original(kernel, *rest)
    written.update(found)
    return found

wrap.identify_mutated_tensors = identify
for flags, tokens in (((False, False), 197), ((True, True), 400)):
    written.clear()
    code = fake_cuda.inductor_code(Packed(*flags), torch.randn(2, tokens, 3, 6, 64).bfloat16())
    print("launches", *fake_cuda.launches(code))
    print("written", *sorted(written))
"""


@pytest.mark.slow
def test_inductor_takes_the_kernels_as_they_are() -> None:
    """Two launches between Inductor's own, no copies before them, and the correct tensors are considered written."""
    lines = without_interpreter(INDUCTOR)
    found = [line.split()[1:] for line in lines if line.startswith(("launches", "written"))]
    maps = {"keep", "source", "into", "best", "partner", "merged", "mass"}
    for calls in found[::2]:
        assert [call for call in calls if not call.startswith("triton_")] == ["match_kernel", "merge_rows_kernel"]
    assert len(found[0]) == 4  # ours, the product in front, and the sum behind
    assert set(found[1]) == maps
    assert set(found[3]) == maps | {"weight", "keep_weight", "unit"}


GOOD: dict[str, Any] = {
    "x": seeded(2, 12, 4), "metric": seeded(2, 12, 8), "size": sizes(2, 12), "r": 4, "prefix": 1,
    "scores": peaked(2, 11)[0], "tau": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": seeded(2, 12)}, r"vp::match_merge: the shape of x is \[2, 12\]; expected \[B, N, D\]"),
        ({"x": seeded(2, 12, 4).double()}, "the dtype of x is float64"),
        ({"x": seeded(2, 12, 8)[:, :, ::2]}, "the stride of x"),
        ({"x": seeded(2, 1, 4)}, "the number of tokens N of x is 1; expected 2 to 1024"),
        ({"x": seeded(2, 1025, 4)}, "the number of tokens N of x is 1025"),
        ({"metric": seeded(2, 11, 8)}, r"the shape of metric is \[2, 11, 8\]; expected \[2, 12, d\]"),
        ({"metric": seeded(2, 12, 2, 3, 8)}, r"the shape of metric is \[2, 12, 2, 3, 8\]"),
        ({"metric": seeded(2, 12, 0, 8)}, "the number of heads H of metric is 0"),
        ({"metric": seeded(2, 12, 257)}, "the width d of metric is 257; expected 1 to 256"),
        ({"metric": seeded(2, 12, 16)[:, :, ::2]}, "the stride of metric"),
        ({"size": sizes(2, 12).half()}, "the dtype of size is float16; expected float32"),
        ({"size": sizes(2, 11)}, r"the shape of size is \[2, 11\]; expected \[2, 12\]"),
        ({"scores": seeded(2, 12)}, r"the shape of scores is \[2, 12\]; expected \[2, 11\]"),
        ({"prefix": -1}, "prefix is -1; expected 0 to 10"),
        ({"prefix": 11}, "prefix is 11"),
        ({"r": 0}, "r is 0; expected 1 to 5"),
        ({"r": 6}, "r is 6; expected 1 to 5"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    match_merge(**GOOD)
    with pytest.raises(KernelError, match=message):
        match_merge(**{**GOOD, **change})
