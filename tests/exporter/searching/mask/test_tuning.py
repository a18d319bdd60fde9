"""Token Mask Tuning against finite differences, naive loops and direct evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.exporter.tiny import KINDS, tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers import step_from_dict
from vp_exporter.rewrite.block import ReducedBlock
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.mask import least_squares, tuning
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.mask.least_squares import normal_equations, responses, row_weights, sample_rows, solve
from vp_exporter.searching.scoring import Scorer, frozen
from vp_exporter.utils.distributed import Workers

LINEAR = [kind for kind in KINDS if kind != "qk-norm"]


def scorer_of(kind: str = "class-token", images: int = 32, seed: int = 0) -> Scorer:
    vit, description = tiny_vit(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, *description.image_size, generator=generator)
    return Scorer(vit, description, Calibration.of_tensors(x, None, vit, description, batch_size=8))


def plan_for(scorer: Scorer, alive: tuple[int, ...] = (16, 11, 11, 6), seed: int = 0) -> ReductionPlan:
    """A random static mask with these counts (of 16; scaled for other grids)."""
    patches = scorer.description.patches
    counts = [max(1, count * patches // 16) for count in alive]
    life = np.zeros(patches, dtype=np.int64)
    for count in counts:
        life[:count] += 1
    return plan_of(np.random.default_rng(seed).permutation(life), scorer.description)


def biased(plan: ReductionPlan, block: int, seed: int = 0, width: float = 1.0) -> ReductionPlan:
    row = np.random.default_rng(seed).uniform(-width, width, plan.tokens()[block].attention)
    return replace(plan, key_bias={**plan.key_bias, block: tuple(row.tolist())})


def entering(tokens: int = 6, images: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(images, tokens, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_of(kind: str) -> ReducedBlock:
    """Block 1, in double precision."""
    return ReducedBlock(tiny_vit(kind)[0].double().blocks[1])


def state(scorer: Scorer) -> list[tuple[bool, Tensor]]:
    return [(p.requires_grad, p.detach().clone()) for p in scorer.vit.parameters()]


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_model_is_the_derivative_by_the_scales(kind: str) -> None:
    block, x = block_of(kind), entering()
    bias, rows = torch.linspace(-0.5, 0.4, 6, dtype=torch.float64), torch.tensor([0, 2, 5])
    matrix, out = responses(block, x, bias, rows)
    torch.testing.assert_close(out, least_squares.attended(block, x, bias)[:, rows], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(least_squares.answers(block, x, [bias], rows)[0], out, atol=1e-6, rtol=1e-6)
    step = 1e-4
    for token in range(6):
        up, down = bias.exp().clone(), bias.exp().clone()
        up[token] *= 1 + step
        down[token] *= 1 - step
        # attention() expects float32 biases, but adds them in the dtype of the queries
        slope = (least_squares.attended(block, x, up.log()) - least_squares.attended(block, x, down.log())) / (2 * step)
        torch.testing.assert_close(matrix[:, token], slope[:, rows], atol=1e-6, rtol=1e-4)
    assert float(matrix.detach().abs().max()) > 1e-3  # not comparing zeros


@pytest.mark.parametrize("kind", ["class-token", "layerscale-no-embed-class", "eva"])
def test_normal_equations_are_those_of_the_whole_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, target = block_of(kind), entering(), entering(seed=1)
    bias, rows = torch.linspace(-0.5, 0.4, 6, dtype=torch.float64), torch.tensor([0, 1, 4])
    weights = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    monkeypatch.setattr(least_squares, "CHUNK", 6 * 3 * 64)  # one image at a time
    with torch.no_grad():
        equations = normal_equations(block, x, bias, target, rows, weights)
        layer, scale = block.block[0].attn, block._scale(torch.ones(64, dtype=torch.float64), 1).numpy()
        q, k, v = (part.numpy() for part in least_squares.heads_of(block, x))
        missing = (target - least_squares.attended(block, x, bias)).numpy()
    project = layer.proj.weight.detach().numpy()
    matrix, right = [], []
    for image in range(3):
        for weight, row in zip(weights.numpy(), rows.tolist(), strict=True):
            columns = np.zeros((64, 6))
            for head in range(4):
                logits = k[image, head] @ q[image, head, row] / 4 + bias.numpy()  # heads are 16 wide
                p = np.exp(logits) / np.exp(logits).sum()
                o = p @ v[image, head]
                for token in range(6):
                    change = p[token] * (v[image, head, token] - o)
                    columns[:, token] += scale * (project[:, head * 16 : head * 16 + 16] @ change)
            matrix.append(np.sqrt(weight) * columns)
            right.append(np.sqrt(weight) * missing[image, row])
    whole, wanted = np.concatenate(matrix), np.concatenate(right)
    np.testing.assert_allclose(equations[:, :-1].numpy(), whole.T @ whole, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(equations[:, -1].numpy(), whole.T @ wanted, rtol=1e-6, atol=1e-8)
    # Ridge as extra rows of the matrix, for lstsq.
    ridge = 0.3
    below = np.sqrt(ridge * (whole**2).sum() / 6) * np.eye(6)
    expected = np.linalg.lstsq(np.concatenate([whole, below]), np.concatenate([wanted, np.zeros(6)]), rcond=None)[0]
    found = solve(equations, ridge)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_no_answer_where_nothing_hangs_on_the_scales() -> None:
    assert solve(torch.zeros(1, 2, dtype=torch.float64), 0.1) is None
    assert solve(torch.full((2, 3), torch.nan, dtype=torch.float64), 0.1) is None


@pytest.mark.parametrize(
    ("kind", "last", "expected"),
    [
        ("class-token", False, [10, 1, 1, 1, 1, 1]),
        ("class-token", True, [1, 0, 0, 0, 0, 0]),
        ("distilled", False, [4, 4, 1, 1, 1, 1]),
        ("distilled", True, [1, 1, 0, 0, 0, 0]),
        ("average-pool-fc-norm-class-token", True, [1, 1, 1, 1, 1, 1]),
        ("average-pool", False, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_what_the_head_reads_weighs_as_much_as_asked(kind: str, last: bool, expected: list[int]) -> None:
    weights = row_weights(tiny_vit(kind)[1], 6, last=last, class_weight=2.0)
    assert weights.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(patches=st.integers(1, 12), queries=st.integers(1, 14), read=st.integers(0, 2), seed=st.integers(0, 99))
def test_drawn_rows_keep_the_sum_of_weights(patches: int, queries: int, read: int, seed: int) -> None:
    weights = np.array([5.0] * read + [1.0] * patches)
    rows, drawn = sample_rows(weights, queries, (seed,))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(range(read)) <= set(rows.tolist())
    assert len(rows) == read + min(queries, patches)
    assert float(drawn.sum()) == pytest.approx(weights.sum(), rel=1e-6)
    assert drawn[:read].tolist() == [5.0] * read


def test_rows_without_weight_are_never_drawn() -> None:
    rows, weights = sample_rows(np.array([1.0, 0.0, 0.0]), 2, (0,))
    assert (rows.tolist(), weights.tolist()) == ([0], [1.0])


def known(queries: int | None, width: float = 0.3) -> tuple[Scorer, tuning._Fit, np.ndarray]:
    """A fit of block 2 whose teacher is the student's own block with a known bias.

    A Scorer's dense model has no biases, so the streams are made by hand.
    """
    scorer = scorer_of(images=40)
    block = ReducedBlock(scorer.vit.blocks[2])
    truth = np.random.default_rng(3).uniform(-width, width, 17)
    with torch.no_grad():
        model = ReducedViT(scorer.vit, scorer.description)
        streams = {b: tuning.embed(model, scorer.calibration.images(b)) for b in scorer.calibration.search}
        targets = {b: least_squares.attended(block, s.x, torch.tensor(truth).float()) for b, s in streams.items()}
    return scorer, tuning._Fit(block, torch.arange(17), np.ones(17), queries, (0,), streams, targets), truth


@pytest.mark.parametrize("queries", [None, 8])
def test_least_squares_finds_a_known_bias(queries: int | None) -> None:
    scorer, fit, truth = known(queries)
    search, start = scorer.calibration.search, torch.zeros(17, dtype=torch.float64)
    with torch.no_grad():
        bias = fit.run(scorer, search, start, 1e-4, 10.0)
        assert bias is not None
        before, after = torch.stack([fit.errors(b, [start, bias]) for b in search]).sum(dim=0).tolist()
    found = bias.numpy()
    assert after < 0.05 * before
    # A constant added to all keys has no effect, so compare differences only.
    found, truth = found - found.mean(), truth - truth.mean()
    assert np.corrcoef(found, truth)[0, 1] > 0.98
    np.testing.assert_allclose(found, truth, atol=0.15)


def errors_after_attention(scorer: Scorer, plan: ReductionPlan, block: int) -> float:
    """Mean squared difference of the class token after a block's attention to the dense model, by hooks on the MLP."""
    caught: list[Tensor] = []
    hook = scorer.vit.blocks[block].norm2.register_forward_pre_hook(lambda module, given: caught.append(given[0][:, 0]))
    total = 0.0
    with torch.no_grad():
        for batch in scorer.calibration.search:
            images = scorer.calibration.images(batch)
            ReducedViT(scorer.vit, scorer.description)(images)
            ReducedViT(scorer.vit, scorer.description, plan)(images)
            total += float((caught[-2] - caught[-1]).square().sum())
    hook.remove()
    return total


