"""vp::density_merge in torch: CPU implementation, argument checks, export and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.density_merge.cases import Plan, decided, inputs, usual
from tests.kernels.support import DTYPES, assert_within, without_interpreter
from vp_kernels.density_merge import reference
from vp_kernels.density_merge.op import density_merge
from vp_kernels.errors import KernelError
from vp_kernels.launch import triton_type

PLAN = Plan(50, 1, 25, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=triton_type)
@pytest.mark.parametrize(
    "plan", [PLAN, usual(197, 1, 0.7), Plan(33, 2, 18, 0, 15), Plan(33, 0, 33, 33, 0), Plan(1, 0, 1, 0, 0)], ids=str
)
def test_the_torch_form_is_the_reference(plan: Plan, dtype: torch.dtype) -> None:
    for weights, sizes in (("attention", False), ("size", True)):
        x, scores, size = inputs(plan, 3, 40, dtype, sizes)
        images = decided(x, scores, plan)
        assert images
        found, found_size = density_merge(x, scores, size, *plan.counts, weights)
        truth, true_size = reference.density_merge(x.double(), scores, size, *plan.counts, weights)
        bound = bounds.density_merge(x, truth, bounds.density_members(x, scores, plan.counts))
        assert_within(str(plan), found[images], truth[images], bound[images], dtype)
        assert torch.equal(found_size[images].double(), true_size[images])
        assert found_size.dtype == torch.float32


def test_by_hand() -> None:
    """8 patch tokens of 2 channels: 4 attentive with one merged pair, 4 inattentive in two clusters."""
    x = torch.tensor(
        [[[9, 9], [1, 0], [0, 1], [0, 2], [2, 0.1], [5, 5], [5, 6], [-5, 5], [-5, 6]]], dtype=torch.float32
    )
    scores = torch.tensor([[0.9, 0.5, 0.6, 0.5, 0.7, 0.1, 0.3, 0.1, 0.1]])
    merged, size = density_merge(x, scores, None, 6, 2, 1, 1)
    # even: rows 1 and 3; odd: rows 2 and 4. 3 and 2 have cosine 1, so 3 joins 2; 1 stays.
    expected = [[9, 9], [1, 0], [0, (0.6 * 1 + 0.5 * 2) / 1.1], [2, 0.1], [5, (0.1 * 5 + 0.3 * 6) / 0.4], [-5, 5.5]]
    torch.testing.assert_close(merged, torch.tensor([expected]))
    assert size.tolist() == [[1, 1, 2, 1, 2, 2]]


@pytest.mark.slow
def test_opcheck() -> None:
    x, scores, size = inputs(PLAN, 2, 8, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.vp.density_merge.default, (x, scores, size, *PLAN.arguments))
    without = (x, scores, None, *PLAN.arguments)
    torch.library.opcheck(torch.ops.vp.density_merge.default, without, test_utils=("test_schema", "test_faketensor"))


class Reduced(torch.nn.Module):
    def forward(self, x: Tensor, scores: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        x, size = density_merge(x * 2.0, scores, size, *PLAN.arguments)
        return *density_merge(x, scores[:, : x.shape[1]].contiguous(), None, 12, 3, 2, 1, "size"), size


def some(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x, scores, size = inputs(PLAN, batch, 8, torch.float32, True)
    assert size is not None
    return x, scores, size


@pytest.mark.slow
def test_export_keeps_one_node_and_a_dynamic_batch() -> None:
    dynamic = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Reduced(), some(3), dynamic_shapes=(dynamic,) * 3).run_decompositions({})
    targets = [str(node.target) for node in program.graph.nodes if "vp." in str(node.target)]
    assert targets == ["vp.density_merge.default"] * 2
    for found, expected in zip(program.module()(*some(5)), Reduced()(*some(5)), strict=True):
        assert torch.equal(found, expected)


def test_compile() -> None:
    compiled = torch.compile(Reduced(), fullgraph=True, backend="aot_eager")  # Inductor would need a C++ compiler
    for found, expected in zip(compiled(*some(3)), Reduced()(*some(3)), strict=True):
        torch.testing.assert_close(found, expected)


X, SCORES = torch.zeros(2, 50, 8), torch.zeros(2, 50)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(50, 8)}, r"vp::density_merge: the shape of x is \[50, 8\]; expected \[B, N, D\]"),
    ({"x": X.double()}, "the dtype of x is float64; expected float32 or float16 or bfloat16"),
    ({"x": torch.zeros(2, 8, 50).transpose(1, 2)}, "the stride of x"),
    ({"x": torch.zeros(2, 50, 0)}, "D of x is 0; expected 1 or more"),
    ({"x": torch.zeros(1, 1025, 1)}, "N of x is 1025; expected 1 to 1024"),
    ({"x": X.to("meta")}, "device is meta; expected cpu or cuda"),
    ({"scores": SCORES.half()}, "the dtype of scores is float16; expected float32"),
    ({"scores": SCORES[:, 1:]}, r"the shape of scores is \[2, 49\]; expected \[2, 50\]"),
    ({"scores": torch.zeros(50, 2).T}, "the stride of scores"),
    ({"size": torch.ones(2, 50).long()}, "the dtype of size is int64; expected float32"),
    ({"size": torch.ones(3, 50)}, r"the shape of size is \[3, 50\]; expected \[2, 50\]"),
    ({"size": torch.ones(2, 50, device="meta")}, "the device of size is meta"),
    ({"weights": "mass"}, "weights is 'mass'; expected 'attention' or 'size'"),
    ({"prefix": 50}, "prefix is 50; expected 0 to 49"),
    ({"prefix": -1}, "prefix is -1; expected 0 to 49"),
    ({"pairs": -1}, "pairs is -1"),
    ({"tokens_out": 1}, r"tokens_out is 1; expected 2 to 47 \(1 prefix and 49 patch tokens enter, 3 pairs merge\)"),
    ({"tokens_out": 48}, "tokens_out is 48; expected 2 to 47"),
    ({"clusters": 25}, r"clusters is 25; expected 0 to 24 \(tokens_out leaves room for 24 patch tokens\)"),
    ({"clusters": -1}, "clusters is -1; expected 0 to 24"),
    ({"pairs": 21}, r"pairs is 21; expected 0 to 20 \(41 attentive tokens are matched\)"),
    ({"clusters": 0}, r"clusters is 0; expected 1 to 22 \(22 inattentive tokens are clustered\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "scores": SCORES, "size": None, "tokens_out": 25, "clusters": 4, "pairs": 3, "prefix": 1}
    density_merge(**arguments)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=message):
        density_merge(**{**arguments, **change})


# As AOTInductor would process the operator in `Reduced`.
TRACE = """
from tests.kernels.density_merge.test_density_merge_op import Reduced
from tests.kernels.fake_cuda import written

for each in written(Reduced(), (3, 50, 8), (3, 50), (3, 50)):
    print(each)
"""


@pytest.mark.slow
def test_kernels_are_traced_for_cuda_and_known_to_write_their_outputs_only() -> None:
    assert without_interpreter(TRACE) == ["merged_ptr,merged_size_ptr,scratch_ptr"] * 2
