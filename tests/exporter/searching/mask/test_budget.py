"""Token Mask Search against every possible mask of tiny problems, and invariants of any result."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.exporter.tiny import KINDS, tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.model.loading import describe_by_name
from vp_exporter.plan.macs import count_macs
from vp_exporter.searching.mask.budget import FINE, Costs, Found, macs_costs, search_lifetimes
from vp_exporter.searching.mask.encoding import counts_of, mask_of, plan_of

DEPTH, PATCHES = 3, 5
EVERY_LIFE = [np.array(life) for life in product(range(DEPTH + 1), repeat=PATCHES)]


def some_costs(seed: int, depth: int = DEPTH, patches: int = PATCHES, *, rising: bool = True) -> Costs:
    """Costs that differ in every block; measured ones need not increase with the count."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0.5, 2.0, (depth, patches + 1))
    if rising:
        blocks = blocks.cumsum(axis=1)
    return Costs(blocks, rng.uniform(0.0, 0.5, patches + 1).cumsum(), 3.0, "ms")


def loss_of(importance: np.ndarray, life: np.ndarray) -> float:
    """sum of I[life_i, i], patch by patch."""
    return sum(float(importance[n, i]) for i, n in enumerate(life) if n < len(importance))


def cost_of(costs: Costs, life: np.ndarray) -> float:
    counts = [sum(int(n) > block for n in life) for block in range(costs.depth)]
    return costs.fixed + costs.embed[counts[0]] + sum(costs.blocks[block, n] for block, n in enumerate(counts))


def allowed(life: np.ndarray, min_tokens: int, multiple: int) -> bool:
    counts = counts_of(life, DEPTH)
    return all(n >= min_tokens and (n % multiple == 0 or n == len(life)) for n in counts)


def least_loss(importance: np.ndarray, costs: Costs, budget: float, min_tokens: int = 1, multiple: int = 1) -> float:
    """The optimum over all masks; infinite if none fits."""
    return min(
        (
            loss_of(importance, life)
            for life in EVERY_LIFE
            if allowed(life, min_tokens, multiple) and cost_of(costs, life) <= budget
        ),
        default=np.inf,
    )


def least_cost(costs: Costs, min_tokens: int = 1, multiple: int = 1) -> float:
    return min(cost_of(costs, life) for life in EVERY_LIFE if allowed(life, min_tokens, multiple))


def sound(found: Found, importance: np.ndarray, costs: Costs, budget: float, min_tokens: int, multiple: int) -> None:
    """Check the invariants of a result."""
    depth, patches = importance.shape
    assert found.life.dtype == np.int64
    assert found.life.shape == (patches,)
    assert found.counts == counts_of(found.life, depth)
    assert found.predicted_loss == pytest.approx(loss_of(importance, found.life), abs=1e-9)
    assert found.cost == pytest.approx(cost_of(costs, found.life))
    assert found.cost == costs.total(found.counts) <= budget
    for n in found.counts:
        assert n >= min_tokens
        assert n % multiple == 0 or n == patches
    mask = mask_of(found.life, depth)
    assert not (mask[1:] & ~mask[:-1]).any()  # nested: no patch returns


@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_those_of_the_plan(kind: str) -> None:
    """map-pool and average-pool read the patches of the last block: the cost of their head depends on its count."""
    _, description = tiny_vit(kind)
    costs = macs_costs(description)
    assert costs.dense == count_macs(description).total
    rng = np.random.default_rng(1)
    for low in (0, 1, 4):  # at 4 of 4 blocks no patch is dropped
        life = rng.integers(low, description.depth + 1, description.patches)
        life[0] = description.depth
        counts = counts_of(life, description.depth)
        assert costs.total(counts) == count_macs(description, plan_of(life, description)).total


