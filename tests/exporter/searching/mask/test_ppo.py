"""PPO over exchanges: the untrained policy, the update, and the search."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exporter.searching.mask.test_rearrangement import LIFE, PATCHES, prior, scorer
from tests.exporter.tiny import DEPTH
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.mask.encoding import plan_of
from vp_exporter.searching.mask.exchange import Incumbent
from vp_exporter.searching.mask.ppo import CLIP, EPOCHS, LAMBDA, Learner, _confirm, ppo_search
from vp_exporter.searching.scoring import Scorer


def learner(seed: int = 0, importance: np.ndarray | None = None, **options: Any) -> Learner:
    _, effects, own = prior(seed)
    return Learner(effects, own if importance is None else importance, (4, 4), seed=seed, **options)


def test_the_untrained_policy_prefers_what_the_prior_does() -> None:
    rng = np.random.default_rng(0)
    rank = rng.permutation(PATCHES)
    importance = np.repeat((4.0**rank)[None], DEPTH, axis=0)
    life = np.where(rng.permutation(PATCHES) < 8, 0, DEPTH)
    shorten, lengthen = learner(importance=importance).preferences(life)
    assert np.array_equal(np.argsort(-shorten), np.argsort(rank))  # least important first
    assert np.array_equal(np.argsort(-lengthen), np.argsort(-rank))
    kept, gone = life == DEPTH, life == 0
    proposed = learner(importance=importance).propose(life, episodes=200, exchanges=1)
    dropped, revived = (proposed != life)[:, kept].mean(axis=0), (proposed != life)[:, gone].mean(axis=0)
    assert dropped.argmax() == rank[kept].argmin()
    assert revived.argmax() == rank[gone].argmax()


def test_importance_is_read_at_the_block_of_death() -> None:
    """A kept patch would be removed at the next shorter lifetime in use; a removed one was removed at its own."""
    importance = np.ones((DEPTH, PATCHES))
    importance[2, 9:] = 1e6  # leaving at block 2 is costly: the only lifetime below 3 and 4 in use
    life = np.array([0] * 3 + [2] * 6 + [3] * 2 + [DEPTH] * 5)
    shorten, lengthen = learner(importance=importance).preferences(life)
    assert shorten[9:11].max() < shorten[:9].min()  # 3 -> 2
    assert shorten[11:] == pytest.approx(shorten[3])  # 4 -> 3
    assert lengthen[3:9] == pytest.approx(lengthen[0])
    importance[2, 3] = 1e6
    assert learner(importance=importance).preferences(life)[1].argmax() == 3


def test_the_state_against_its_words() -> None:
    _, effects, importance = prior()
    logs = np.log(importance)
    logs = np.clip((logs - logs.mean()) / logs.std(), -3, 3)
    life = prior(4)[0]
    total = sum(effects[:, life[i], i] for i in range(PATCHES) if life[i] < DEPTH)
    got = learner().state(torch.from_numpy(life)[None], 0.25)[0].numpy()
    levels = sorted(set(life.tolist()))
    for i in range(PATCHES):
        shorter = levels[max(0, levels.index(life[i]) - 1)]
        row, column = i // 4, i % 4
        near = [
            life[r * 4 + c] / DEPTH
            for r in range(max(0, row - 1), min(4, row + 2))
            for c in range(max(0, column - 1), min(4, column + 2))
            if (r, c) != (row, column)
        ]

        def cosine(level: int, i: int = i) -> float:
            if level == DEPTH:
                return 0.0
            effect = effects[:, level, i]
            return float(total @ effect / np.linalg.norm(total) / np.linalg.norm(effect))

        y, x = row * 2 / 3 - 1, column * 2 / 3 - 1
        expected = [logs[shorter, i], logs[min(life[i], DEPTH - 1), i], life[i] / DEPTH, y, x, np.hypot(x, y),
                    np.mean(near), cosine(shorter), cosine(life[i]), 0.25]  # fmt: skip
        assert got[i] == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=16), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_episodes_keep_every_lifetime_and_undo_nothing(lifetimes: list[int], exchanges: int, seed: int) -> None:
    life = np.array(lifetimes)
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(3, 3, len(life))).astype(np.float32)
    agent = Learner(effects, rng.random((3, len(life))), (1, len(life)), seed=seed)
    proposed = agent.propose(life, episodes=3, exchanges=exchanges)
    if len(set(lifetimes)) == 1:
        assert proposed.shape == (0, len(life))
        return
    assert np.array_equal(np.sort(proposed, axis=1), np.broadcast_to(np.sort(life), proposed.shape))
    changed = (proposed != life).sum(axis=1)
    others = len(life) - np.bincount(life).max()
    # exchanges are never undone, and use disjoint patches
    assert (changed == 2 * min(exchanges, -(-others // 2))).all()


def test_an_update_against_its_formulas() -> None:
    """Gradient of the first epoch, from explicit GAE and the clipped objective (where ratios are 1)."""
    agent = learner()
    with torch.no_grad():
        agent.policy.value.add_(torch.randn(agent.policy.value.shape, generator=torch.Generator().manual_seed(0)))
    agent.propose(LIFE, episodes=3, exchanges=4)
    steps, rewards = agent._steps, np.array([0.3, -0.2, 0.1])
    assert steps is not None
    assert len(steps.value) == 4
    value = steps.value.numpy()
    advantage = np.zeros_like(value)
    for episode in range(3):
        for t in range(4):
            for k in range(t, 4):
                after = rewards[episode] if k == 3 else value[k + 1, episode]
                advantage[t, episode] += LAMBDA ** (k - t) * (after - value[k, episode])
    centred = (advantage - advantage.mean()) / advantage.std()
    chosen, entropy, error = torch.zeros(4, 3), torch.zeros(()), torch.zeros(())
    for t in range(4):
        for episode in range(3):
            shorten, lengthen, now = agent.policy(steps.state[t, episode])
            for logits, may, action in (
                (shorten, steps.may_shorten, steps.shortened), (lengthen, steps.may_lengthen, steps.lengthened)
            ):  # fmt: skip
                allowed = may[t, episode].nonzero().squeeze(1)
                part = logits[allowed].log_softmax(dim=0)
                chosen[t, episode] = chosen[t, episode] + part[allowed == action[t, episode]].squeeze()
                entropy = entropy - (part.exp() * part).sum() / 12
            error = error + (now - advantage[t, episode] - value[t, episode]) ** 2 / 12
    assert torch.allclose(chosen, steps.log_probability, atol=1e-5)
    gain = (chosen * torch.from_numpy(centred)).mean()  # its gradient is that of the ratio at 1
    expected = torch.autograd.grad(0.5 * error - gain - 0.01 * entropy, list(agent.policy.parameters()))
    norm = torch.stack([gradient.norm() for gradient in expected]).norm()
    first: list[torch.Tensor] = []
    step = agent.optimiser.step

    def record(*_: Any) -> None:
        if not first:
            first.extend(p.grad.clone() for p in agent.policy.parameters() if p.grad is not None)
        step()

    agent.optimiser.step = record  # type: ignore[method-assign, assignment]
    agent.learn(rewards)
    for got, want in zip(first, expected, strict=True):
        assert torch.allclose(got, want * min(1.0, 0.5 / float(norm)), atol=1e-5)
    assert (CLIP, EPOCHS) == (0.2, 4)


def test_it_learns_what_the_prior_does_not_know() -> None:
    """The importance is uninformative; the loss is caused by patches removed from the left half."""
    gained = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        patches = 64
        harm = np.where(np.arange(patches) % 8 < 4, 1.0, 0.0) + 0.1 * rng.random(patches)
        effects = rng.normal(size=(8, 2, patches)).astype(np.float32)
        agent = Learner(effects, np.ones((2, patches)), (8, 8), seed=seed)
        life = np.where(rng.permutation(patches) < 32, 0, 2)
        start = harm[life == 0].sum()
        means = []
        for _ in range(40):
            lives = agent.propose(life, episodes=8, exchanges=4)
            rewards = np.array([1 - harm[mask == 0].sum() / start for mask in lives])
            agent.learn(rewards)
            means.append(rewards.mean())
        best = np.sort(harm[life == 0])[-4:].sum() - np.sort(harm[life == 2])[:4].sum()
        gained.append((np.mean(means[:3]), np.mean(means[-5:]), best / start))
    for before, after, best in gained:
        assert after > 0.9 * best
        assert before < 0.4 * best


def search(measure: Scorer, evaluations: int | None, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    life, effects, importance = prior()
    limits, trace = Limits(evaluations), Trace()
    found, loss = ppo_search(
        measure, options.pop("life", life), effects, importance, limits, trace,
        batches=measure.calibration.search, seed=seed, **options,
    )  # fmt: skip
    return found, loss, limits, trace


def test_the_search_lowers_the_loss() -> None:
    measure, life = scorer(), prior()[0]
    found, loss, limits, trace = search(measure, 100, exchanges=2)  # 8 would be all of 16 patches
    assert limits.spent == len(trace.rows) == 100
    assert sorted(found) == sorted(life)
    fresh = scorer()
    start, end = (fresh.loss(plan_of(m, fresh.description), fresh.calibration.search, 3.0) for m in (life, found))
    assert loss == pytest.approx(end, rel=1e-9)
    assert end < 0.95 * start  # seeds 0 to 4: 0.88 to 0.91
    best = [row["best"] for row in trace.rows]
    assert best == sorted(best, reverse=True)


@pytest.mark.parametrize("evaluations", [0, 1, 7, 8, 13])
def test_the_limit_is_kept_to_the_last_candidate(evaluations: int) -> None:
    measure = scorer()
    _, _, limits, trace = search(measure, evaluations)
    assert limits.spent == len(trace.rows) == evaluations
    assert len({key.split("/")[0] for key in measure.memo}) <= evaluations + 1  # and the start


def test_the_same_seed_gives_the_same_search_whatever_else_draws() -> None:
    runs = []
    for noise, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(noise)
        np.random.seed(noise)
        found, loss, _, trace = search(scorer(), 20, seed)
        runs.append((found.tolist(), loss, trace.rows))
    assert runs[0] == runs[1] != runs[2]


def test_a_mask_without_exchanges_is_given_back() -> None:
    whole = np.full(PATCHES, DEPTH)
    found, loss, limits, _ = search(scorer(), None, life=whole)
    assert np.array_equal(found, whole)
    assert limits.spent == 0
    assert loss < 1e-6


def test_what_exceeds_the_budget_is_punished() -> None:
    """If only the start meets the budget, no move is worthwhile."""
    life = prior()[0]
    found, *_ = search(
        scorer(), 24, costs=lambda mask: 1.0 + 9.0 * float((mask != life).any()), budget=1.0, beta=1.0
    )  # fmt: skip
    assert np.array_equal(found, life)
    kept, *_ = search(scorer(), 24, costs=lambda mask: float(mask.sum()), budget=float(life.sum()))
    free, *_ = search(scorer(), 24)
    assert np.array_equal(kept, free)
    assert not np.array_equal(free, life)


class Measured:
    """An incumbent with known differences: per image, for each batch; records the queries."""

    batches = (0, 1, 2, 3)

    def __init__(self, changes: dict[int, list[list[float]]]) -> None:
        self.changes, self.asked, self.life = changes, list[tuple[int, int]](), -1

    def difference(self, life: np.ndarray, batches: list[int]) -> np.ndarray:
        self.asked += [(int(life[0]), batch) for batch in batches]
        return np.array([value for batch in batches for value in self.changes[int(life[0])][batch]])

    def move(self, life: np.ndarray) -> None:
        self.life = int(life[0])


LUCKY = [[1.0], [1.0], [-0.5], [-1.0]]  # better on the last two batches, worse overall
STEADY = [[-0.1], [0.15], [-0.2], [-0.2, -0.2]]  # worse on one batch only


@pytest.mark.parametrize(
    ("first", "second", "moved", "asked"),
    [
        (LUCKY, STEADY, 1, [(0, 2), (0, 0), (1, 2), (1, 0), (1, 1), (1, 3)]),
        (STEADY, LUCKY, 0, [(0, 2), (0, 0), (0, 1), (0, 3)]),
        (LUCKY, LUCKY, -1, [(0, 2), (0, 0), (1, 2), (1, 0)]),
        ([[0.0]] * 4, STEADY, 1, [(0, 2), (1, 2), (1, 0), (1, 1), (1, 3)]),  # equal is not better
    ],
)
def test_a_candidate_is_given_up_where_it_is_no_longer_better(
    first: list[list[float]], second: list[list[float]], moved: int, asked: list[tuple[int, int]]
) -> None:
    """The incumbent only moves to what is better on all batches; others are run on no more batches than necessary."""
    incumbent = Measured({0: first, 1: second, 2: STEADY})
    lives = np.arange(3)[:, None]  # the third one is never tried: two per update
    rewards = [0.9, 0.8, 0.7]
    assert _confirm(cast(Incumbent, incumbent), lives, rewards, [2]) == (moved >= 0)
    assert (incumbent.life, incumbent.asked) == (moved, asked)


def test_a_candidate_without_reward_is_not_run_again() -> None:
    incumbent = Measured({0: STEADY})
    assert not _confirm(cast(Incumbent, incumbent), np.zeros((1, 1), dtype=int), [0.0], [2])
    assert not incumbent.asked