@pytest.mark.parametrize("kind", LINEAR)
def test_least_squares_brings_the_first_reduced_block_nearer(kind: str) -> None:
    scorer = scorer_of(kind, images=16)
    plan = plan_for(scorer)
    tuned = tuning.least_squares(scorer, plan, scorer.calibration.search, class_weight=50.0)
    assert set(tuned.key_bias) <= set(tuning.tunable(plan)) == {1, 2, 3}
    assert tuned.key_bias
    assert all(math.isfinite(v) and abs(v) <= math.log(10) + 1e-6 for row in tuned.key_bias.values() for v in row)
    assert tuned.steps == plan.steps
    if scorer.description.pool == "token" and not scorer.description.distilled:
        assert errors_after_attention(scorer, tuned, 1) < errors_after_attention(scorer, plan, 1)


@torch.no_grad()
def test_a_scale_out_of_bounds_leaves_the_block_as_it_was() -> None:
    scorer, fit, _ = known(None, width=1.5)
    search, start = scorer.calibration.search, torch.zeros(17, dtype=torch.float64)
    change = solve(torch.stack([fit.equations(b, start) for b in search]).sum(dim=0), 1e-4)
    assert change is not None
    largest = float(change.abs().max())
    assert largest > 1.1  # so that there are bounds above 1 on both sides of it
    assert fit.run(scorer, search, start, 1e-4, 0.99 * largest) is None
    allowed = fit.run(scorer, search, start, 1e-4, 1.01 * largest)
    assert allowed is not None
    assert float(allowed.abs().max()) <= math.log(1.01 * largest) + 1e-9  # scales in 1/bound..bound


