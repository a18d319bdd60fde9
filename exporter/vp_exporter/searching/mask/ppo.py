"""Rearrangement by reinforcement learning: PPO (Schulman et al. 2017) over exchanges, starting from the Fisher prior.

Follows V-Pruner (AAAI 2026), whose abstract mentions PPO, a Fisher prior and a reward of performance and cost. Its text
and code were not available, so states, actions and network are our own. An episode exchanges a few pairs of lifetimes,
starting from the best mask so far; the reward at its end is the reduction of the loss on some images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.mask.exchange import Incumbent, standard_log
from vp_exporter.searching.scoring import Scorer

CLIP, LAMBDA, EPOCHS, ENTROPY, VALUE = 0.2, 0.95, 4, 0.01, 0.5
PRIOR_SLOPE = 2.0  # initial slope of the logits over the standardised log importance
FEATURES, HIDDEN = 10, 32
PATIENCE = 2  # updates without a better mask before episodes are shortened
CONFIRMED = 2  # maximum number of candidates per update that are run on more batches


class Policy(nn.Module):
    """A network applied to each token with shared weights: two logits per token, and one value for the mask.

    The last layers are initialised to zero, so that an untrained policy follows the Fisher prior: shorten the least
    important patches, lengthen the most important ones.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def weight(inputs: int, outputs: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(inputs, outputs, generator=generator) / inputs**0.5)

        self.first, self.first_bias = weight(FEATURES, HIDDEN), nn.Parameter(torch.zeros(HIDDEN))
        self.second, self.second_bias = weight(HIDDEN, HIDDEN), nn.Parameter(torch.zeros(HIDDEN))
        self.heads = nn.Parameter(torch.zeros(HIDDEN, 2))
        self.slopes = nn.Parameter(torch.tensor([-PRIOR_SLOPE, PRIOR_SLOPE]))
        self.pooled, self.pooled_bias = weight(HIDDEN, HIDDEN), nn.Parameter(torch.zeros(HIDDEN))
        self.value = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State [..., patches, FEATURES] -> logits to shorten and to lengthen [..., patches], value [...]."""
        hidden = torch.tanh(state @ self.first + self.first_bias)
        hidden = torch.tanh(hidden @ self.second + self.second_bias)
        logits = hidden @ self.heads + self.slopes * state[..., :2]
        value = torch.tanh(hidden.mean(dim=-2) @ self.pooled + self.pooled_bias) @ self.value
        return logits[..., 0], logits[..., 1], value


@dataclass(frozen=True)
class Steps:
    """A batch of episodes; every shape begins with [steps, episodes].

    Attributes:
        state: [..., patches, FEATURES].
        may_shorten, may_lengthen: bool [..., patches], valid tokens for the action.
        shortened, lengthened: int64 [...], the action.
        log_probability, value: float32 [...], from the policy at that time.
    """

    state: Tensor
    may_shorten: Tensor
    may_lengthen: Tensor
    shortened: Tensor
    lengthened: Tensor
    log_probability: Tensor
    value: Tensor


class Learner:
    """Proposes masks and learns from their rewards. Runs on the CPU; all randomness comes from `seed`.

    Args:
        effects: float [images, depth, patches], see `exchange.block_fisher_swap`.
        importance: float [depth, patches].
        grid: Rows and columns of patches.
        learning_rate: Of Adam.
    """

    def __init__(
        self,
        effects: np.ndarray,
        importance: np.ndarray,
        grid: tuple[int, int],
        *,
        seed: int,
        learning_rate: float = 3e-3,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(self.generator)
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        images, self.depth, self.patches = effects.shape
        # One more level for patches that are never removed: no effect, and the last block's importance.
        last = torch.zeros(images, 1, self.patches)
        self.effect = torch.cat([torch.from_numpy(np.asarray(effects, dtype=np.float32)), last], dim=1)
        self.norm = self.effect.norm(dim=0)
        logs = torch.from_numpy(standard_log(importance)).float()
        self.log_importance = torch.cat([logs, logs[-1:]])
        rows, columns = grid
        self.row = torch.linspace(-1, 1, rows).repeat_interleave(columns)
        self.column = torch.linspace(-1, 1, columns).repeat(rows)
        place = torch.arange(self.patches)
        row, column = place // columns, place % columns
        near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) == 1
        self.near = near.float() / near.sum(dim=1, keepdim=True).clamp_min(1)
        self._steps: Steps | None = None

    def state(self, life: Tensor, done: float) -> Tensor:
        """Features of masks int64 [episodes, patches]: float32 [episodes, patches, FEATURES].

        Log importance at the next shorter lifetime and at the patch's own; lifetime, row, column, distance from the
        centre; mean lifetime of its eight neighbours; cosine between its effect (when removed earlier, and as it is)
        and that of all removed patches; progress of the episode.
        """
        every = torch.arange(self.patches).expand_as(life)
        levels = life[0].unique()  # unchanged by exchanges
        shorter = levels[(torch.searchsorted(levels, life) - 1).clamp_min(0)]
        total = self.effect[:, life, every].sum(dim=-1)  # [images, episodes]
        along = torch.einsum("ne,nlp->elp", total, self.effect)
        length = total.norm(dim=0)[:, None]

        def cosine(level: Tensor) -> Tensor:
            inner = along.gather(1, level[:, None]).squeeze(1)
            return inner / (length * self.norm[level, every]).clamp_min(1e-12)

        alive = life / self.depth
        row, column = self.row.expand_as(alive), self.column.expand_as(alive)
        return torch.stack(
            [
                self.log_importance[shorter, every], self.log_importance[life, every], alive, row, column,
                (row**2 + column**2).sqrt(), alive @ self.near.T, cosine(shorter), cosine(life),
                torch.full_like(alive, done),
            ],
            dim=-1,
        )  # fmt: skip

    @torch.no_grad()
    def preferences(self, life: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits to shorten and to lengthen, float32 [patches] each."""
        shorten, lengthen, _ = self.policy(self.state(torch.from_numpy(life)[None], 0.0))
        return shorten[0].numpy(), lengthen[0].numpy()

    @torch.no_grad()
    def propose(self, life: np.ndarray, *, episodes: int, exchanges: int) -> np.ndarray:
        """Play episodes from `life` int64 [patches]; each patch is exchanged at most once per episode.

        Returns:
            int64 [episodes, patches]; no episodes if all lifetimes are equal.
        """
        # With m patches outside the most common lifetime, m / 2 exchanges always leave at least two lifetimes.
        others = len(life) - int(np.bincount(life).max())
        exchanges = min(exchanges, -(-others // 2))
        if not exchanges:
            return np.zeros((0, len(life)), dtype=np.int64)
        lives = torch.from_numpy(life).expand(episodes, -1).clone()
        free = torch.ones_like(lives, dtype=torch.bool)
        rows, parts = torch.arange(episodes), []
        for step in range(exchanges):
            state = self.state(lives, step / exchanges)
            shorten, lengthen, value = self.policy(state)
            least = lives.masked_fill(~free, self.depth + 1).amin(dim=1, keepdim=True)
            may_shorten = free & (lives > least)
            i = self._draw(shorten, may_shorten)
            may_lengthen = free & (lives < lives[rows, i][:, None])
            j = self._draw(lengthen, may_lengthen)
            log_probability = _log(shorten, may_shorten)[rows, i] + _log(lengthen, may_lengthen)[rows, j]
            lives[rows, i], lives[rows, j] = lives[rows, j], lives[rows, i]
            free[rows, i] = free[rows, j] = False
            parts.append((state, may_shorten, may_lengthen, i, j, log_probability, value))
        self._steps = Steps(*(torch.stack(column) for column in zip(*parts, strict=True)))
        return lives.numpy()

    def _draw(self, logits: Tensor, allowed: Tensor) -> Tensor:
        return torch.multinomial(_log(logits, allowed).exp(), 1, generator=self.generator).squeeze(1)

    def learn(self, rewards: np.ndarray) -> None:
        """One PPO update from the rewards, float [episodes], of the latest proposals (the first ones, if fewer)."""
        assert self._steps is not None, "propose first"
        count = len(rewards)
        old = Steps(*(getattr(self._steps, name)[:, :count] for name in Steps.__dataclass_fields__))
        advantage, following = torch.zeros_like(old.value), torch.zeros(count)
        following_value = torch.from_numpy(
            np.asarray(rewards, dtype=np.float32)
        )  # gamma 1: the final reward is not discounted
        for step in reversed(range(len(old.value))):
            following = following_value - old.value[step] + LAMBDA * following
            advantage[step], following_value = following, old.value[step]
        returns = advantage + old.value
        centred = (advantage - advantage.mean()) / advantage.std(correction=0).clamp_min(1e-8)
        for _ in range(EPOCHS):
            shorten, lengthen, value = self.policy(old.state)
            first, second = _log(shorten, old.may_shorten), _log(lengthen, old.may_lengthen)
            now = first.gather(2, old.shortened[..., None]) + second.gather(2, old.lengthened[..., None])
            ratio = (now.squeeze(2) - old.log_probability).exp()
            gain = torch.minimum(ratio * centred, ratio.clamp(1 - CLIP, 1 + CLIP) * centred).mean()
            entropy = -sum((part.exp() * part).sum(dim=-1).mean() for part in (first, second))
            loss = VALUE * F.mse_loss(value, returns) - gain - ENTROPY * entropy
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
            self.optimiser.step()


def _log(logits: Tensor, allowed: Tensor) -> Tensor:
    """Log probabilities; disallowed actions get a large negative number, which keeps gradients finite."""
    return logits.masked_fill(~allowed, -1e9).log_softmax(dim=-1)


def ppo_search(
    scorer: Scorer,
    life: np.ndarray,
    effects: np.ndarray,
    importance: np.ndarray,
    limits: Limits,
    trace: Trace,
    *,
    batches: Sequence[int],
    seed: int,
    temperature: float = 3.0,
    exchanges: int = 8,
    episodes_per_update: int = 8,
    batches_per_evaluation: int | None = None,
    learning_rate: float = 3e-3,
    costs: Callable[[np.ndarray], float] | None = None,
    budget: float | None = None,
    beta: float = 1.0,
) -> tuple[np.ndarray, float]:
    """Let a policy propose exchanges, and keep what lowers the loss.

    All candidates of an update are run on the same few batches, drawn by `seed`. Reward = (incumbent's loss - theirs) /
    incumbent's loss there, clipped to +-1, - beta * max(0, cost / budget - 1); exchanges preserve the cost, so the
    second term is 0 if the start is within the budget. The best candidates are then run on the other batches, for as
    long as their mean loss stays lower. If it is lower on all of them, the candidate becomes the incumbent, from which
    the next episodes start.

    Args:
        life: int [patches], starting point.
        effects: float [images, depth, patches]; importance: float [depth, patches]. From the Fisher prior.
        limits: Each candidate counts as one evaluation, however many batches it is run on.
        exchanges: Initial length of an episode; halved after updates without improvement.
        batches_per_evaluation: Batches that a candidate is run on first; None for an eighth of them.
        costs, budget, beta: Cost of lifetimes, its limit, and the weight of exceeding it.

    Returns:
        Lifetimes int64 [patches], and their loss on `batches` (nats).

    Raises:
        SearchError: if losses are not finite.
    """
    incumbent = Incumbent(scorer, life, batches, temperature)
    learner = Learner(effects, importance, scorer.description.grid, seed=seed, learning_rate=learning_rate)
    rng = np.random.default_rng(seed)
    first = max(1, min(batches_per_evaluation or len(batches) // 8, len(batches)))
    failed = 0
    while limits.left:
        # Only the leader plays and learns, so the network need not be bitwise equal on all processes.
        lives = scorer.workers.from_leader(
            partial(learner.propose, incumbent.life, episodes=episodes_per_update, exchanges=exchanges)
        )
        chosen = [batches[k] for k in sorted(rng.choice(len(batches), first, replace=False))]
        scale = max(float(incumbent.losses(chosen).mean()), 1e-12)
        rewards: list[float] = []
        gains: list[float] = []
        for candidate in lives:
            if not limits.left:
                break
            limits.spend()
            gains.append(-float(incumbent.difference(candidate, chosen).mean()))
            over = 0.0 if costs is None or not budget else max(0.0, costs(candidate) / budget - 1)
            rewards.append(float(np.clip(gains[-1] / scale, -1, 1)) - beta * over)
            trace.add("ppo", incumbent.loss - gains[-1], incumbent.loss)
        if not rewards:
            break  # all lifetimes are equal
        if scorer.workers.leader:
            learner.learn(np.array(rewards))
        failed = 0 if _confirm(incumbent, lives, rewards, chosen) else failed + 1
        if failed >= PATIENCE:
            exchanges, failed = max(1, exchanges // 2), 0
    scorer.forget()
    return incumbent.life, incumbent.loss


def _confirm(incumbent: Incumbent, lives: np.ndarray, rewards: Sequence[float], chosen: Sequence[int]) -> bool:
    """Adopt the first of the best candidates that is better on all batches; returns whether there was one."""
    for k in sorted(range(len(rewards)), key=lambda k: -rewards[k])[:CONFIRMED]:
        if rewards[k] > 0 and _stays_better(incumbent, lives[k], chosen):
            incumbent.move(lives[k])
            return True
    return False


def _stays_better(incumbent: Incumbent, life: np.ndarray, chosen: Sequence[int]) -> bool:
    """Whether a candidate's mean loss stays below the incumbent's, checked after each batch.

    The best candidate on a few images is often so by chance, which soon shows on others.
    """
    changes: list[float] = []
    for part in [list(chosen), *([batch] for batch in incumbent.batches if batch not in chosen)]:
        changes += incumbent.difference(life, part).tolist()
        if not np.mean(changes) < 0:
            return False
    return True
