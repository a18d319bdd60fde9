"""Rearrangement without learning, and the choice among masks on held-out images."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exporter.tiny import DEPTH, tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.mask import exchange
from vp_exporter.searching.mask.baselines import PRIOR
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.mask.exchange import Exchanges, Incumbent, block_fisher_swap, local_search, standard_log
from vp_exporter.searching.mask.rearrangement import START, SWAP, Rearranged, rearrange
from vp_exporter.searching.scoring import Scorer

PATCHES = 16
LIFE = np.array([0] * 3 + [2] * 4 + [3] * 2 + [DEPTH] * 7)


@lru_cache(maxsize=1)
def model() -> tuple[Any, Any, Calibration]:
    vit, description = tiny_vit()
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return vit, description, Calibration.of_tensors(images, None, vit, description, batch_size=4)


def scorer() -> Scorer:
    return Scorer(*model())


def prior(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lifetimes, effects and importance unrelated to the model, which leaves much to improve."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(12, DEPTH, PATCHES)).astype(np.float32)
    return rng.permutation(LIFE), effects, (effects.astype(np.float64) ** 2).mean(axis=0)


def cost(effects: np.ndarray, life: np.ndarray) -> float:
    """Mean over images of |sum of removed effects|^2, computed directly."""
    total = 0.0
    for image in effects.astype(np.float64):
        total += sum(image[life[i], i] for i in range(len(life)) if life[i] < len(image)) ** 2
    return total / len(effects)


def slow_swap(effects: np.ndarray, life: np.ndarray, steps: int) -> tuple[np.ndarray, list[float]]:
    """Try every pair, make the best exchange, repeat."""
    life, costs = life.copy(), [cost(effects, life)]
    for _ in range(steps):
        tried = []
        for i, j in combinations(range(len(life)), 2):
            if life[i] != life[j]:
                other = life.copy()
                other[[i, j]] = other[[j, i]]
                tried.append((cost(effects, other), i, j))
        best = min(tried, default=(np.inf, 0, 0))
        if best[0] >= costs[-1]:
            break
        life[[best[1], best[2]]] = life[[best[2], best[1]]]
        costs.append(best[0])
    return life, costs


@pytest.mark.parametrize("seed", range(3))
def test_block_fisher_swap_makes_the_best_exchange_each_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(9, 3, 8)).astype(np.float32)
    life = rng.permutation([0, 0, 1, 1, 2, 3, 3, 3])
    expected, costs = slow_swap(effects, life, 24)
    assert len(costs) > 3  # several exchanges
    assert np.array_equal(block_fisher_swap(effects, life), expected)
    assert np.array_equal(block_fisher_swap(effects, life, rounds=0), life)
    assert costs[-1] < 0.9 * costs[0]


def test_block_fisher_swap_cancels_effects_that_the_diagonal_cannot_see() -> None:
    """Patches 0 and 1 have equal effects, 2 cancels either: all their own squares are equal."""
    effects = np.array([[[1.0, 1.0, -1.0]], [[2.0, 2.0, -2.0]]], dtype=np.float32)
    assert block_fisher_swap(effects, np.array([0, 0, 1])).tolist() == [1, 0, 0]  # as good as (1, 2), and first


def test_block_fisher_swap_stops_after_its_exchanges() -> None:
    rng = np.random.default_rng(5)
    effects, life = rng.normal(size=(40, 2, 30)).astype(np.float32), rng.permutation([0, 1, 2] * 10)
    for rounds in (0, 1 / 30, 4 / 30):
        steps = round(rounds * 30)
        expected, _ = slow_swap(effects, life, steps)
        assert np.array_equal(block_fisher_swap(effects, life, rounds=rounds + 1e-9), expected)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_exchanges_keep_every_lifetime(lifetimes: list[int], seed: int) -> None:
    life = np.array(lifetimes)
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(5, 3, len(life))).astype(np.float32)
    swapped = block_fisher_swap(effects, life)
    assert sorted(swapped) == sorted(lifetimes)
    assert cost(effects, swapped) <= cost(effects, life) * (1 + 1e-9)
    _, description, _ = model()
    wide = np.resize(life, PATCHES)
    drawn = Exchanges(rng.random((DEPTH, PATCHES)), description)(wide, int(rng.integers(1, 9)), rng)
    assert sorted(drawn) == sorted(wide)
    assert len(set(lifetimes)) == 1 or (drawn != wide).any()


def test_draws_follow_importance_and_solitude() -> None:
    _, description, _ = model()
    importance = np.ones((DEPTH, PATCHES))
    importance[:, 15], importance[:, 0] = 1e6, 1e-6  # 15 is removed but important, 0 is kept but not
    life = np.array([DEPTH] * 8 + [0] * 8)
    draw, rng = Exchanges(importance, description), np.random.default_rng(0)
    drawn = np.stack([draw(life, 1, rng) for _ in range(400)])
    shortened, revived = (drawn[:, :8] == 0).mean(axis=0), (drawn[:, 8:] > 0).mean(axis=0)
    assert shortened[0] > 3 * shortened[1:].max()
    assert revived[7] > 2 * revived[:7].max()
    even = Exchanges(np.ones((DEPTH, PATCHES)), description)
    drawn = np.stack([even(life, 1, rng) for _ in range(400)])
    revived = (drawn[:, 8:] > 0).mean(axis=0)
    assert revived[4:].sum() > 1.4 * revived[:4].sum()  # the last row is two rows away from what is kept


def test_standard_log_is_finite() -> None:
    for values in (np.zeros((2, 3)), np.array([[0.0, 1e-30, 1e30]])):
        assert np.isfinite(standard_log(values)).all()


def test_incumbent_compares_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without stored activations: late differences are computed from where they begin."""
    life, *_ = prior()
    late = life.copy()
    i, j = np.flatnonzero(life == 3)[0], np.flatnonzero(life == DEPTH)[0]
    late[[i, j]] = late[[j, i]]
    plain = scorer()
    batches = plain.calibration.search
    plans = [plan_of(mask, plain.description) for mask in (late, life)]
    expected = plain.losses(plans[0], batches, 2.0) - plain.losses(plans[1], batches, 2.0)
    for limit, shares in ((2**32, True), (0, False)):
        monkeypatch.setattr(exchange, "REMEMBER_BYTES", limit)
        shared = scorer()
        incumbent = Incumbent(shared, life, batches, 2.0)
        for mask in (late, life[::-1].copy(), late):
            shared.memo.clear()  # recomputed each time
            change = incumbent.difference(mask, batches)
            if mask is late:
                assert np.allclose(change, expected.numpy(), atol=1e-9)
        for _ in range(2):
            shared.memo.clear()
            before = shared.blocks_run
            incumbent.difference(late, batches)
        assert (shared.blocks_run - before == len(batches)) == shares  # one block of four


