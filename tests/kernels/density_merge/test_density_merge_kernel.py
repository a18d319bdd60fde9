"""The kernel of vp::density_merge, interpreted, against the reference and the exporter's reducer."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.density_merge.cases import Plan, decided, inputs, usual
from tests.kernels.support import DTYPES, TOKENS, assert_within, seeded
from tests.pairwise import pairwise, thinned
from vp_exporter.reducers.base import Tokens
from vp_exporter.reducers.bat import BatStep
from vp_exporter.reducers.stream import AttentionStatistics, Stream, reduce_tokens
from vp_kernels.density_merge import reference
from vp_kernels.density_merge.kernel import config, launch_density_merge, scratch_values, variants
from vp_kernels.density_merge.kernel_moves import mix
from vp_kernels.launch import launch, triton_type

NAN, INF = float("nan"), float("inf")
COUNT = {"images": 0, "skipped": 0}

# Around every edge of a tile; varying prefix, weights and widths.
EVERY_N = [
    (usual(n, min(i % 3, n - 1), 0.35 + 0.1 * (i % 5), ("attention", "size")[i // 2 % 2]), 2 if n <= 17 else 1)
    for i, n in enumerate(TOKENS)
]
EDGES = [
    Plan(33, 1, 33, 0, 0),  # nothing to do
    Plan(33, 1, 17, 0, 16),  # every even token merges
    Plan(33, 1, 18, 0, 15),
    Plan(33, 2, 3, 1, 0),  # one cluster, nothing attentive
    Plan(33, 1, 33, 16, 0),  # every inattentive token its own cluster
    Plan(33, 0, 11, 8, 3),  # 6 attentive tokens in 3 pairs
    Plan(33, 1, 21, 20, 0),
    Plan(76, 1, 45, 40, 2),  # more clusters than fit in one tile
    Plan(140, 1, 71, 0, 69),  # more merges than fit in one tile, thirds among them
]


def type_or_value(value: object) -> str | None:
    return triton_type(value) if isinstance(value, torch.dtype) else None


def run(plan: Plan, x: Tensor, scores: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    return launch_density_merge(x, scores, size, *plan.arguments)


def portable(plan: Plan, x: Tensor, scores: Tensor, size: Tensor | None) -> Stream:
    """The exporter's own reducer on the same tokens."""
    step = BatStep(0, plan.tokens_out, plan.clusters, plan.pairs, plan.weights)
    step.apply(Tokens(plan.prefix, plan.tokens - plan.prefix, None))  # rejects invalid plans
    stream = Stream(x, plan.prefix, torch.ones_like(scores) if size is None else size)
    return reduce_tokens(stream, step.choose(stream, AttentionStatistics(class_attention=scores)), carry_size=True)


def check(plan: Plan, batch: int, width: int, dtype: torch.dtype, sizes: bool) -> None:
    x, scores, size = inputs(plan, batch, width, dtype, sizes)
    images = decided(x, scores, plan)
    COUNT["images"] += batch
    COUNT["skipped"] += batch - len(images)
    found, found_size = run(plan, x, scores, size)
    assert found_size.sum(dim=1).tolist() == ([plan.tokens] * batch if size is None else size.sum(dim=1).tolist())
    truth, true_size = reference.density_merge(x.double(), scores, size, *plan.arguments)
    members = bounds.density_members(x, scores, plan.counts)
    bound = bounds.density_merge(x, truth, members)
    assert_within(str(plan), found[images], truth[images], bound[images], dtype)
    assert torch.equal(found_size[images].double(), true_size[images])
    twin = portable(plan, x.float(), scores, size)
    assert twin.size is not None
    assert torch.equal(found_size[images], twin.size[images])
    bound = bounds.density_merge(x.float(), truth, members)
    assert_within(f"{plan}, the reducer", twin.x[images], truth[images], bound[images], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "batch"), EVERY_N, ids=str)
def test_every_token_count(plan: Plan, batch: int) -> None:
    check(plan, batch, 24, torch.float32, sizes=plan.tokens % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("plan", EDGES, ids=str)
def test_every_split(plan: Plan) -> None:
    check(plan, 1, 17, torch.float32, sizes=False)
    check(dataclasses.replace(plan, weights="size"), 1, 16, torch.float32, sizes=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "sizes", "dtype"),
    pairwise(["attention", "size"], [False, True], DTYPES),
    ids=type_or_value,
)
def test_every_variant(dtype: torch.dtype, sizes: bool, weights: str) -> None:
    check(usual(50, 1, 0.5, weights), 2, 72, dtype, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=triton_type)
