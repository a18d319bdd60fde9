"""Token Mask Search: lifetimes of minimal loss within a budget, under a diagonal model of the loss.

Let I[l, i] be the predicted loss if patch i is removed from block l on, and 0 if it is kept. With the patches in some
order and every block keeping a prefix of it, n_0 >= n_1 >= ... patches, the loss is a sum over blocks,

    sum_i I[life_i, i] = C_0[patches] + sum_l (C_{l+1}[n_l] - C_l[n_l]),    C_l[n]: the sum of I[l] over the first n,

so dynamic programming over (block, count, cost so far) finds the best counts. Given the counts, assigning lifetimes to
patches is an assignment problem. The two are solved in turn, each exactly, until neither improves.

The result is the exact optimum over all masks, up to the rounding of costs, if one order sorts I[l] - I[l+1] downwards
for every l (the last one being I[depth - 1]): every optimal assignment is then nested along it. Otherwise it is a local
optimum: it cannot be improved by exchanging lifetimes, or by other counts along its own order.

Source: the Fisher mask search of Kwon et al. 2022 (arXiv:2204.09656), with lifetimes in place of independent gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.searching.mask.encoding import counts_of, last_is_free

# Steps of the cost axis, from the cost of the cheapest counts to the budget: coarse first, then fine. The finer one is
# a multiple of the coarser one, so solutions within the budget remain so.
COARSE, FINE = 2048, 8192
MAX_ROUNDS = 50
MAX_BYTES = 1 << 29  # of the finer table


@dataclass(frozen=True)
class Costs:
    """Costs of a model by the number of patches in each block.

    Attributes:
        blocks: float64 [depth, patches + 1]: cost of block l with n patches (prefix tokens and pooling included);
            infinite if unknown, in which case the count is never chosen.
        embed: float64 [patches + 1]: cost of embedding n patches.
        fixed: Constant cost.
        unit: "MACs" or "ms".
        dense_extra: Cost of the dense model beyond that of a plan that keeps every patch.

    Raises:
        SearchError: if shapes do not match, or costs are NaN or negative.
    """

    blocks: np.ndarray
    embed: np.ndarray
    fixed: float
    unit: str
    dense_extra: float = 0.0

    def __post_init__(self) -> None:
        if self.blocks.ndim != 2 or self.embed.shape != self.blocks.shape[1:] or self.blocks.shape[1] < 2:
            raise SearchError(
                f"costs of shape {list(self.blocks.shape)} and {list(self.embed.shape)}",
                expected="[depth, patches + 1] and [patches + 1]",
            )
        if not all(bool((part >= 0).all()) for part in (self.blocks, self.embed, np.asarray(self.fixed))):
            raise SearchError("a cost is NaN or negative", expected="costs from 0")

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def patches(self) -> int:
        return self.blocks.shape[1] - 1

    @property
    def dense(self) -> float:
        """Cost of the dense model."""
        return self.total([self.patches] * self.depth) + self.dense_extra

    def total(self, counts: Sequence[int]) -> float:
        """Cost for the patches in each block [depth]."""
        return float(self.fixed + self.embed[counts[0]] + self.blocks[np.arange(self.depth), np.asarray(counts)].sum())


@dataclass(frozen=True)
class Found:
    """Result of a mask search.

    Attributes:
        life: int64 [patches], number of blocks in which each patch is kept (vp_exporter.searching.mask.encoding).
        counts: Patches in each block.
        predicted_loss: Sum of I[life_i, i].
        cost: In the unit of the costs; at most the budget.
    """

    life: np.ndarray
    counts: tuple[int, ...]
    predicted_loss: float
    cost: float


def macs_costs(description: ModelSpec) -> Costs:
    """Multiply-accumulates per image, as counted by vp_exporter.plan.macs for plans of `encoding.plan_of`."""
    patches = np.arange(description.patches + 1, dtype=np.float64)
    tokens = patches + description.prefix_tokens
    blocks = np.stack(
        [
            tokens * (block.attention_linear + block.mlp_linear) + 2 * tokens**2 * block.attention_width
            for block in description.blocks
        ]
    )
    saved = np.zeros_like(patches)
    if last_is_free(description):
        saved = np.maximum(patches - 1, 0) * description.blocks[-1].mlp_linear
        blocks[-1] -= saved
    fixed, per_token = description.head_macs
    blocks[-1] += (tokens if description.pool_include_prefix else patches) * per_token
    return Costs(blocks, patches * description.patch_embed_macs, float(fixed), "MACs", float(saved[-1]))


def search_lifetimes(
    importance: np.ndarray,
    costs: Costs,
    budget: float,
    *,
    min_tokens: int = 8,
    multiple: int = 1,
    first_block_only: bool = False,
) -> Found:
    """Find the lifetimes of minimal predicted loss within a budget.

    Args:
        importance: float64 [depth, patches], I[l, i] as above; need not decrease with l.
        costs: Costs of the same model.
        budget: Maximum cost of the plan, in the unit of `costs`.
        min_tokens: Minimum number of patches in every block, 1 or more (not counting prefix tokens).
        multiple: Every count is a multiple of it, or all patches.
        first_block_only: Use one set of patches for all blocks; the result is then the exact optimum.

    Returns:
        The result, never above the budget: costs are rounded up, to (budget - cheapest) / 8192 per block. Takes about a
        second at 12 blocks and 196 patches.

    Raises:
        SearchError: if importance is not finite or has another shape, the budget cannot be reached or is met by the
            dense model, or min_tokens or multiple is out of range.
    """
    importance = np.asarray(importance, dtype=np.float64)
    allowed = _check(importance, costs, budget, min_tokens, multiple)
    # Block 0 includes the cost of the embedding; counts that are not allowed have infinite cost.
    price = np.where(allowed, costs.blocks, np.inf)
    price[0] += costs.embed
    if first_block_only:
        price = np.where(np.isfinite(price).all(axis=0), price, np.inf)
    cheapest = _equal_counts(price) if first_block_only else _cheapest_counts(price)
    least = np.inf if cheapest is None else costs.total(cheapest)
    if cheapest is None or budget < least:
        raise SearchError(
            f"a budget of {_share(budget, costs)} cannot be reached",
            expected=f"{_share(least, costs, up=True)} or more with at least {min_tokens} patches a block"
            + (f" in multiples of {multiple}" if multiple > 1 else ""),
            fix="lower `min_tokens`" + (" or the multiple" if multiple > 1 else "") + ", or raise the budget",
        )
    if first_block_only:
        return _one_set(importance, costs, price, budget)

    found = _assign(importance, costs, cheapest)
    for start in (importance[0], importance.mean(axis=0), importance[-1]):
        order = np.argsort(-start, kind="stable")
        candidate = _refine(importance, costs, price, budget, order, COARSE)
        if candidate is not None and candidate.predicted_loss < found.predicted_loss:
            found = candidate
    steps = FINE
    while steps > COARSE and steps * price.size * 8 > MAX_BYTES:
        steps //= 2
    finer = _refine(importance, costs, price, budget, _order_of(importance, found.life), steps)
    return finer if finer is not None and finer.predicted_loss < found.predicted_loss else found


def _check(importance: np.ndarray, costs: Costs, budget: float, min_tokens: int, multiple: int) -> np.ndarray:
    """Check the arguments; returns bool [patches + 1], the allowed counts."""
    depth, patches = costs.depth, costs.patches
    if importance.shape != (depth, patches):
        raise SearchError(
            f"importance of shape {list(importance.shape)}", expected=f"[{depth}, {patches}], blocks and patches"
        )
    if not np.isfinite(importance).all():
        block, patch = np.argwhere(~np.isfinite(importance))[0]
        raise SearchError(
            f"the importance of patch {patch} in block {block} is {importance[block, patch]}",
            expected="finite numbers",
            fix="check the weights and the calibration images; run the search in fp32",
        )
    if not 1 <= min_tokens <= patches:
        raise SearchError(
            f"at least {min_tokens} patches a block", expected=f"1 to {patches}, the model's patches",
            fix="change `min_tokens`",
        )  # fmt: skip
    if multiple < 1:
        raise SearchError(f"counts in multiples of {multiple}", expected="1 or more")
    if not budget < costs.dense:  # also catches NaN
        raise SearchError(
            f"a budget of {_share(budget, costs)} leaves nothing to remove",
            expected=f"less than the dense model's {costs.dense:.6g} {costs.unit}", fix="lower the budget",
        )  # fmt: skip
    counts = np.arange(patches + 1)
    return (counts >= min_tokens) & ((counts % multiple == 0) | (counts == patches))


def _share(cost: float, costs: Costs, *, up: bool = False) -> str:
    """Format a cost and its share of the dense model's; `up` rounds up, so that the printed share suffices."""
    share = cost / costs.dense
    if np.isfinite(share):
        share = np.ceil(share * 1000) / 1000 if up else round(share, 4)
    return f"{cost:.6g} {costs.unit} ({share:g} of dense)"


