"""The oracles against cases calculated by hand from docs/reducers.md.

Unless stated otherwise there is one class token (index 0), so patch token j has position j - 1 in the grid.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.exporter.reducers.oracles import ORACLES, Image, bat, diffrate, evit, gtp, pitome, ppt, tome, topk


def case(x, *, c=None, keys=None, values=None, size=None, prefix=1, grid=(1, 64), attention=None) -> Image:
    """An image of one head. x: of all tokens, [N, D] or [N]; c (class attention), keys and values: of patch tokens."""
    x = np.array(x, dtype=float)
    x = x[:, None] if x.ndim == 1 else x
    n = len(x) - prefix
    if attention is None:
        attention = np.full((len(x), len(x)), 1 / len(x))
        if c is not None:
            attention[0] = [0.0] * prefix + list(c)
    head = [
        np.vstack([np.full((prefix, len(rows[0])), 7.0), rows]) for rows in (keys or np.eye(n), values or np.eye(n))
    ]
    return Image(
        x, np.ones(len(x)) if size is None else np.array(size, dtype=float), np.arange(n), prefix, grid,
        np.array(attention, dtype=float).reshape(-1, len(x), len(x)), head[0][None], head[1][None],
    )  # fmt: skip


def check(result, x, size, positions) -> None:
    """Check against x [N', D] (or one number per row), sizes and positions."""
    x = np.array(x, dtype=float)
    np.testing.assert_allclose(result[0], x[:, None] if x.ndim == 1 else x, atol=1e-12)
    np.testing.assert_allclose(result[1], size, atol=1e-12)
    assert result[2].tolist() == positions


# A = {2, 4}, B = {1, 3}. cos(2, .) = .6 and .8, cos(4, .) = 1 and 0.
FOUR_KEYS = [[1, 0], [3, 4], [0, 1], [5, 0]]


def test_tome_merges_the_best_pair_by_size() -> None:
    image = case([[9, 9], [2, 0], [4, 4], [5, 5], [6, 4]], keys=FOUR_KEYS, size=[1, 1, 2, 1, 3])
    check(tome(image, 1), [[9, 9], [4, 4], [5, 3], [5, 5]], [1, 2, 4, 1], [1, 0, 2])
    assert image.margin == pytest.approx(0.2)  # 4 was chosen with 1, 2 not chosen with 0.8


def test_tome_shares_a_partner_and_gives_ties_to_the_lowest() -> None:
    # 2 and 4 are exactly equally close to 1 and 3; both go to 1. 6 stays although it ties with them.
    image = case(range(7), keys=[[1, 0]] * 6)
    check(tome(image, 2), [0, 6, (1 + 2 + 4) / 3, 3, 5], [1, 1, 3, 1, 1], [5, 0, 2, 4])
    assert image.margin == math.inf


@pytest.mark.parametrize(("prefix", "positions"), [(0, [2, 1, 3]), (1, [1, 0, 2]), (2, [2, 1, 3])])
def test_tome_counts_positions_with_the_prefix(prefix: int, positions: list[int]) -> None:
    """Even places of the whole sequence are A: with 0 or 2 prefix tokens that includes the first patch."""
    merged_first = [[1, 0], [1, 0], [0, 1], [1, -9]]
    keys = merged_first if prefix != 1 else FOUR_KEYS
    assert tome(case(range(prefix + 4), keys=keys, prefix=prefix), 1)[2].tolist() == positions


def test_ppt_chooses_by_the_variance() -> None:
    """s = .1, .2, .3, .4 with variance .05 / 3, for any sum of c."""
    tokens = {"x": [9, 1, 2, 3, 4], "c": [0.1, 0.1, 0.1, 0.05], "values": [[1], [-2], [3], [8]], "keys": FOUR_KEYS}
    pruning = case(**tokens, size=[1, 1, 1, 5, 1])
    check(ppt(pruning, 2, tau=0.016), [9, 3, 4], [1, 5, 1], [2, 3])
    assert pruning.margin == pytest.approx((0.05 / 3 - 0.016) / (0.05 / 3))
    merging = case(**tokens)
    check(ppt(merging, 1, tau=0.017), [9, 2, 2.5, 3], [1, 1, 2, 1], [1, 0, 2])
    check(ppt(case([9, 1], c=[0.5], keys=[[1]], values=[[1]]), 0, tau=0.0), [9, 1], [1, 1], [0])  # n = 1: V = 0


def test_evit_fuses_without_normalising() -> None:
    tokens = {"x": [9, 1, 2, 3, 4], "c": [0.1, 0.4, 0.2, 0.3], "size": [1, 1, 1, 2, 1]}
    check(evit(case(**tokens), 3, fuse=False), [9, 2, 4], [1, 1, 1], [1, 3])
    image = case(**tokens)
    check(evit(image, 4, fuse=True), [9, 2, 4, 0.1 * 1 + 0.2 * 3], [1, 1, 1, 3], [1, 3, 0])
    assert image.margin == pytest.approx((0.3 - 0.2) / 0.3)


def test_topk_scores_and_averages_heads() -> None:
    tokens = {"x": [9, 1, 2, 3], "c": [0.3, 0.2, 0.1], "values": [[3, 4], [0, 10], [0, 10]]}
    check(topk(case(**tokens), 3, "class"), [9, 1, 2], [1] * 3, [0, 1])
    check(topk(case(**tokens), 2, "ats"), [9, 2], [1] * 2, [1])  # 1.5, 2.0, 1.0
    check(topk(case([9, 1, 2, 3], c=[0.25] * 3), 3, "class"), [9, 1, 2], [1] * 3, [0, 1])
    two_heads = np.zeros((2, 3, 3))
    two_heads[:, 0] = [[0, 0.6, 0.4], [0, 0.1, 0.9]]
    check(topk(case([9, 1, 2], attention=two_heads), 2, "class"), [9, 2], [1] * 2, [1])
    image = case([9, 1, 2], attention=two_heads)
    image.values = np.array([[[0, 0], [3, 0], [0, 0]], [[0, 0], [0, 4], [0, 0]]], dtype=float)
    assert image.value_norm(1) == 5  # heads are concatenated


def test_diffrate_prunes_then_merges_by_similarity() -> None:
    # By c: 1, 2, 4, 3, 5. 5 is dropped; 4 and 3 are sources; 1 and 2 stay.
    x = [[9, 9], [2, 0], [0, 1], [-1, -1], [3, 4], [8, 8]]
    image = case(x, c=[0.3, 0.25, 0.15, 0.2, 0.1], size=[1, 1, 2, 1, 5, 1])
    # cos(4, 1) = .6, cos(4, 2) = .8: 4 contributes 5 * .8 = 4 to token 2. 3 is opposite to both, contributing nothing.
    check(diffrate(image, 5, 3), [[9, 9], [2, 0], [3 * 4 / 6, (2 * 1 + 4 * 4) / 6]], [1, 1, 6], [0, 1])


SIX = {
    "x": [[9, 9], [1, 0], [3, 0], [0, 0], [3, 4], [4, 0], [0, 1]],
    "c": [0.3, 0.1, 0.02, 0.2, 0.06, 0.15],
}


def test_bat_by_hand() -> None:
    """Attentive 1, 2, 4, 6: A = 1, 4 and B = 2, 6; 1 is parallel to 2, 4 closest to 6 (.8). Inattentive 3, 5."""
    image = case(**SIX, size=[1, 1, 1, 2, 1, 1, 1])
    check(
        bat(image, 5, clusters=1, pairs=1),
        [[9, 9], [3, 4], [(0.3 * 1 + 0.1 * 3) / 0.4, 0], [0, 1], [0.06 * 4 / 0.08, 0]],
        [1, 1, 2, 1, 3],
        [3, 1, 5, 2],  # 3 and 5 are equally dense, so 3 is the centre
    )
    by_size = bat(case(**SIX, size=[1, 1, 1, 3, 1, 1, 1]), 5, clusters=1, pairs=1, weights="size")
    np.testing.assert_allclose(by_size[0], [[9, 9], [3, 4], [2, 0], [0, 1], [1, 0]])


def test_bat_takes_disjoint_pairs_first_then_thirds() -> None:
    """A = 1, 3, 5: 1 and 3 have partner 2, with .6 and .8; 5 has partner 6, with .5. So 3, then 5, then 1."""
    x = [[9, 9, 9], [3, 0, -4], [5, 0, 0], [4, 0, -3], [0, 5, 0], [0, 0, 3], [0, 3**0.5, 1]]
    tokens = {"x": x, "c": [0.1] * 6}
    check_positions = {1: [0, 4, 1, 3, 5], 2: [0, 1, 3, 5], 3: [1, 3, 5]}
    for pairs, positions in check_positions.items():
        image = case(**tokens)
        assert bat(image, 7 - pairs, clusters=0, pairs=pairs)[2].tolist() == positions
    assert image.margin > 0


def test_bat_without_pairs_leaves_the_attentive_ascending() -> None:
    image = case(**SIX)  # attentive 1, 2, 4, 6; the cluster of 3 and 5
    check(bat(image, 6, 1, 0), [[9, 9], [1, 0], [3, 0], [3, 4], [0, 1], [0.06 * 4 / 0.08, 0]], [1] * 5 + [2],
          [0, 1, 3, 5, 2])  # fmt: skip


def test_bat_centres_are_dense_and_far_apart() -> None:
    """On a line at 0, .1, .2, 1: .2 is the densest; 1 is far from all; 0 and .1 have a denser neighbour at .1."""
    image = case([0, 0, 0.1, 0.2, 1], c=[0.1] * 4)
    check(bat(image, 3, clusters=2, pairs=0), [0, 0.1, 1], [1, 3, 1], [2, 3])
    far = case([0, 0, 100, 200, 1000], c=[0.1] * 4)  # rho underflows unless kept as a logarithm
    assert bat(far, 3, clusters=2, pairs=0)[2].tolist() == [1, 2]
    # 1 and 10 are equally dense: the first of them counts as denser, so its delta is 10, the other's 9.
    assert bat(case([0, 0, 1, 10, 11], c=[0.1] * 4), 2, clusters=1, pairs=0)[2].tolist() == [1]


def test_pitome_energy_by_hand() -> None:
    """Keys right, right, up, left; margin .5. The two equal ones have the highest energy, exactly the same."""
    image = case(range(5), keys=[[1, 0], [1, 0], [0, 1], [-1, 0]], size=[1, 1, 3, 1, 1])
    check(pitome(image, 1, margin=0.5), [0, 3, 4, (1 * 1 + 3 * 2) / 4], [1, 1, 1, 4], [2, 3, 1])
    half, right, away = 0.5, math.exp(-0.5) - 1, math.exp(-1.5) - 1
    first = (half + half + right + away) / 4
    third = (right + right + half + right) / 4
    assert image.margin == pytest.approx(first - third)


def test_pitome_alternates_by_rank() -> None:
    """Energies fall with the distance from token 3's direction: ranks 3, 4, 1, 2 give a = 3, 1 and b = 4, 2."""
    angles = [-25, 40, 0, -10]
    keys = [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles]
    result = pitome(case(range(5), keys=keys), 2, margin=0.0)
    check(result, [0, (4 + 3 + 1) / 3, 2], [1, 3, 1], [3, 1])


def test_pitome_partner_ties_go_to_the_lowest_rank() -> None:
    """By energy 2, 3, 4 (zero, similar to none) and 1. So b = 3, 1, and 4 goes to the first: they tie."""
    image = case([0, 1, 2, 3, 5], keys=[[-1, 0], [1, 0], [1, 0], [0, 0]])
    check(pitome(image, 2, margin=-1.25), [0, (2 + 3 + 5) / 3, 1], [1, 3, 1], [2, 0])


def test_gtp_spatial() -> None:
    c = np.ones(9)
    c[4] = 0.1
    x = [50, *range(9)]
    result = gtp(case(x, c=c, grid=(3, 3)), 1, alpha=0.5, neighbours=1, graph="spatial")
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    check(result, [50, *[j + 0.5 * 4 / 8 for j in others]], [1, *[1 + 0.5 / 8] * 8], others)
    c[4], c[2] = 1, 0.1  # a corner (2) has three neighbours: 1, 4, 5; rows do not wrap around to 3
    result = gtp(case(x, c=c, grid=(3, 3)), 1, alpha=0.5, neighbours=1, graph="spatial")
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    check(result, [50, *[j + (1 / 3 if j in (1, 4, 5) else 0) for j in kept]],
          [1, *[1 + (1 / 6 if j in (1, 4, 5) else 0) for j in kept]], kept)  # fmt: skip


def test_gtp_semantic_and_mixed() -> None:
    tokens = {
        "x": [50, 1, 2, 3, 4],
        "c": [0.4, 0.3, 0.2, 0.1],
        "keys": [[1, 0], [0, 1], [1, 0], [3, 1]],
        "grid": (1, 4),
    }
    check(gtp(case(**tokens), 1, 1.0, 2, graph="semantic"), [50, 3, 2, 5], [1, 1.5, 1, 1.5], [0, 1, 2])
    # 1 and 3 are equally close to 4: both are its neighbours, although one was requested.
    check(gtp(case(**tokens), 1, 1.0, 1, graph="semantic"), [50, 3, 2, 5], [1, 1.5, 1, 1.5], [0, 1, 2])
    tokens["keys"][2] = [1, -1]  # now only 1 is similar; 3 is adjacent in space
    check(gtp(case(**tokens), 1, 1.0, 1, graph="semantic"), [50, 5, 2, 3], [1, 2, 1, 1], [0, 1, 2])
    check(gtp(case(**tokens), 1, 1.0, 1), [50, 3, 2, 5], [1, 1.5, 1, 1.5], [0, 1, 2])
    # 4 (dropped) has no neighbour left in space: its content is lost.
    check(gtp(case(**tokens), 2, 1.0, 1, graph="spatial"), [50, 1, 2 + 3], [1, 1, 2], [0, 1])


def test_gtp_graph_score_takes_each_maximum_over_heads_alone() -> None:
    """1 scores .6 (head 0) * .9 (head 1), 2 scores .5 * 1.0, 3 scores .4 * 1.9 (both head 1)."""
    heads = np.zeros((2, 4, 4))
    heads[0, 1, 1], heads[0, 2, 2], heads[0, 3, 3] = 0.6, 0.3, 0.2
    heads[1, :, 1], heads[1, :, 2] = [0.3, 0.1, 0.3, 0.2], [0.1, 0.2, 0.5, 0.2]
    heads[1, :, 3] = [0.6, 0.7, 0.2, 0.4]
    image = case([9, 1, 2, 3], attention=heads, grid=(1, 3))
    assert gtp(image, 2, 0.0, 1, score="graph")[2].tolist() == [2]
    image = case([9, 1, 2, 3], attention=heads, grid=(1, 3))
    assert gtp(image, 1, 0.0, 1, score="graph")[2].tolist() == [0, 2]


FIELDS = {
    "tome": {"r": 5},
    "ppt": {"r": 5, "tau": 1.0},
    "evit": {"tokens_out": 9, "fuse": True},
    "topk": {"tokens_out": 9, "score": "ats"},
    "diffrate": {"prune_to": 11, "merge_to": 9},
    "bat": {"tokens_out": 9, "clusters": 2, "pairs": 2, "weights": "size"},
    "pitome": {"r": 5, "margin": 0.4},
    "gtp": {"r": 5, "alpha": 0.3, "score": "graph", "neighbours": 2},
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reducer", ORACLES)
def test_on_noise(reducer: str, seed: int) -> None:
    """Counts, prefix, sizes and hull, for reducers that preserve them."""
    rng = np.random.default_rng(seed)
    n, prefix, heads, width = 12, 2, 3, 4
    total = prefix + n
    attention = rng.exponential(size=(heads, total, total))
    image = Image(
        rng.normal(size=(total, 5)), np.array([1.0] * prefix + list(rng.integers(1, 4, n))), rng.permutation(16)[:n],
        prefix, (4, 4), attention / attention.sum(-1, keepdims=True), rng.normal(size=(heads, total, width)),
        rng.normal(size=(heads, total, width)),
    )  # fmt: skip
    before = image.x.copy(), image.size.copy()
    x, size, positions = ORACLES[reducer](image, **FIELDS[reducer])
    assert 0 < image.margin < math.inf
    np.testing.assert_array_equal(image.x, before[0])
    np.testing.assert_array_equal(image.size, before[1])
    assert len(x) == len(size) == prefix + len(positions) == 9
    np.testing.assert_array_equal(x[:prefix], image.x[:prefix])
    assert len(set(positions)) == len(positions)
    assert set(positions) <= set(image.positions)
    if reducer in ("tome", "ppt", "pitome", "bat", "evit"):  # nothing is lost (ppt merges at this tau)
        assert size.sum() == pytest.approx(image.size.sum())
    if reducer in ("tome", "ppt", "pitome"):  # the weighted mean is preserved
        np.testing.assert_allclose((size[:, None] * x).sum(0), (image.size[:, None] * image.x).sum(0))
    if reducer not in ("evit", "gtp"):
        patches = image.x[prefix:]
        assert (x[prefix:] >= patches.min(0) - 1e-12).all()
        assert (x[prefix:] <= patches.max(0) + 1e-12).all()