@pytest.mark.parametrize("evaluations", [0, 1, 60])
def test_local_search_lowers_the_loss_within_its_limits(evaluations: int) -> None:
    life, _, importance = prior()
    runs = []
    for _ in range(2):
        measure, trace, limits = scorer(), Trace(), Limits(evaluations)
        found, loss = local_search(
            measure, life, limits, trace,
            batches=measure.calibration.search, importance=importance, seed=3,
        )  # fmt: skip
        assert limits.spent == len(trace.rows) == evaluations
        assert measure.evaluations <= 2 * evaluations + 1
        assert sorted(found) == sorted(life)
        assert loss == pytest.approx(
            scorer().loss(plan_of(found, measure.description), measure.calibration.search, 3.0), rel=1e-9
        )
        best = [row["best"] for row in trace.rows]
        assert best == sorted(best, reverse=True)
        runs.append((found.tolist(), loss, trace.rows))
    assert runs[0] == runs[1]
    start = measure.loss(plan_of(life, measure.description), measure.calibration.search, 3.0)
    assert loss < (0.98 * start if evaluations == 60 else start * (1 + 1e-9))


def test_local_search_ends_where_all_neighbours_were_tried() -> None:
    measure = scorer()
    life = np.array([0] + [DEPTH] * (PATCHES - 1))
    limits = Limits()
    found, loss = local_search(
        measure, life, limits, Trace(), batches=measure.calibration.search, importance=prior()[2] * 0 + 1, seed=0
    )
    assert limits.spent < PATCHES * PATCHES
    every = [np.roll(life, k) for k in range(PATCHES)]
    losses = [measure.loss(plan_of(mask, measure.description), measure.calibration.search, 3.0) for mask in every]
    assert loss == pytest.approx(min(losses))  # all masks are neighbours
    assert np.array_equal(found, every[int(np.argmin(losses))])
    whole = np.full(PATCHES, DEPTH)
    found, _ = local_search(
        measure, whole, Limits(5), Trace(), batches=measure.calibration.search, importance=prior()[2], seed=0
    )
    assert np.array_equal(found, whole)  # nothing to exchange


def run(life: np.ndarray, **arguments: Any) -> tuple[Rearranged, Trace]:
    _, effects, importance = prior()
    options: dict[str, Any] = {"evaluations": 24, "seconds": None, "seed": 1, "temperature": 3.0, "trace": Trace()}
    options |= arguments
    starts = options.pop("starts", {PRIOR: life, "other": np.sort(life)})
    return rearrange(scorer(), starts, effects, importance, **options), options["trace"]