@pytest.mark.parametrize("prefix", ["class-token", "average-pool"])
def test_a_single_patch_left(prefix: str) -> None:
    scorer = scorer_of(prefix, images=16)
    plan = plan_for(scorer, alive=(1, 1, 1, 1))
    found = tuning.tune(scorer, plan, steps=3)
    assert found.kl_after <= found.kl_before
    assert [row["stage"] for row in found.rows] == list(tuning.METHODS)
    if prefix == "average-pool":  # one token: its softmax is 1 for any bias
        assert not tuning.least_squares(scorer, plan, scorer.calibration.search).key_bias


def test_attention_that_is_not_linear_is_tuned_by_adam_alone() -> None:
    scorer = scorer_of("qk-norm", images=16)
    plan = plan_for(scorer)
    with pytest.raises(SearchError, match=r"block 0 normalises .*adam"):
        tuning.least_squares(scorer, plan, scorer.calibration.search)
    rows = {row["stage"]: row for row in tuning.tune(scorer, plan, steps=4).rows}
    assert rows["least-squares"]["held_kl"] is None
    assert "normalises" in rows["least-squares"]["note"]
    assert rows["adam"]["held_kl"] is not None
    with pytest.raises(SearchError, match="normalised or gated"):
        responses(ReducedBlock(scorer.vit.blocks[0]), entering().float(), torch.zeros(6), torch.arange(6))


