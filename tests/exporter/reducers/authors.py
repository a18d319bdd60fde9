"""Reducers of five papers as their authors compute them, for one image, in float64, independent of the exporter.

Written from the papers and from reading the authors' released code as facts:
PiToMe (arXiv 2405.16148, github.com/hchautran/PiToMe), DiffRate (arXiv 2305.17997, github.com/OpenGVLab/DiffRate),
GTP-ViT (arXiv 2311.03035, github.com/Ackesnal/GTP-ViT), PPT (arXiv 2310.01812, github.com/xjwu1024/PPT) and
ToMe (arXiv 2210.09461, github.com/facebookresearch/ToMe). Where a paper and its code differ, this follows the code's
evaluation of a pretrained DeiT, and a comment says so.

Every reducer takes an `Image` and returns (x [N', D], size [N'], positions [n']): prefix tokens first, then the patch
tokens in the order of the authors' code. A merge target keeps its own position. Counts (`r`, `keep`, `prune_to`,
`merge_to`) are counts of patch tokens: prefix tokens, of which the authors mostly have one, are neither reduced nor
counted. Reducing by 0 returns the tokens unchanged, except that `diffrate` still sorts. `diffrate` and PPT's pruning
need a class token.

`image.margins` receives the relative gap of every decision that affects the result, its order included; 0 is a tie,
which the authors' sorts may break either way.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from tests.exporter.reducers.oracles import Image

Reduced = tuple[np.ndarray, np.ndarray, np.ndarray]

# The paper, like ToMe's, adds log(size) to the attention's logits; algo/pitome/patch/timm.py calls the attention
# without sizes (and apply_patch's prop_attn defaults to False), so their evaluation has no proportional attention.
PITOME_PROPORTIONAL_ATTENTION = False
# algo/pitome/patch/deit.py; 0.9 in the paper (and in aug.py).
PITOME_FIRST_MARGIN = 0.75

# DiffRate/patch/deit.py: always on, with the sizes that `diffrate` returns.
DIFFRATE_PROPORTIONAL_ATTENTION = True

# GTP-ViT, defaults of main.py. README.md tunes sparsity and alpha for each r (DeiT-B: 0.5 to 1, 0.1 to 0.4).
GTP_ALPHA = 0.1
GTP_NEIGHBOURS = 8
GTP_THETA = 1.0  # `sparsity`: share of the attention that is kept; 1 keeps all
# main.py's flag --token_scale is off by default; README.md's results use it.
GTP_PROPORTIONAL_ATTENTION = True

# PPT, main.py: --prop_attn is a store_false flag, so on by default. The threshold is README.md's for DeiT-S.
PPT_PROPORTIONAL_ATTENTION = True
PPT_THRESHOLD = 7e-5

# ToMe, tome/patch/timm.py: on for pretrained models.
TOME_PROPORTIONAL_ATTENTION = True


def relative_gap(larger: float, smaller: float) -> float:
    """Difference of two scores, relative to the larger magnitude."""
    return abs(larger - smaller) / max(abs(larger), abs(smaller), 1e-30)


def descending(scores: Sequence[float] | np.ndarray, margins: list[float], settled: int | None = None) -> list[int]:
    """Indices in descending order of score.

    settled: number of leading places whose order matters; None for all.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    gaps = [relative_gap(scores[a], scores[b]) for a, b in itertools.pairwise(order)]
    margins.extend(gaps[:settled])
    return order


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


def partners(sources: list[int], targets: list[int], features: np.ndarray) -> dict[int, tuple[int, float, float]]:
    """Most similar target of every source by cosine: source -> (target, cosine, margin over the second best)."""
    found = {}
    for source in sources:
        scores = {target: cosine(features[source], features[target]) for target in targets}
        order = sorted(targets, key=lambda target: -scores[target])
        margin = relative_gap(scores[order[0]], scores[order[1]]) if len(order) > 1 else math.inf
        found[source] = (order[0], scores[order[0]], margin)
    return found