def test_rearrange_keeps_the_best_on_held_out_images() -> None:
    life, *_ = prior()
    found, trace = run(life)
    names = [(row["strategy"], row["start"]) for row in found.rows]
    start = min(found.rows[:2], key=lambda row: row["search_loss"])["start"]
    assert names == [(START, PRIOR), (START, "other"), (SWAP, start), ("greedy", start), ("ppo", start)]
    assert [row["evaluations"] for row in found.rows] == [1, 1, 1, 24, 24]
    assert len(trace.rows) == 3 + 24 + 24
    assert found.prior_kl == found.rows[0]["held_kl"]
    sound = [row for row in found.rows if row["held_kl"] <= found.prior_kl]
    assert found.kl == min(sound, key=lambda row: row["held_loss"])["held_kl"] < found.prior_kl
    fresh = scorer()
    held = fresh.calibration.held
    assert found.kl == pytest.approx(fresh.score(plan_of(found.life, fresh.description), held).kl, rel=1e-9)
    assert found.prior_kl == pytest.approx(fresh.score(plan_of(life, fresh.description), held).kl, rel=1e-9)
    assert found.gain == pytest.approx(found.prior_kl - found.kl)
    assert found.gain > 0
    assert (found.start if found.strategy == START else found.strategy) in str(found)
    assert f"{found.kl:.4f}" in str(found)
    assert list(found.lives) == ["greedy", "ppo"]
    for row in found.rows[3:]:
        ended = plan_of(found.lives[row["strategy"]], fresh.description)
        assert row["held_kl"] == pytest.approx(fresh.score(ended, held).kl, rel=1e-9)
    again, _ = run(life)
    assert np.array_equal(again.life, found.life)
    assert again.kl == found.kl
    assert [row["search_loss"] for row in again.rows] == [row["search_loss"] for row in found.rows]


def test_a_strategy_wins_over_a_prior_that_knows_nothing() -> None:
    life, *_ = prior()
    found, _ = run(life, starts={PRIOR: life}, evaluations=40, strategies=("greedy",))
    assert [row["strategy"] for row in found.rows] == [START, SWAP, "greedy"]
    assert found.strategy in (SWAP, "greedy")
    assert f"{found.strategy} from fisher prior" in str(found)
    assert found.kl < found.prior_kl


@pytest.mark.parametrize("seed", range(3))
def test_rearrange_is_never_worse_than_the_prior_on_held_out_images(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search images are one batch of four, so the search overfits to them."""
    fresh = scorer()
    life, *_ = prior(seed)
    lean = Calibration(
        fresh.calibration.search[:1], fresh.calibration.held, *list(vars(fresh.calibration).values())[2:]
    )
    _, effects, importance = prior(seed)
    found = rearrange(
        Scorer(fresh.vit, fresh.description, lean), {PRIOR: life}, effects, importance,
        evaluations=12, seconds=None, seed=seed, trace=Trace(),
    )  # fmt: skip
    held = fresh.calibration.held
    kl = [fresh.loss(plan_of(mask, fresh.description), held) for mask in (found.life, life)]
    assert kl[0] <= kl[1]
    assert sorted(found.life) == sorted(life)


def test_rearrange_keeps_a_prior_that_nothing_beats() -> None:
    """The prior is the best of all masks that drop one patch, on the held-out images."""
    fresh = scorer()
    every = [np.roll(np.array([0] + [DEPTH] * (PATCHES - 1)), k) for k in range(PATCHES)]
    best = min(every, key=lambda mask: fresh.loss(plan_of(mask, fresh.description), fresh.calibration.held))
    found, _ = run(best, starts={"other": every[0], PRIOR: best}, evaluations=6)
    assert (found.strategy, found.start, found.gain) == (START, PRIOR, 0.0)
    assert np.array_equal(found.life, best)
    assert "prior stays" in str(found)


def test_rearrange_refuses() -> None:
    life, effects, _ = prior()
    for arguments, words in (
        ({"starts": {"other": life}}, "fisher prior"),
        ({"strategies": ("greedy", "annealing")}, "annealing"),
        ({"starts": {PRIOR: life[:-1]}}, r"shape \(15,\)"),
        ({"starts": {PRIOR: life + 1}}, "lifetimes"),
    ):
        with pytest.raises(SearchError, match=words):
            run(life, **arguments)
    with pytest.raises(SearchError, match="effects"):
        rearrange(
            scorer(), {PRIOR: life}, effects[:, :-1], effects[0], evaluations=1, seconds=None, seed=0, trace=Trace()
        )