def test_shared_bias_is_the_best_of_its_grid() -> None:
    scorer = scorer_of()
    plan = biased(plan_for(scorer), 1)
    search = scorer.calibration.search
    shared = tuning.shared_bias(scorer, plan, search, shares=(0.0, 0.5, 1.0), temperature=1.0)
    losses = []
    for share in (0.0, 0.5, 1.0):
        rows = {1: plan.key_bias[1], 2: (0.0,) * 12, 3: (0.0,) * 7}
        raised = {
            block: (row[0], *(v + share * math.log(16 / (len(row) - 1)) for v in row[1:]))
            for block, row in rows.items()
        }
        losses.append(scorer.loss(replace(plan, key_bias=raised), search))
    assert scorer.loss(shared, search) == pytest.approx(min(losses), rel=1e-4)
    assert max(losses) > 1.01 * min(losses)
    bare = scorer_of("average-pool", images=16)
    plan = plan_for(bare)
    assert tuning.shared_bias(bare, plan, search) is plan  # no prefix: a constant for all keys


def test_adam_lowers_the_loss_it_is_given_and_leaves_the_weights_alone() -> None:
    scorer = scorer_of()
    next(scorer.vit.parameters()).requires_grad_(False)
    before = state(scorer)
    plan = plan_for(scorer)
    search = scorer.calibration.search
    tuned = tuning.adam(scorer, plan, search, steps=40)
    assert scorer.loss(tuned, search, 3.0) < 0.95 * scorer.loss(plan, search, 3.0)
    assert set(tuned.key_bias) == {1, 2, 3}
    for (asked, value), (now_asked, now) in zip(before, state(scorer), strict=True):
        assert asked == now_asked
        assert torch.equal(value, now)
    assert all(p.grad is None for p in scorer.vit.parameters())
    with pytest.raises(ZeroDivisionError), frozen(scorer.vit):
        1 / 0  # noqa: B018
    assert [asked for asked, _ in before] == [asked for asked, _ in state(scorer)]


def test_adams_first_step_follows_the_gradient() -> None:
    """One step of Adam is lr * sign(gradient): compare signs with finite differences of the scorer's loss."""
    scorer = scorer_of(images=16)
    plan = plan_for(scorer)
    batches = scorer.calibration.search[:1]
    tuned = tuning.adam(scorer, plan, batches, steps=1, lr=0.01, parts=1)
    for token in range(7):
        sides = []
        for h in (0.02, -0.02):
            row = tuple(h if i == token else 0.0 for i in range(7))
            squares = scorer.losses(replace(plan, key_bias={3: row}), batches, 3.0).square()
            sides.append(float((squares + tuning.SMOOTH).sqrt().mean()))
        slope = sides[0] - sides[1]
        if abs(slope) > 1e-5:
            assert tuned.key_bias[3][token] == pytest.approx(-math.copysign(0.01, slope), rel=1e-2)


def test_pull_towards_the_start() -> None:
    scorer = scorer_of(images=16)
    plan = biased(plan_for(scorer), 2)
    search = scorer.calibration.search
    moved = [
        max(abs(a - b) for a, b in zip(found.key_bias[2], plan.key_bias[2], strict=True))
        for found in (tuning.adam(scorer, plan, search, steps=20, decay=decay) for decay in (0.0, 100.0))
    ]
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("kind", ["class-token", "average-pool", "registers-swiglu", "map-pool", "features"])
def test_tuning_never_raises_the_held_out_loss(kind: str) -> None:
    scorer = scorer_of(kind, images=24)
    plan = plan_for(scorer, seed=2)
    found = tuning.tune(scorer, plan, steps=6)
    held = scorer.calibration.held
    assert found.kl_before == scorer.loss(plan, held)
    assert found.kl_after == scorer.loss(found.plan, held) <= found.kl_before
    best, loss = found.kl_before, scorer.loss(plan, held, 3.0)
    for row in found.rows:
        better = row["held_kl"] is not None and row["held_kl"] < best and row["held_loss"] < loss
        assert row["accepted"] == better
        best, loss = (row["held_kl"], row["held_loss"]) if better else (best, loss)
    assert best == found.kl_after
    assert loss == scorer.loss(found.plan, held, 3.0)
    assert all(math.isfinite(v) for row in found.plan.key_bias.values() for v in row)