def tokens(image: Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 copies of x and size, and the position of every token (-1 for a prefix token)."""
    position = np.concatenate([np.full(image.prefix, -1), image.positions]).astype(np.int64)
    return image.x.astype(np.float64), image.size.astype(np.float64), position


def unchanged(image: Image) -> Reduced:
    """Result if nothing is to be reduced."""
    x, size, position = tokens(image)
    return x, size, position[image.prefix :]


def weighted_merge(image: Image, into: dict[int, int], order: list[int]) -> Reduced:
    """Mean, weighted by size, of each token and those merged into it (ToMe, section 3, "tracking token size").

    into: token index -> index of the token that it is merged into. order: indices of the remaining tokens.
    """
    x, size, position = tokens(image)
    rows, sizes = [], []
    for token in order:
        group = [token] + [source for source, target in into.items() if target == token]
        total = sum(size[member] for member in group)
        rows.append(sum(x[member] * size[member] for member in group) / total)
        sizes.append(total)
    return np.stack(rows), np.array(sizes), position[order][image.prefix :]


def mean_keys(image: Image) -> np.ndarray:
    """Features of the similarity [N, d_h]: keys averaged over heads (returned by ToMe's and PiToMe's attention)."""
    return image.keys.astype(np.float64).mean(axis=0)


# --- PiToMe ----------------------------------------------------------------------------------------------------------


def pitome_margin(block: int, depth: int) -> float:
    """Margin of the energy in block `block` (0-based): falls in equal steps (paper, section 3.2; patch/deit.py).

    The paper has 0.9 - 0.9 l/L, patch/deit.py and patch/mae.py 0.75 - 0.75 l/L.
    """
    return PITOME_FIRST_MARGIN - PITOME_FIRST_MARGIN * (block / depth)


def pitome_half(block: int, depth: int) -> str:
    """Algorithm of block `block`: "first" in the first half of the depth, rounded up (patch/deit.py).

    Reversed in patch/mae.py; the paper's algorithm 1 is "second" in every block.
    """
    return "first" if block < math.ceil(depth * 0.5) else "second"


def pitome(image: Image, r: int, margin: float, half: str) -> Reduced:
    """PiToMe: merges r patch tokens, ranked by energy (section 3.2, equation 4; algo/pitome/merge.py pitome_vision).

    The energy of a token is the mean over all patch tokens, itself included, of f(cosine of their mean keys), with
    f(s) = s - margin above the margin and exp(s - margin) - 1 below: ELU with alpha 1. (The paper's f(s) is s above the
    margin, not s - margin, which gives other ranks.)

    half: "first" is pitome_bsm: tokens alternate by energy rank between A and B, and the r tokens of A with the most
    similar partner in B are merged into it. Output: the rest of A by descending similarity to its partner, then B by
    descending energy. "second" is pitome: only the 2r tokens of highest energy may merge; they alternate between A and
    B, and all of A merges into B. Output: the protected tokens by descending energy, then B by descending energy.

    r: at most half of the patch tokens. The authors take r = floor(n - n * ratio).
    """
    if r <= 0:
        return unchanged(image)
    keys = mean_keys(image)
    patches = list(range(image.prefix, len(image.x)))
    energy = np.zeros(len(patches))
    for row, i in enumerate(patches):
        for j in patches:
            s = cosine(keys[i], keys[j]) - margin
            energy[row] += (s if s > 0 else math.exp(s) - 1.0) / len(patches)
    ranked = [patches[row] for row in descending(energy, image.margins)]

    candidates = ranked if half == "first" else ranked[: 2 * r]
    set_a, set_b = candidates[0::2], candidates[1::2]
    found = partners(set_a, set_b, keys)
    if half == "first":
        gaps: list[float] = []
        falling = [set_a[row] for row in descending([found[a][1] for a in set_a], gaps)]
        image.margins.extend(gaps[r - 1 :])  # the order among the merged ones does not matter
        merged, rest = falling[:r], falling[r:]
    else:
        merged, rest = set_a, ranked[2 * r :]
    image.margins.extend(found[a][2] for a in merged)
    into = {a: found[a][0] for a in merged}
    return weighted_merge(image, into, [*range(image.prefix), *rest, *set_b])


# --- DiffRate --------------------------------------------------------------------------------------------------------


def diffrate(image: Image, prune_to: int, merge_to: int) -> Reduced:
    """DiffRate: sorts the patch tokens, prunes to `prune_to`, then merges to `merge_to` (section 3, figure 3).

    As in the evaluation branch of DiffRate/patch/deit.py: patch tokens are sorted by the class token's attention to
    them, averaged over heads, even if nothing is reduced. The least attended are dropped; of the rest, each of the
    least attended is merged into the most similar (cosine of x itself) of the `merge_to` most attended ones. Output: by
    descending class attention.

    A target becomes the unweighted mean of itself and its sources. Its size grows by each source's size times their
    similarity, and may thus be less than the number of patches it stands for (an addition of the code, for proportional
    attention; training, but not evaluation, also clamps this product at 1).

    prune_to, merge_to: patch tokens kept; the authors' numbers (compression_rate.json) also count the class token. As
    in their code, a number larger than the tokens left has no effect, and merge_to >= prune_to merges nothing.
    """
    x, size, position = tokens(image)
    p = image.prefix
    importance = image.attention.astype(np.float64)[:, 0, p:].mean(axis=0)
    ranked = [p + row for row in descending(importance, image.margins, prune_to)][:prune_to]
    kept, sources = ranked, []
    if merge_to < prune_to:
        kept, sources = ranked[:merge_to], ranked[merge_to:]

    total = {token: x[token].copy() for token in kept}
    count = dict.fromkeys(kept, 1)
    new_size = {token: size[token] for token in kept}
    for source, (target, similarity, margin) in partners(sources, kept, x).items():
        image.margins.append(margin)
        total[target] += x[source]
        count[target] += 1
        new_size[target] += size[source] * similarity
    rows = np.concatenate([x[:p], np.stack([total[token] / count[token] for token in kept])])
    sizes = np.concatenate([size[:p], np.array([new_size[token] for token in kept])])
    return rows, sizes, position[kept]


# --- GTP-ViT ---------------------------------------------------------------------------------------------------------


def gtp_attention(logits: np.ndarray, theta: float = GTP_THETA, size: np.ndarray | None = None) -> np.ndarray:
    """GTP's attention [H, N, N]: proportional, then sparsified (section 3, sparsification; models_v3.py).

    logits: scaled query-key products [H, N, N]. size: of every token [N], or None for plain attention. theta: share of
    the entries that is kept. Of each head's N * N weights, those below the k-th smallest, k = int(N * N * (1 - theta)),
    become 0: k - 1 of them without ties. The rest is not renormalised. Their code fails for k = 0 with theta < 1; here
    everything is kept then.
    """
    logits = logits.astype(np.float64)
    if size is not None:
        logits = logits + np.log(size.astype(np.float64))[None, None, :]
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    heads, n, _ = weights.shape
    k = int(n * n * (1 - theta)) if theta < 1 else 0
    if k > 0:
        for head in range(heads):
            threshold = sorted(weights[head].ravel())[k - 1]
            weights[head][weights[head] < threshold] = 0.0
    return weights


def gtp_graph(
    embedded: np.ndarray, grid: tuple[int, int], neighbours: int, margins: list[float], rows: np.ndarray
) -> np.ndarray:
    """The token graph [n0, n0], built once before block 0 and normalised (section 3; models_v3.py "Mixed").

    embedded: patch tokens [n0, D] that enter block 0, after position embedding (and CLIP's norm). Token i is connected
    to its eight grid neighbours and to the `neighbours` tokens of the largest cosine (i to j, not also j to i). Then
    D^-1/2 A D^-1/2, where D holds the row sums. rows: tokens whose choice of neighbours is recorded in `margins`.

    models_v3.py takes the (N - 1 - neighbours)-th smallest cosine as the threshold, with N including the class token:
    `neighbours` other tokens if there is one. Without a class token it is one more, which is not reproduced here.
    """
    embedded = embedded.astype(np.float64)
    n0, columns = len(embedded), grid[1]
    adjacency = np.zeros((n0, n0))
    for i in range(n0):
        similarity = np.array([cosine(embedded[i], embedded[j]) for j in range(n0)])
        similarity[i] = np.inf  # the token itself is always above the threshold
        ordered = sorted(similarity, reverse=True)
        threshold = ordered[min(neighbours, n0 - 1)]
        if i in rows and neighbours + 1 < n0:
            margins.append(relative_gap(threshold, ordered[neighbours + 1]))
        for j in range(n0):
            row_gap = abs(i // columns - j // columns)
            column_gap = abs(i % columns - j % columns)
            if i != j and (similarity[j] >= threshold or max(row_gap, column_gap) <= 1):
                adjacency[i, j] = 1.0
    degree = adjacency.sum(axis=1)
    for i in range(n0):
        for j in range(n0):
            adjacency[i, j] /= math.sqrt(degree[i]) * math.sqrt(degree[j])
    return adjacency


def gtp(
    image: Image,
    r: int,
    alpha: float,
    embedded: np.ndarray,
    neighbours: int = GTP_NEIGHBOURS,
) -> Reduced:
    """GTP: drops r patch tokens and propagates them along the graph (section 3; models_v3.py select, propagate).

    Score ("MixedAttnMax"): maximum over heads of a token's attention to itself, times the maximum over heads of all
    tokens' attention to it (its column sum, prefix rows and itself included). The r lowest are dropped, and each kept
    token i gains alpha * sum over dropped j of graph[i, j] * x[j]; sizes likewise. Output: by descending score.

    image.attention: the matrix that multiplies the values, i.e. `gtp_attention` with theta and the sizes.
    image.positions: positions of the current patch tokens in the original grid, rows of the graph. embedded: patch
    tokens of the original grid [n0, D] as they enter block 0. alpha: magnitude of the propagation. neighbours: of the
    semantic graph.
    """
    if r <= 0:  # for num_prop = 0 their select keeps nothing: `[:, :-0]`
        return unchanged(image)
    x, size, position = tokens(image)
    p = image.prefix
    attention = image.attention.astype(np.float64)
    score = np.zeros(len(x) - p)
    for row, i in enumerate(range(p, len(x))):
        own = max(head[i, i] for head in attention)
        received = max(head[:, i].sum() for head in attention)
        score[row] = own * received
    ranked = [p + row for row in descending(score, image.margins, len(score) - r)]
    kept, dropped = ranked[:-r], ranked[-r:]

    graph = gtp_graph(embedded, image.grid, neighbours, image.margins, image.positions)
    rows, sizes = [*x[:p]], [*size[:p]]
    for i in kept:
        weights = [graph[position[i], position[j]] for j in dropped]
        rows.append(x[i] + alpha * sum(w * x[j] for w, j in zip(weights, dropped, strict=True)))
        sizes.append(size[i] + alpha * sum(w * size[j] for w, j in zip(weights, dropped, strict=True)))
    return np.stack(rows), np.array(sizes), position[kept]


# --- PPT -------------------------------------------------------------------------------------------------------------


def ppt_scores(image: Image) -> np.ndarray:
    """Significance of every patch token [n], summing to 1 (section 3.2; ppt_deit.py score_assignment_step).

    The class token's attention summed over heads, times the norm of the concatenated values of all heads.
    """
    p = image.prefix
    score = np.zeros(len(image.x) - p)
    for row, i in enumerate(range(p, len(image.x))):
        values = image.values.astype(np.float64)[:, i].ravel()
        score[row] = image.attention.astype(np.float64)[:, 0, i].sum() * math.sqrt(values @ values)
    return score / score.sum()


def ppt_policy(image: Image, threshold: float = PPT_THRESHOLD) -> str:
    """ "prune" if the scores' variance (divided by n - 1) is at least the threshold, else "pool" (section 3.4)."""
    variance = float(ppt_scores(image).var(ddof=1))
    image.margins.append(relative_gap(variance, threshold))
    return "prune" if variance >= threshold else "pool"


def ppt_prune(image: Image, keep: int) -> Reduced:
    """PPT's token pruning: the `keep` most significant patch tokens, by descending score (section 3.2).

    Sizes are unchanged. The authors drop r = min(r, (N - 1) // 2), in pruning too. Their distillation token counts as
    a patch here.
    """
    x, size, position = tokens(image)
    if keep >= len(image.positions):
        return unchanged(image)
    ranked = [image.prefix + row for row in descending(ppt_scores(image), image.margins, keep)]
    order = [*range(image.prefix), *ranked[:keep]]
    return x[order], size[order], position[ranked[:keep]]


def ppt_pool(image: Image, r: int) -> Reduced:
    """PPT's token pooling: ToMe's bipartite soft matching unmodified (section 3.3; tome.py). Output as for `tome`."""
    return tome(image, r)


# --- ToMe ------------------------------------------------------------------------------------------------------------


def tome_schedule(depth: int, r: int, inflect: float = 0.0) -> list[int]:
    """Tokens merged in each block (tome/utils.py parse_r): `r` on average, from r (1 - inflect) to r (1 + inflect).

    inflect: -1 falls to 0 (the paper's "decreasing"), 0 is constant, 1 rises from 0. Fractions are truncated. Needs at
    least two blocks, like the original.
    """
    first = int(r * (1.0 - inflect))
    last = 2 * r - first
    rise = (last - first) / (depth - 1)
    return [int(first + rise * block) for block in range(depth)]


def tome(image: Image, r: int) -> Reduced:
    """ToMe: bipartite soft matching (section 3, "bipartite soft matching"; tome/merge.py bipartite_soft_matching).

    The whole sequence alternates between A (tokens 0, 2, ...) and B (1, 3, ...), prefix tokens included. Each patch
    token of A finds its most similar one in B (cosine of the mean keys); the r best pairs merge, weighted by size. r is
    limited to half of the patch tokens. Prefix tokens are neither sources nor targets; this matches the code for a
    class and a distillation token, and extends it to more.

    Output: the rest of A, then B, each in the original order; without any prefix token the rest of A is in descending
    order of similarity, since the code only restores its order for the sake of a class token.
    """
    p, n = image.prefix, len(image.x)
    r = min(r, (n - p) // 2)
    if r <= 0:
        return unchanged(image)
    set_a = [i for i in range(p, n) if i % 2 == 0]
    set_b = [i for i in range(p, n) if i % 2 == 1]
    found = partners(set_a, set_b, mean_keys(image))
    gaps: list[float] = []
    falling = [set_a[row] for row in descending([found[a][1] for a in set_a], gaps)]
    # The merged set is determined between places r and r + 1; the order after that only shows without prefix tokens.
    image.margins.extend(gaps[r - 1 :] if p == 0 else gaps[r - 1 : r])
    image.margins.extend(found[a][2] for a in falling[:r])
    rest = sorted(falling[r:]) if p > 0 else falling[r:]
    into = {a: found[a][0] for a in falling[:r]}
    return weighted_merge(image, into, [*range(p), *rest, *set_b])