def _cheapest_counts(price: np.ndarray) -> tuple[int, ...] | None:
    """Non-increasing counts of minimal cost, or None. Measured costs need not increase with n."""
    spent = np.empty_like(price)
    least = np.zeros(price.shape[1])
    for block, row in enumerate(price):
        spent[block] = row + least
        least = np.minimum.accumulate(spent[block, ::-1])[::-1]
    n, counts = 0, []
    for row in spent[::-1]:
        n += int(np.argmin(row[n:]))
        counts.append(n)
    return tuple(reversed(counts)) if np.isfinite(spent[-1]).any() else None


def _equal_counts(price: np.ndarray) -> tuple[int, ...] | None:
    """The cheapest single count for all blocks, or None."""
    total = price.sum(axis=0)
    return (int(np.argmin(total)),) * len(price) if np.isfinite(total).any() else None


def _one_set(importance: np.ndarray, costs: Costs, price: np.ndarray, budget: float) -> Found:
    """One set for all blocks: with n patches it consists of the n of largest I[0], so every n is tried."""
    depth, patches = importance.shape
    order = np.argsort(-importance[0], kind="stable")
    best: Found | None = None
    for n in np.flatnonzero(np.isfinite(price).all(axis=0)).tolist():
        cost, loss = costs.total([n] * depth), float(importance[0, order[n:]].sum())
        if cost <= budget and (best is None or loss < best.predicted_loss):
            life = np.zeros(patches, dtype=np.int64)
            life[order[:n]] = depth
            best = Found(life, (n,) * depth, loss, cost)
    assert best is not None  # the cheapest count is within the budget
    return best