def test_what_makes_it_worse_is_rejected() -> None:
    scorer = scorer_of()
    plan = plan_for(scorer)
    wild = tuning.adam(scorer, plan, scorer.calibration.search, steps=3, lr=1e6)
    assert max(abs(v) for row in wild.key_bias.values() for v in row) == tuning.LIMIT
    found = tuning.tune(scorer, plan, steps=3, lr=1e6, methods=("adam",))
    assert not found.rows[0]["accepted"]
    assert found.rows[0]["held_kl"] > found.kl_before
    assert found.plan == plan
    assert found.kl_after == found.kl_before


def test_two_runs_are_equal_and_another_seed_is_not() -> None:
    first, second, other = (tuning.tune(s, plan_for(s), steps=8, seed=k) for s, k in zip(
        (scorer_of(images=56), scorer_of(images=56), scorer_of(images=56)), (0, 0, 1), strict=True))  # fmt: skip
    assert first.plan.key_bias
    assert first.plan == second.plan
    assert (first.kl_before, first.kl_after) == (second.kl_before, second.kl_after)
    assert first.plan != other.plan


class Pair(Workers):
    """Does the work of two processes out of order: results are returned by item, as `Workers.map` promises."""

    def owns(self, item: int) -> bool:
        return True

    def map(self, function, items):  # type: ignore[no-untyped-def]
        done = {item: function(item).detach().cpu() for rank in (1, 0) for item in items if item % 2 == rank}
        return [done[item] for item in items]


def test_the_order_in_which_processes_finish_changes_nothing() -> None:
    one, two = scorer_of(), scorer_of()
    two.workers = Pair()
    assert tuning.tune(one, plan_for(one), steps=4).plan == tuning.tune(two, plan_for(two), steps=4).plan


@given(batches=st.integers(1, 9), parts=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_every_image_comes_once_an_epoch(batches: int, parts: int, seed: int) -> None:
    groups = tuning._groups(list(range(10, 10 + batches)), parts, seed)
    epoch = [next(groups) for _ in range(parts * -(-batches // parts))]
    assert sorted((b, part) for group, part in epoch for b in group) == [
        (b, part) for b in range(10, 10 + batches) for part in range(parts)
    ]
    assert all(len(set(group)) == len(group) <= parts for group, _ in epoch)


def test_blocks_behind_a_choice_by_image_are_left_alone() -> None:
    scorer = scorer_of()
    static = plan_for(scorer, alive=(16, 10, 10, 10)).steps[:1]
    mixed = replace(plan_for(scorer), steps=(*static, step_from_dict({"block": 2, "reducer": "tome", "r": 3})))
    mixed = biased(replace(mixed, proportional_attention=True), 3)
    assert tuning.tunable(mixed) == (1, 2)
    for found in (
        tuning.shared_bias(scorer, mixed, scorer.calibration.search, shares=(0.5,)),
        tuning.least_squares(scorer, mixed, scorer.calibration.search),
        tuning.adam(scorer, mixed, scorer.calibration.search, steps=4),
        tuning.tune(scorer, mixed, steps=4).plan,
    ):
        assert found.steps == mixed.steps
        assert found.key_bias[3] == mixed.key_bias[3]
    assert set(tuning.adam(scorer, mixed, scorer.calibration.search, steps=4).key_bias) == {1, 2, 3}
    by_image = replace(mixed, steps=mixed.steps[-1:], key_bias={})
    found = tuning.tune(scorer, by_image, steps=4)
    assert found.plan == by_image
    assert {row["note"] for row in found.rows} == {"nothing to change"}


def test_wrong_settings_are_refused() -> None:
    scorer = scorer_of(images=16)
    plan = plan_for(scorer)
    with pytest.raises(SearchError, match=r"'lsq'.*shared, least-squares, adam"):
        tuning.tune(scorer, plan, methods=("lsq",))
    for wrong in ({"ridge": 0.0}, {"bound": 1.0}, {"class_weight": -1.0}, {"queries": 0}):
        with pytest.raises(SearchError, match="ridge above 0"):
            tuning.least_squares(scorer, plan, scorer.calibration.search, **wrong)  # type: ignore[arg-type]
    for wrong in ({"steps": -1}, {"lr": 0.0}, {"temperature": 0.0}, {"decay": -1.0}, {"parts": 0}):
        with pytest.raises(SearchError, match="steps and decay"):
            tuning.adam(scorer, plan, scorer.calibration.search, **wrong)  # type: ignore[arg-type]