def test_two_tiles_of_tokens_and_channels(dtype: torch.dtype) -> None:
    check(usual(198, 2, 0.5), 1, 150, dtype, sizes=True)


def test_few_images_were_skipped() -> None:
    """Runs after the tests above: if most images had been skipped, they would prove nothing."""
    if COUNT["images"] < 30:
        pytest.skip("counts what the other tests of this file did")
    assert COUNT["skipped"] <= 0.1 * COUNT["images"], COUNT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=triton_type)
def test_outlier_channels(dtype: torch.dtype) -> None:
    """Channels 50 times larger than the differences between tokens do not swamp distances.

    With a plain sum of squares t_i t_i + t_j t_j - 2 t_i t_j in fp32, several centres of these images would be wrong.
    """
    plan = Plan(70, 1, 12, 11, 0)
    x, scores, _ = inputs(plan, 2, 40, torch.float32, False)
    x[:, :, :3] = 5000.0 * (1.0 if dtype == torch.float32 else 0.01) + 0.1 * x[:, :, :3]
    x = x.to(dtype)
    images = [
        i
        for i in range(2)
        if reference.groups(x[i].double(), scores[i].double(), *plan.counts)
        == reference.groups(_centred(x[i].double(), 1e-6), scores[i].double(), *plan.counts)
    ]
    assert images
    _, size = run(plan, x, scores, None)
    _, expected = reference.density_merge(x.double(), scores, None, *plan.arguments)
    assert torch.equal(size[images].double(), expected[images])


def _centred(rows: Tensor, noise: float) -> Tensor:
    """Rows minus their mean, with an error relative to the result."""
    t = rows - rows.mean(dim=0)
    return t * (1.0 + noise * seeded(*t.shape, dtype=torch.float64, seed=9)) + rows.mean(dim=0)


# Few distinct tokens of +-4 in 16 channels, 16 of them to cluster: lengths, cosines, means and distances are exact in
# any dtype and order of summation, and ties are exact.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "dtype", "weights"), pairwise([1, 2, 5], DTYPES, ["attention", "size"]), ids=type_or_value
)
def test_ties_go_to_the_lowest_index(kinds: int, dtype: torch.dtype, weights: str) -> None:
    plan = Plan(49, 1, 31, 6, 8, weights)  # 32 attentive, 16 inattentive
    choice = (seeded(2, 49, seed=4).abs() * 100).long() % kinds
    x = 4.0 * seeded(2, kinds, 16, seed=5).sign()[torch.arange(2)[:, None], choice].to(dtype)
    x[:, 0] = 99.0  # a prefix token is left alone
    scores = (seeded(2, 49, seed=6).abs() * 2).floor()  # 0, 1, 2, ...: many ties at the threshold
    found, size = run(plan, x, scores, None)
    expected, expected_size = reference.density_merge(x.double(), scores, None, *plan.arguments)
    assert torch.equal(size.double(), expected_size)
    bound = bounds.density_merge(x, expected, bounds.density_members(x, scores, plan.counts))
    assert_within("tied", found, expected, bound, dtype)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    tokens = draw(st.integers(1, 36))
    prefix = draw(st.integers(0, min(2, tokens - 1)))
    attentive = draw(st.integers(0, tokens - prefix))
    rest = tokens - prefix - attentive
    pairs = draw(st.integers(0, attentive // 2))
    clusters = draw(st.integers(min(1, rest), rest))
    return Plan(tokens, prefix, prefix + attentive - pairs + clusters, clusters, pairs, "size")


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(plan=plans(), seed=st.integers(0, 99), levels=st.integers(1, 6))
def test_what_enters_leaves(plan: Plan, seed: int, levels: int) -> None:
    """Sizes are preserved, so is the sum of size times token, and every mean lies within the range of its tokens."""
    x = (seeded(1, plan.tokens, 8, seed=seed).clamp(-1, 1) * levels).round()
    scores = seeded(1, plan.tokens, seed=seed + 1).abs()
    size = seeded(1, plan.tokens, seed=seed + 2).abs().floor() + 1.0
    found, found_size = run(plan, x, scores, size)
    assert found_size.sum().item() == size.sum().item()
    assert bool((found_size >= 1).all())
    total, expected = (found_size[:, :, None].double() * found).sum(dim=1), (size[:, :, None].double() * x).sum(dim=1)
    rounding = bounds.density_merge(x, found.double(), plan.tokens)
    assert_within("total", total, expected, (found_size[:, :, None] * rounding).sum(dim=1), torch.float64)
    assert bool((found <= x.amax(1, keepdim=True) + rounding).all())
    assert bool((found >= x.amin(1, keepdim=True) - rounding).all())
    assert torch.equal(found[:, : plan.prefix], x[:, : plan.prefix])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "dtype"),
    thinned(itertools.product([NAN, INF, -INF], DTYPES), lambda bad, dtype: {bad, (bad != bad, dtype)}),
    ids=type_or_value,
)
def test_nothing_is_read_or_written_outside_whatever_the_content(bad: float, dtype: torch.dtype) -> None:
    """Guarded tensors; NaN or infinity in inattentive tokens, attentive ones, scores, and everywhere."""
    plan = Plan(40, 1, 24, 5, 4)
    width = 16
    x, scores, _ = inputs(plan, 4, width, dtype, False)
    last = scores[:, 1:].argsort(dim=1) + 1
    x[0, last[0, 0]] = bad  # an inattentive token
    x[1, last[1, -3:]] = bad  # attentive ones
    scores[2, 5:30:3] = bad
    x[3], scores[3] = bad, bad
    values = scratch_values(40, width, *plan.counts)
    each = [(24 * width, dtype), (24, torch.float32), (values, torch.float32)]
    guarded = [torch.full((4 * n + 64,), 77.0, dtype=kind) for n, kind in each]
    merged, size, scratch = (whole[32:-32] for whole in guarded)
    scratch.fill_(NAN)  # the initial content of memory must not matter
    chosen = config(triton_type(dtype), has_size=False, by_size=True)
    launch(chosen, (4, 1, 1), x, scores, scores, merged, size, scratch, 40, width, 24, 5, 4, 1, values)
    for whole in guarded:
        assert bool((whole[:32] == 77).all() and (whole[-32:] == 77).all())
    size, merged = size.reshape(4, 24), merged.reshape(4, 24, width)
    assert size.sum(dim=1).tolist() == [40.0] * 4  # every token is used exactly once
    assert bool((size >= 1).all())
    assert torch.equal(merged[:3, 0], x[:3, 0])
    # Scores that are not finite still split the tokens, with NaN highest, as in the reference.
    expected, expected_size = reference.density_merge(x[2:3].double(), scores[2:3], None, *plan.counts, "size")
    assert torch.equal(size[2:3].double(), expected_size)
    torch.testing.assert_close(merged[2:3].double(), expected, rtol=2e-2, atol=2e-2)


