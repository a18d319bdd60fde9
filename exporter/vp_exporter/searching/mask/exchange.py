"""Rearrangement without learning: exchanges that cancel Fisher effects, and local search on the measured loss.

An exchange swaps two patches' lifetimes (vp_exporter.searching.mask.encoding); every block keeps its number of patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vp_exporter.model.spec import ModelSpec
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.mask.encoding import plan_of, same_until
from vp_exporter.searching.mask.starting_masks import squared_distances
from vp_exporter.searching.scoring import Scorer

FIRST_MOVES = 8  # initial number of exchanges per candidate
SWEEP = 12  # consecutive rejected candidates before using fewer exchanges
DRAWS = 64  # consecutive duplicate candidates before the neighbourhood counts as exhausted
REMEMBER_BYTES = 2**32  # of the incumbent's activations, per process


def block_fisher_swap(effects: np.ndarray, life: np.ndarray, *, rounds: int = 3) -> np.ndarray:
    """Exchange lifetimes so that the effects of removed patches cancel, without running the model.

    The mask rearrangement of Kwon et al. 2022 ("A Fast Post-Training Pruning Framework for Transformers"), for patches
    that are removed at different blocks. The diagonal Fisher information sums each patch's own squared effect; this
    uses the whole matrix: cost = mean over images of (sum over removed patches i of effects[:, life[i], i])^2. Greedily
    makes the exchange that reduces it most (on ties, the first pair i < j) until none does.

    Args:
        effects: float [images, depth, patches], signed effect on an image's loss of removing patch i from block l on.
        life: int [patches], number of blocks in which each patch is kept.
        rounds: Make at most `rounds * patches` exchanges.

    Returns:
        int64 [patches], the same lifetimes rearranged.
    """
    life = np.array(life, dtype=np.int64)
    images, _, patches = effects.shape
    # One more level: a patch kept to the end has no effect.
    effect = np.concatenate([effects, np.zeros((images, 1, patches), effects.dtype)], axis=1).astype(np.float64)
    every = np.arange(patches)
    gone = effect[:, life, every]  # [images, patches]
    total = gone.sum(axis=1)

    def squared(i: int) -> np.ndarray:
        """|d_ij|^2 over j, where exchanging i and j adds d_ij to `total`."""
        added = effect[:, life, i] - gone[:, [i]] + effect[:, life[i], :] - gone
        square: np.ndarray = np.einsum("nj,nj->j", added, added)
        return square

    square = np.stack([squared(i) for i in range(patches)])
    pairs = np.triu(np.ones((patches, patches), dtype=bool), 1)
    for _ in range(int(rounds * patches)):
        # total . d_ij = towards[life[j], i] - towards[life[i], i] + the same with i and j exchanged
        towards = (total @ effect.reshape(images, -1)).reshape(-1, patches)
        half = towards[life, :].T - towards[life, every][:, None]  # [i, j]
        change = np.where(pairs & (life[:, None] != life[None, :]), 2 * (half + half.T) + square, np.inf)
        best = int(change.argmin())
        if not change.flat[best] < -1e-9 * (total @ total):  # ignore gains within rounding
            break
        i, j = divmod(best, patches)
        life[[i, j]] = life[[j, i]]
        gone[:, [i, j]] = effect[:, life[[i, j]], [i, j]]
        total = gone.sum(axis=1)
        for moved in (i, j):
            square[moved] = square[:, moved] = squared(moved)
    return life


class Incumbent:
    """The best mask so far; candidates are compared with it image by image.

    Args:
        life: int [patches].
        batches: All batches to search on.

    Attributes:
        loss: Mean over the images of `batches`, of Scorer.losses at the temperature.
    """

    def __init__(self, scorer: Scorer, life: np.ndarray, batches: Sequence[int], temperature: float) -> None:
        self.scorer, self.batches, self.temperature = scorer, tuple(batches), temperature
        self.move(life)

    def move(self, life: np.ndarray) -> None:
        """Replace the incumbent by `life`."""
        self.life = np.array(life, dtype=np.int64)
        self._plan = plan_of(self.life, self.scorer.description)
        losses = self.scorer.losses(self._plan, self.batches, self.temperature)
        counts = [self.scorer.calibration.count([batch]) for batch in self.batches]
        self._losses: dict[int, Tensor] = dict(zip(self.batches, losses.split(counts), strict=True))
        self.loss = float(losses.mean())
        self._unshared, self._remembered = 0, False

    def losses(self, batches: Sequence[int]) -> np.ndarray:
        """Losses of the incumbent: float64 [n]."""
        return np.concatenate([self._losses[batch].numpy() for batch in batches])

    def difference(self, life: np.ndarray, batches: Sequence[int]) -> np.ndarray:
        """Loss of a candidate minus that of the incumbent: float64 [n], negative if the candidate is better."""
        self._share(life, len(batches))
        plan = plan_of(life, self.scorer.description)
        theirs: np.ndarray = self.scorer.losses(plan, batches, self.temperature).numpy()
        return theirs - self.losses(batches)

    def _share(self, life: np.ndarray, batches: int) -> None:
        """Store the incumbent's activations once recomputing them has cost more than a run of it."""
        depth = self.scorer.description.depth
        self._unshared += min(same_until(self.life, life), depth) * batches
        if self._remembered or self._unshared < depth * len(self.batches):
            return
        self._remembered = True
        fitting = self._fitting()
        if fitting:
            self.scorer.remember(self._plan, fitting)

    def _fitting(self) -> tuple[int, ...]:
        """Batches whose activations fit in REMEMBER_BYTES."""
        description, kept, used = self.scorer.description, [], 0
        tokens = description.patches + description.prefix_tokens
        for batch in self.batches:
            images = self.scorer.calibration.count([batch])
            used += 4 * description.depth * tokens * description.embed_dim * images // self.scorer.workers.world
            if used > REMEMBER_BYTES:
                break
            kept.append(batch)
        return tuple(kept)