def _refine(
    importance: np.ndarray, costs: Costs, price: np.ndarray, budget: float, order: np.ndarray, steps: int
) -> Found | None:
    """Alternate between counts for an order, lifetimes for the counts, and an order for the lifetimes."""
    best: Found | None = None
    for _ in range(MAX_ROUNDS):
        # Tolerate rounding first, so that counts that just fit are kept; be strict if their sum exceeds the budget.
        for last_bit in (1 - 1e-12, 1 + 1e-12):
            counts = _best_counts(importance, price, budget - costs.fixed, order, steps, last_bit)
            if counts is None or costs.total(counts) <= budget:
                break
        if counts is None or costs.total(counts) > budget:
            break
        found = _assign(importance, costs, counts)
        if best is not None and found.predicted_loss >= best.predicted_loss - 1e-12 * abs(best.predicted_loss):
            break
        best, order = found, _order_of(importance, found.life)
    return best


def _best_counts(
    importance: np.ndarray, price: np.ndarray, budget: float, order: np.ndarray, steps: int, last_bit: float
) -> tuple[int, ...] | None:
    """Exact counts of minimal loss for nested prefixes of an order; None if rounding leaves no room.

    Only the cost of a block above its cheapest count is rounded (up), so that tight budgets stay feasible.
    """
    depth, width = price.shape
    base = price.min(axis=1)
    unit = (budget - base.sum()) / steps
    above = price - base[:, None]
    if not unit > 0:
        units = np.where(above == 0, 0.0, np.inf)
    else:
        units = np.ceil(above / unit * last_bit)
    cumulated = np.zeros((depth + 1, width))  # C_l[n]; C_depth is 0: patches that are never dropped cost nothing
    np.cumsum(importance[:, order], axis=1, out=cumulated[:depth, 1:])
    gain = cumulated[1:] - cumulated[:-1]
    # loss[block][n, c]: of the blocks up to this one, which keeps n patches, within c cost units.
    loss = np.full((depth, width, steps + 1), np.inf)
    for block in range(depth):
        # Minimum over the previous block's counts that are at least this one; all patches enter block 0.
        least = np.full(steps + 1, 0.0 if block == 0 else np.inf)
        for n in range(width - 1, -1, -1):
            if block > 0:
                np.minimum(least, loss[block - 1, n], out=least)
            if units[block, n] <= steps:
                used = int(units[block, n])
                np.add(least[: steps + 1 - used], gain[block, n], out=loss[block, n, used:])
    left, n, counts = steps, 0, []
    for block in range(depth - 1, -1, -1):
        n += int(np.argmin(loss[block, n:, left]))
        if not np.isfinite(loss[block, n, left]):
            return None
        counts.append(n)
        left -= int(units[block, n])
    return tuple(reversed(counts))


def _assign(importance: np.ndarray, costs: Costs, counts: tuple[int, ...]) -> Found:
    """Lifetimes of minimal loss with these counts."""
    depth, patches = importance.shape
    leaving = -np.diff([patches, *counts, 0])  # number of patches that live 0, 1, .. depth blocks
    slots = np.repeat(np.arange(depth + 1), leaving)
    by_life = np.vstack([importance, np.zeros(patches)])
    _, taken = linear_sum_assignment(by_life[slots].T)
    life = slots[taken].astype(np.int64)
    assert counts_of(life, depth) == tuple(counts)
    return Found(life, tuple(counts), float(by_life[life, np.arange(patches)].sum()), costs.total(counts))


def _order_of(importance: np.ndarray, life: np.ndarray) -> np.ndarray:
    """An order whose prefixes give these lifetimes; among equals, those that gain most from a longer life first."""
    depth, patches = importance.shape
    by_life, at = np.vstack([importance, np.zeros(patches)]), np.arange(patches)
    slope = by_life[np.maximum(life - 1, 0), at] - by_life[np.minimum(life + 1, depth), at]
    return np.lexsort((-slope, -life))