def test_two_runs_and_any_company_give_the_same_bits() -> None:
    plan = usual(65, 1, 0.5)
    x, scores, size = inputs(plan, 3, 33, torch.float16, True)
    assert size is not None
    first, first_size = run(plan, x, scores, size)
    again, again_size = run(plan, x, scores, size)
    alone, alone_size = run(plan, x[1:2].contiguous(), scores[1:2].contiguous(), size[1:2].contiguous())
    assert torch.equal(first, again)
    assert torch.equal(first_size, again_size)
    assert torch.equal(first[1:2], alone)
    assert torch.equal(first_size[1:2], alone_size)


@triton.jit
def mix_kernel(share_ptr, rows_ptr, out_ptr):
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    total = mix(tl.load(share_ptr + square), tl.load(rows_ptr + square), tl.zeros([16, 16], tl.float32))
    tl.store(out_ptr + square, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=triton_type)
def test_shares_keep_more_than_16_bits(dtype: torch.dtype) -> None:
    """Before rounding the result: 16-bit shares alone would be off by 1e-3 (bf16) or 2e-4 (fp16)."""
    share, rows = seeded(16, 16).softmax(dim=1), seeded(16, 16, seed=1).to(dtype)
    out = torch.empty(16, 16)
    mix_kernel[(1,)](share, rows, out)
    torch.testing.assert_close(out, share @ rows.float(), rtol=0, atol=6e-5 if dtype == torch.bfloat16 else 6e-6)


def test_an_empty_batch() -> None:
    plan = usual(17, 1, 0.5)
    found, size = run(plan, torch.zeros(0, 17, 8), torch.zeros(0, 17), None)
    assert found.shape == (0, plan.tokens_out, 8)
    assert size.shape == (0, plan.tokens_out)


def test_variants_name_every_argument_in_order() -> None:
    found = list(variants())
    assert len({each.name for each in found}) == len(found) == 12
    for each in found:
        named = [n for n in each.config.kernel.arg_names if n not in each.config.constants]
        assert list(each.signature) == named
        assert set(each.aligned) <= set(named)
        assert each.signature["x_ptr"] == "*" + each.dtype