def local_search(
    scorer: Scorer,
    life: np.ndarray,
    limits: Limits,
    trace: Trace,
    *,
    batches: Sequence[int],
    importance: np.ndarray,
    seed: int,
    temperature: float = 3.0,
    batches_per_evaluation: int | None = None,
) -> tuple[np.ndarray, float]:
    """Draw random exchanges and keep those that lower the loss.

    A candidate is the incumbent after 8 exchanges (then 4, 2, 1, each time after a sweep of rejected candidates). It is
    first run on a few batches, in rotation, and on the others only if it is better there, since most candidates are
    not. It is kept if its mean loss over all of `batches` is lower.

    Args:
        life: int [patches], starting point.
        limits: Each candidate counts as one evaluation, however many batches it is run on.
        importance: float [depth, patches], of removing a patch from a block on; determines which exchanges are likely.
        seed: Seed of the draws, the only source of randomness.
        temperature: Temperature of the loss.
        batches_per_evaluation: Batches that a candidate is run on first; None for a quarter of them.

    Returns:
        Lifetimes int64 [patches], and their loss on `batches` (nats).

    Raises:
        SearchError: if losses are not finite.
    """
    rng = np.random.default_rng(seed)
    draw = Exchanges(importance, scorer.description)
    incumbent = Incumbent(scorer, life, batches, temperature)
    first = max(1, min(batches_per_evaluation or len(batches) // 4, len(batches)))
    moves, refused, turn = FIRST_MOVES, 0, 0
    seen = {incumbent.life.tobytes()}
    while limits.left:
        if refused >= SWEEP and moves > 1:
            moves, refused = moves // 2, 0
        drawn = (draw(incumbent.life, moves, rng) for _ in range(DRAWS))
        candidate = next((life for life in drawn if life.tobytes() not in seen), None)
        if candidate is None:
            if moves == 1:
                break  # every neighbour was tried
            moves, refused = moves // 2, 0
            continue
        seen.add(candidate.tobytes())
        limits.spend()
        chosen = [batches[(turn + k) % len(batches)] for k in range(first)]
        rest = [batch for batch in batches if batch not in chosen]
        turn += first
        change = incumbent.difference(candidate, chosen)
        hopeless = bool(rest) and change.mean() >= 0
        if rest and not hopeless:
            change = np.concatenate([change, incumbent.difference(candidate, rest)])
        found = incumbent.loss + float(change.mean())
        accepted = not hopeless and change.mean() < 0
        if accepted:
            incumbent.move(candidate)
        refused = 0 if accepted else refused + 1
        trace.add("greedy", found, incumbent.loss)
    scorer.forget()
    return incumbent.life, incumbent.loss


class Exchanges:
    """Draws exchanges: an unimportant patch leaves earlier in favour of one that is more important or isolated.

    Args:
        importance: float [depth, patches].
    """

    def __init__(self, importance: np.ndarray, description: ModelSpec) -> None:
        self.log_importance = standard_log(importance)
        self.distance = np.sqrt(squared_distances(description.grid))
        np.fill_diagonal(self.distance, np.inf)

    def __call__(self, life: np.ndarray, moves: int, rng: np.random.Generator) -> np.ndarray:
        """`life` after up to `moves` exchanges of disjoint pairs: int64 [patches]."""
        life, free = life.copy(), np.ones(len(life), dtype=bool)
        for _ in range(moves):
            if not free.any() or life[free].min() == life[free].max():
                break
            short = np.flatnonzero(free & (life < life[free].max()))  # candidates for a longer life
            alive = life[None, :] > life[short, None]
            alone = np.where(alive, self.distance[short], np.inf).min(axis=1)
            j = _pick(short, np.exp(self.log_importance[life[short], short]) * alone, rng)
            longer = np.flatnonzero(free & (life > life[j]))
            i = _pick(longer, np.exp(-self.log_importance[life[j], longer]), rng)
            life[[i, j]] = life[[j, i]]
            free[[i, j]] = False
        return life


def _pick(items: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.choice(items, p=weights / weights.sum()))


def standard_log(importance: np.ndarray) -> np.ndarray:
    """Standardised log importance, float64 [depth, patches]: mean 0, deviation 1 over patches and blocks, clipped at 3.

    Blocks and patches differ by orders of magnitude; an importance of 0 stays finite.
    """
    values = np.asarray(importance, dtype=np.float64)
    logs = np.log(np.maximum(values, 1e-12 * max(float(values.max()), 1e-300)))
    return np.asarray(np.clip((logs - logs.mean()) / max(float(logs.std()), 1e-12), -3, 3))