@pytest.mark.parametrize("share", [0.35, 0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_exact_where_one_order_sorts_what_a_block_is_worth(seed: int, share: float) -> None:
    """The result is at least as good as the optimum of a budget smaller by the rounding, one step of
    (budget - cheapest) / FINE per block; and no mask within the budget is better than the optimum.
    """
    rng = np.random.default_rng(seed)
    worth = np.sort(rng.integers(0, 20, (DEPTH, PATCHES)), axis=1)[:, rng.permutation(PATCHES)].astype(float)
    importance = worth[::-1].cumsum(axis=0)[::-1]  # I[l] - I[l + 1] = worth[l]
    costs = some_costs(seed)
    budget = share * costs.dense
    if budget < least_cost(costs):
        with pytest.raises(SearchError, match="cannot be reached"):
            search_lifetimes(importance, costs, budget, min_tokens=1)
        return
    found = search_lifetimes(importance, costs, budget, min_tokens=1)
    sound(found, importance, costs, budget, 1, 1)
    rounding = DEPTH * (budget - least_cost(costs)) / FINE
    assert found.predicted_loss >= least_loss(importance, costs, budget) - 1e-9
    assert found.predicted_loss <= least_loss(importance, costs, budget - rounding) + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_no_prefix_of_a_starting_order_and_no_exchange_is_better(seed: int) -> None:
    """With rankings that disagree: not the proven optimum, but at least as good as all of these."""
    rng = np.random.default_rng(seed)
    importance, costs = rng.gamma(0.7, size=(DEPTH, PATCHES)), some_costs(seed)
    budget = 0.6 * costs.dense
    found = search_lifetimes(importance, costs, budget, min_tokens=1)
    sound(found, importance, costs, budget, 1, 1)
    optimum = least_loss(importance, costs, budget)
    assert found.predicted_loss >= optimum - 1e-9
    rounding = DEPTH * (budget - least_cost(costs)) / FINE * 4  # starting orders are searched with the coarser steps
    for start in (importance[0], importance.mean(axis=0), importance[-1]):
        rank = np.argsort(np.argsort(-start))
        for counts in product(range(1, PATCHES + 1), repeat=DEPTH):
            if list(counts) == sorted(counts, reverse=True) and costs.total(counts) <= budget - rounding:
                life = np.array([sum(r < n for n in counts) for r in rank])
                assert found.predicted_loss <= loss_of(importance, life) + 1e-9
    for life in EVERY_LIFE:  # the best assignment for its own counts
        if counts_of(life, DEPTH) == found.counts:
            assert found.predicted_loss <= loss_of(importance, life) + 1e-9


def test_assignment_and_order_in_turn_find_what_one_order_cannot() -> None:
    """Patch 0 only matters in the first block, patch 1 only in the last, and 2 to 4 hardly at all.

    A nested prefix of one ranking keeps one of the first two too long or drops it too soon.
    """
    importance = np.array([[9.0, 8.0, 0.3, 0.2, 0.1], [0.0, 8.0, 0.2, 0.1, 0.0], [0.0, 8.0, 0.1, 0.0, 0.0]])
    costs = Costs(np.tile(np.arange(PATCHES + 1.0), (DEPTH, 1)), np.zeros(PATCHES + 1), 0.0, "MACs")
    found = search_lifetimes(importance, costs, 4.0, min_tokens=1)
    assert found.counts == (2, 1, 1)
    assert found.life.tolist() == [1, 3, 0, 0, 0]
    assert found.predicted_loss == pytest.approx(0.6)
    assert found.predicted_loss == pytest.approx(least_loss(importance, costs, 4.0))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    share=st.floats(0.1, 0.99),
    min_tokens=st.integers(1, PATCHES),
    multiple=st.integers(1, 3),
    rising=st.booleans(),
    first=st.booleans(),
)
def test_invariants(seed: int, share: float, min_tokens: int, multiple: int, rising: bool, first: bool) -> None:
    rng = np.random.default_rng(seed)
    importance, costs = rng.normal(size=(DEPTH, PATCHES)), some_costs(seed, rising=rising)
    budget = share * costs.dense
    lives = [life for life in EVERY_LIFE if allowed(life, min_tokens, multiple)]
    if first:
        lives = [life for life in lives if len(set(counts_of(life, DEPTH))) == 1]
    least = min(cost_of(costs, life) for life in lives)
    assume(abs(least - budget) > 1e-9)
    how = {"min_tokens": min_tokens, "multiple": multiple, "first_block_only": first}
    if budget < least:
        with pytest.raises(SearchError, match="cannot be reached"):
            search_lifetimes(importance, costs, budget, **how)
        return
    found = search_lifetimes(importance, costs, budget, **how)
    sound(found, importance, costs, budget, min_tokens, multiple)
    fitting = [loss_of(importance, life) for life in lives if cost_of(costs, life) <= budget]
    assert found.predicted_loss >= min(fitting) - 1e-9
    if first:
        assert set(found.life) <= {0, DEPTH}
        assert found.predicted_loss == pytest.approx(min(fitting), abs=1e-9)


def test_the_cheapest_plan_is_found_at_exactly_its_cost() -> None:
    importance, costs = np.random.default_rng(0).random((DEPTH, PATCHES)), some_costs(0)
    least = costs.total((2, 2, 2))
    found = search_lifetimes(importance, costs, least, min_tokens=2)
    assert (found.counts, found.cost) == ((2, 2, 2), least)


def test_a_larger_budget_never_loses_more() -> None:
    _, description = tiny_vit("map-pool")
    costs = macs_costs(description)
    importance = np.random.default_rng(2).gamma(0.5, size=(description.depth, description.patches))
    losses = [
        search_lifetimes(importance, costs, s * costs.dense, min_tokens=2).predicted_loss for s in (0.4, 0.6, 0.8)
    ]
    assert losses[0] > losses[1] > losses[2] > 0


def test_unknown_costs_are_never_chosen() -> None:
    importance, costs = np.random.default_rng(0).random((DEPTH, PATCHES)), some_costs(0)
    blocks = costs.blocks.copy()
    blocks[:, :3] = np.inf
    costs = replace(costs, blocks=blocks)
    found = search_lifetimes(importance, costs, 0.85 * costs.dense, min_tokens=1)
    assert min(found.counts) >= 3
    with pytest.raises(SearchError, match="cannot be reached"):
        search_lifetimes(importance, costs, costs.total((3, 3, 3)) - 0.01, min_tokens=1)


def test_takes_seconds_at_full_size_and_uses_the_budget() -> None:
    costs = macs_costs(describe_by_name("deit_small_patch16_224", {}))
    importance = np.random.default_rng(0).gamma(0.5, size=(12, 196))[::-1].cumsum(axis=0)[::-1]
    budget = 0.65 * costs.dense
    start = time.process_time()
    found = search_lifetimes(importance, costs, budget)
    assert time.process_time() - start < 5
    sound(found, importance, costs, budget, 8, 1)
    assert found.cost > 0.995 * budget
    in_eights = search_lifetimes(importance, costs, budget, multiple=8)
    sound(in_eights, importance, costs, budget, 8, 8)
    assert in_eights.predicted_loss >= found.predicted_loss


def test_errors() -> None:
    importance, costs = np.ones((DEPTH, PATCHES)), some_costs(0)
    budget = 0.7 * costs.dense
    least = costs.total((4, 4, 4)) / costs.dense
    with pytest.raises(
        SearchError, match=r"cannot be reached; .* with at least 4 patches.*lower `min_tokens`"
    ) as caught:
        search_lifetimes(importance, costs, 0.3 * costs.dense, min_tokens=4)
    share = float(caught.value.expected.split("(")[1].split(" ")[0])
    assert least <= share < least + 0.001  # the stated share suffices, and is tight
    search_lifetimes(importance, costs, share * costs.dense, min_tokens=4)
    for too_much in (costs.dense, 2 * costs.dense, np.nan):
        with pytest.raises(SearchError, match="nothing to remove"):
            search_lifetimes(importance, costs, too_much, min_tokens=1)
    broken = importance.copy()
    broken[1, 2] = np.nan
    with pytest.raises(SearchError, match="importance of patch 2 in block 1 is nan"):
        search_lifetimes(broken, costs, budget, min_tokens=1)
    with pytest.raises(SearchError, match=r"expected \[3, 5\]"):
        search_lifetimes(importance[:2], costs, budget, min_tokens=1)
    for count in (0, PATCHES + 1):
        with pytest.raises(SearchError, match=f"at least {count} patches"):
            search_lifetimes(importance, costs, budget, min_tokens=count)
    with pytest.raises(SearchError, match="multiples of 0"):
        search_lifetimes(importance, costs, budget, min_tokens=1, multiple=0)
    with pytest.raises(SearchError, match="shape"):
        Costs(costs.blocks, costs.embed[1:], 0.0, "ms")
    with pytest.raises(SearchError, match="NaN or negative"):
        Costs(-costs.blocks, costs.embed, 0.0, "ms")
