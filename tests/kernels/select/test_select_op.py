"""vp::select and vp::select_fuse in torch: argument checks, export and compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import seeded, without_interpreter
from vp_kernels.errors import KernelError
from vp_kernels.gather_norm.op import gather_norm
from vp_kernels.select.op import select, select_fuse


def test_select_on_a_cpu() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.3], [0.5, float("nan"), 0.5, 0.9]])
    assert select(scores, 2).tolist() == [[1, 2], [1, 3]]
    assert select(scores, 3, by_score=True).tolist() == [[1, 2, 3], [1, 3, 0]]
    assert select(scores, 3, by_score=True).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_select_fuse_on_a_cpu(dtype: torch.dtype) -> None:
    x = torch.arange(10, dtype=dtype).reshape(1, 5, 2)
    index, fused = select_fuse(torch.tensor([[0.5, 2.0, 3.0, 1.0]]), x, 2)
    assert index.tolist() == [[1, 2]]
    assert fused.dtype == dtype
    assert fused.tolist() == [[[0.5 * 2 + 8, 0.5 * 3 + 9]]]  # rows 1 and 4 of x
    assert select_fuse(torch.ones(1, 4), x, 4)[1].tolist() == [[[0.0, 0.0]]]


def test_opcheck() -> None:
    scores = seeded(3, 6)
    torch.library.opcheck(torch.ops.vp.select.default, (scores[:, 1:], 2))
    torch.library.opcheck(torch.ops.vp.select.default, (scores, 6, True), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.vp.select_fuse.default, (scores, seeded(3, 7, 8, dtype=torch.bfloat16), 2))


class Reduced(torch.nn.Module):
    def forward(self, scores: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        index, fused = select_fuse(scores[:, 1:], x, 3)
        order = select(scores, 2, by_score=True)
        return (*gather_norm(x, index + 1, weight, bias, 1e-6, None, fused), order)


def inputs(batch: int = 3, device: str = "cpu") -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in (seeded(batch, 7), seeded(batch, 7, 8), seeded(8), seeded(8)))


def test_export_keeps_one_node_each_and_a_dynamic_batch() -> None:
    some = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Reduced(), inputs(), dynamic_shapes=(some, some, None, None)).run_decompositions({})
    targets = [str(node.target) for node in program.graph.nodes if "vp." in str(node.target)]
    assert sorted(targets) == ["vp.gather_norm.default", "vp.select.default", "vp.select_fuse.default"]
    for found, expected in zip(program.module()(*inputs(5)), Reduced()(*inputs(5)), strict=True):
        assert torch.equal(found, expected)


def test_compile() -> None:
    compiled = torch.compile(
        Reduced(), fullgraph=True, backend="aot_eager"
    )  # Inductor would take 10 s in a C++ compiler
    for found, expected in zip(compiled(*inputs()), Reduced()(*inputs()), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select(seeded(3), 1), r"vp::select: the shape of scores is \[3\]; expected \[B, n\]"),
        (lambda: select(seeded(3, 4).half(), 1), "the dtype of scores is float16; expected float32"),
        (lambda: select(seeded(4, 3).T, 1), "the stride of scores"),
        (lambda: select(seeded(3, 4), 0), "vp::select: k is 0; expected 1 to 4"),
        (lambda: select(seeded(3, 4), 5), "k is 5; expected 1 to 4"),
        (lambda: select(seeded(3, 1025), 5), "the number of scores is 1025; expected 1 to 1024"),
        (lambda: select_fuse(seeded(3, 4), seeded(3, 5, 8), 5), "vp::select_fuse: k is 5; expected 1 to 4"),
        (lambda: select_fuse(seeded(3, 4), seeded(3, 3, 8), 2), "the number of tokens of x is 3; expected 4 to 1024"),
        (lambda: select_fuse(seeded(3, 4), seeded(2, 5, 8), 2), r"the shape of x is \[2, 5, 8\]; expected \[3, N, D\]"),
        (lambda: select_fuse(seeded(3, 4), seeded(3, 5, 8).double(), 2), "the dtype of x is float64"),
        (lambda: select_fuse(seeded(3, 4), seeded(3, 5, 8)[:, :, ::2], 2), "the stride of x"),
        (lambda: select_fuse(seeded(3, 4), seeded(3, 5, 0), 2), "the width of x is 0"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()


# As AOTInductor would process the operators of `Reduced`.
TRACE = """
from tests.kernels.fake_cuda import written
from tests.kernels.select.test_select_op import Reduced

for each in written(Reduced(), (3, 7), (3, 7, 8), (8,), (8,)):
    print(each)
"""


@pytest.mark.slow
def test_kernels_are_traced_for_cuda_and_known_to_write_their_outputs_only() -> None:
    assert without_interpreter(TRACE) == ["fused_ptr,index_ptr", "index_ptr", "kept_ptr,normed_ptr"]
