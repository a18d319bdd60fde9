"""vp::attention in torch: argument checks, CPU implementation, gradients, export, compilation and tracing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.kernels import bounds
from tests.kernels.support import DTYPES, assert_within, seeded, without_interpreter
from vp_kernels.attention.kernel import PROGRAMS, programs_a_head
from vp_kernels.attention.op import HEAD_DIMS, attention
from vp_kernels.attention.reference import attention_gradients, attention_reference
from vp_kernels.errors import KernelError

IMPORTANCE = ("none", "class", "mean")


class Layer(nn.Module):
    """Attention alone."""

    def __init__(self, importance: str) -> None:
        super().__init__()
        self.importance = importance

    def forward(self, qkv: Tensor, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return attention(qkv, key_bias, self.importance)


def removing(batch: int, tokens: int) -> Tensor:
    """A bias that masks some keys of every image."""
    bias = seeded(batch, tokens, seed=3)
    bias[:, 1::4] = -torch.inf
    return bias


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("batch_of_bias", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_it_is_the_reference(dtype: torch.dtype, batch_of_bias: int, importance: str) -> None:
    qkv = seeded(3, 50, 3, 2, 32, dtype=dtype)
    bias = removing(batch_of_bias, 50) if batch_of_bias else None
    out, received = attention(qkv, bias, importance)
    truth, truth_received = attention_reference(qkv.double(), bias, importance)
    assert out.is_contiguous()
    bound, bound_received = bounds.attention(qkv, bias, importance)
    assert_within("out", out, truth, bound, dtype)
    if importance == "none":
        assert received is None
    else:
        assert received is not None
        assert_within("importance", received, truth_received, bound_received, torch.float32)


def test_reference_is_the_formula() -> None:
    """One query and one key at a time."""
    qkv, bias = seeded(2, 5, 3, 2, 4, dtype=torch.float64), removing(2, 5)
    out, of_class = attention_reference(qkv, bias, "class")
    of_all = attention_reference(qkv, bias, "mean")[1]
    for image in range(2):
        weights = torch.zeros(2, 5, 5, dtype=torch.float64)
        for head in range(2):
            q, k, v = qkv[image, :, :, head].unbind(1)
            for query in range(5):
                exponentials = torch.stack([(q[query] @ k[key] / 2.0 + bias[image, key]).exp() for key in range(5)])
                weights[head, query] = exponentials / exponentials.sum()
                found = out[image, query, 4 * head : 4 * head + 4]
                torch.testing.assert_close(found, sum(weights[head, query, key] * v[key] for key in range(5)))
        torch.testing.assert_close(of_class[image], (weights[0, 0] + weights[1, 0]) / 2)
        torch.testing.assert_close(of_all[image], weights.reshape(10, 5).sum(dim=0) / 10)


def test_a_row_without_keys_is_nan() -> None:
    bias = torch.zeros(2, 9)
    bias[0] = -torch.inf
    for importance in ("class", "mean"):
        out, received = attention(seeded(2, 9, 3, 2, 32), bias, importance)
        assert received is not None
        assert bool(out[0].isnan().all())
        assert bool(received[0].isnan().all())
        assert bool(out[1].isfinite().all())
        assert bool(received[1].isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, b: (q.to("meta"), b, "none"), "device is meta; expected cpu or cuda"),
        (lambda q, b: (q.double(), b, "none"), "the dtype of qkv is float64; expected float32 or float16 or bfloat16"),
        (lambda q, b: (q.int(), b, "none"), "the dtype of qkv is int32"),
        (lambda q, b: (q[0], b, "none"), "the shape of qkv is [6, 3, 2, 32]; expected [B, N, 3, H, 32 or 64 or 80"),
        (lambda q, b: (q[:, :, :2].contiguous(), b, "none"), "the shape of qkv is [2, 6, 2, 2, 32]; expected [B, N, 3"),
        (lambda q, b: (q[..., :31].contiguous(), b, "none"), "the shape of qkv is [2, 6, 3, 2, 31]"),
        (lambda q, b: (q.transpose(0, 1), None, "none"), "the stride of qkv is (192, 1152, 64"),
        (lambda q, b: (q[:, :0], b[:, :0], "none"), "the number of tokens N of qkv is 0; expected 1 to 1024"),
        (lambda q, b: (q.repeat(1, 171, 1, 1, 1), b, "none"), "the number of tokens N of qkv is 1026; expected 1 to"),
        (lambda q, b: (q[:, :, :, :0], b, "none"), "the number of heads H of qkv is 0; expected 1 or more"),
        (lambda q, b: (q, b.half(), "none"), "the dtype of key_bias is float16; expected float32"),
        (lambda q, b: (q, b[:, :5].contiguous(), "none"), "the shape of key_bias is [2, 5]; expected [1 or 2, 6]"),
        (lambda q, b: (q, b.repeat(2, 1), "none"), "the shape of key_bias is [4, 6]; expected [1 or 2, 6]"),
        (lambda q, b: (q, b[0], "none"), "the shape of key_bias is [6]; expected [1 or 2, 6]"),
        (lambda q, b: (q, b.t().contiguous().t(), "none"), "the stride of key_bias is (1, 2)"),
        (lambda q, b: (q, b.to("meta"), "none"), "the device of key_bias is meta; expected cpu"),
        (lambda q, b: (q, b, "cls"), "importance is 'cls'; expected 'none' or 'class' or 'mean'"),
    ],
)
def test_bad_arguments(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, str]], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        attention(*change(seeded(2, 6, 3, 2, 32), seeded(2, 6)))
    assert str(caught.value).startswith(f"vp::attention: {message}")


@pytest.mark.parametrize("width", HEAD_DIMS)
def test_every_head_dim_is_taken(width: int) -> None:
    assert attention(seeded(1, 4, 3, 2, width))[0].shape == (1, 4, 2 * width)


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_opcheck(importance: str) -> None:
    operator = torch.ops.vp.attention.default
    short = ("test_schema", "test_autograd_registration", "test_faketensor")  # without the slow tracing
    full = (seeded(2, 9, 3, 2, 32).requires_grad_(), seeded(2, 9).requires_grad_(), importance)
    torch.library.opcheck(operator, full, **({} if importance == "mean" else {"test_utils": short}))
    torch.library.opcheck(operator, (seeded(2, 9, 3, 2, 32, dtype=torch.bfloat16), seeded(1, 9)), test_utils=short)
    torch.library.opcheck(operator, (seeded(0, 9, 3, 2, 32), None, importance), test_utils=short)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("batch_of_bias", [0, 1, 2])
def test_gradients_are_those_of_the_formula(importance: str, batch_of_bias: int) -> None:
    """Against finite differences, in fp64; and the operator's against those of the reference, through autograd."""
    qkv = seeded(2, 4, 3, 2, 32, dtype=torch.float64).requires_grad_()
    bias = removing(batch_of_bias, 4).double().requires_grad_() if batch_of_bias else None
    given = [qkv] if bias is None else [qkv, bias]
    weight = seeded(2, 4, 64, seed=5)
    weight_received = seeded(2, 4, seed=6)

    def loss(out: Tensor, received: Tensor | None) -> Tensor:
        total = (out * weight.to(out.dtype)).sum()
        return total if importance == "none" or received is None else total + (received * weight_received).sum()

    expected = torch.autograd.grad(loss(*attention_reference(qkv, bias, importance)), given)
    found = attention_gradients(qkv, bias, importance, weight.double(), weight_received.double())
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other)
    single = [each.detach().float().requires_grad_() for each in given]
    of_operator = torch.autograd.grad(loss(*attention(single[0], *single[1:2], importance=importance)), single)
    for one, other in zip(of_operator, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("importance", ["class", "mean"])
def test_gradients_are_finite_differences(importance: str) -> None:
    class Spelled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(qkv, bias)
            return attention_reference(qkv, bias, importance)

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
            return attention_gradients(*ctx.saved_tensors, importance, *grads)

    qkv = seeded(2, 3, 3, 2, 2, dtype=torch.float64).requires_grad_()
    bias = seeded(1, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(Spelled.apply, (qkv, bias))


@pytest.mark.parametrize("wanted", ["qkv", "key_bias"])
def test_gradient_of_one_argument_alone(wanted: str) -> None:
    qkv, bias = seeded(2, 5, 3, 1, 32), seeded(2, 5)
    (qkv if wanted == "qkv" else bias).requires_grad_()
    attention(qkv, bias, "mean")[0].square().sum().backward()
    assert (qkv.grad is not None, bias.grad is not None) == (wanted == "qkv", wanted == "key_bias")


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_one_node(strict: bool) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    given = (seeded(2, 9, 3, 2, 32), seeded(2, 9))
    with torch.no_grad():
        program = torch.export.export(Layer("class"), given, dynamic_shapes=(batch, batch), strict=strict)
        program = program.run_decompositions()
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert [each for each in called if isinstance(each, torch._ops.OpOverload)] == [torch.ops.vp.attention.default]
    qkv, bias = seeded(5, 9, 3, 2, 32), seeded(5, 9)
    for one, other in zip(program.module()(qkv, bias), attention(qkv, bias, "class"), strict=True):
        assert other is not None
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_compile_with_gradients() -> None:
    torch.compiler.reset()
    compiled = torch.compile(Layer("mean"), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        qkv, bias = seeded(batch, 9, 3, 2, 32).requires_grad_(), seeded(1, 9).requires_grad_()
        results = []
        for layer in (Layer("mean"), compiled):
            out, received = layer(qkv, bias)
            grads = torch.autograd.grad(out.square().sum() + received.square().sum(), (qkv, bias))
            results.append((out, received, *grads))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_inductor_on_a_cpu() -> None:
    torch.compiler.reset()
    qkv, bias = seeded(2, 9, 3, 2, 32), seeded(1, 9)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        found = torch.compile(Layer("class"), fullgraph=True)(qkv, bias)
    for one, other in zip(found, attention(qkv, bias, "class"), strict=True):
        assert other is not None
        torch.testing.assert_close(one, other)


TRACE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from vp_kernels.attention import op
from vp_kernels.attention.kernel import launch_attention

def launched(graph):
    calls = [node for node in graph.graph.nodes if node.target is triton_kernel_wrapper_mutation]
    names = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__ for node in calls]
    grids = [tuple(str(each) for each in node.kwargs["grid"][0]) for node in calls]
    return list(zip(names, grids))

with FakeTensorMode():
    def traced(batch, tokens, dtype, importance):
        qkv = torch.empty(batch, tokens, 3, 12, 64, dtype=dtype, device="cuda")
        bias = torch.empty(batch, tokens, device="cuda")
        return launched(make_fx(lambda q, b: launch_attention(q, b, importance))(qkv, bias))
    half = torch.bfloat16
    for given in ((1, 197, half, "none"), (64, 197, half, "class"), (16, 197, half, "mean"), (2, 300, half, "mean"),
                  (2, 50, torch.float32, "none")):
        print(traced(*given))

env = ShapeEnv()
with FakeTensorMode(shape_env=env):
    source = ConstantSource("B")
    symbol = env.create_symbol(4, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    batch = env.create_symintnode(symbol, hint=4, source=source)
    qkv = torch.empty(batch, 197, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    bias = torch.empty(batch, 197, device="cuda")
    def whole(q, b):
        op.check(q, b, "mean")
        return launch_attention(q, b, "mean")
    print(len(launched(make_fx(whole, tracing_mode="symbolic")(qkv, bias))))
    print(env.var_to_range[symbol].lower <= 2, env.var_to_range[symbol].is_int, symbol in env.replacements)
"""


@pytest.mark.slow
def test_tracing_for_a_gpu_shows_the_kernels() -> None:
    lines = without_interpreter(TRACE)
    assert [eval(line) for line in lines[:5]] == [
        [("attention_whole", ("12", "4", "1"))],  # small batch: one program per query tile
        # large batch: one program loops over them
        [("attention_whole", ("768", "1", "1")), ("sum_partials", ("64", "4", "1"))],
        [("attention_whole", ("192", "2", "1")), ("sum_partials", ("16", "4", "1"))],
        [("attention_looped", ("120", "1", "1")), ("sum_partials", ("2", "5", "1"))],
        [("attention_looped", ("48", "1", "1"))],
    ]
    assert lines[5] == "2"
    assert lines[6] == "True True False"  # the batch size stays dynamic


INDUCTOR = """
import torch
from tests.kernels import fake_cuda
from tests.kernels.attention.test_attention_op import Layer
fake_cuda.pretend()
for tokens in (197, 300):
    code = fake_cuda.inductor_code(Layer("mean"), torch.randn(2, tokens, 3, 6, 64).bfloat16())
    print(*fake_cuda.launches(code))
"""


@pytest.mark.slow
def test_inductor_takes_the_kernels_as_they_are() -> None:
    """Two launches at any batch size, without copies of inputs or outputs."""
    assert without_interpreter(INDUCTOR) == ["attention_whole sum_partials", "attention_looped sum_partials"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vp_kernels.attention.kernel import variants

# Sizes of 1 are constants to the just-in-time compiler.
ONES = {"attention_bf16_d64_n1_16_class": ("N", "H"), "attention_fp32_d80_n1_1024_bias_mean": ("N", "H"),
        "sum_class": ("rows", "N", "count"), "attention_bf16_d64_n193_208_class": (),
        "attention_bf16_d96_n209_1024_bias_mean": ()}
for each in variants():
    if each.name not in ONES:
        continue
    kernel, signature = each.config.kernel, dict(each.signature)
    constants = {**each.config.constants, **dict.fromkeys(ONES[each.name], 1)}
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in each.aligned}
    done = triton.compile(
        ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": each.config.num_warps, "num_stages": each.config.num_stages},
    )
    ptx = done.asm["ptx"]
    print(each.name, "wgmma" in ptx, "ld.global.v4" in ptx, done.metadata.shared <= 101376)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """Also for sizes of 1; 16-bit products on wgmma, loads of 16 bytes, shared memory within all GPUs' limits."""
    lines = dict(line.split(" ", 1) for line in without_interpreter(COMPILE))
    assert lines == {
        "attention_bf16_d64_n1_16_class": "True True True",
        "attention_bf16_d64_n193_208_class": "True True True",
        "attention_bf16_d96_n209_1024_bias_mean": "True True True",
        "attention_fp32_d80_n1_1024_bias_mean": "False True True",
        "sum_class": "False False True",
    }


def test_a_traced_batch_gets_the_programs_of_its_size() -> None:
    """The generated grid is an expression in the batch size, without a guard, and equals that of eager calls."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    batch = shapes.create_unbacked_symint()  # a comparison with it would raise
    for tiles, heads in ((1, 6), (2, 6), (2, 12), (7, 3)):
        formula = programs_a_head(tiles, batch * heads)
        for size in (1, 8, 44, 45, 88, 256, 1024):
            wanted = min(tiles, max(1, PROGRAMS // (size * heads)))
            assert programs_a_head(tiles, size * heads) == wanted
            assert int(formula.node.expr.subs(batch.node.expr, size) if hasattr(formula, "node") else formula) == wanted
