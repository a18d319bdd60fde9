"""Reference implementation of docs/reducers.md: every reducer for one image, in float64, with loops. Slow on purpose.

Each oracle takes an `Image` and the reducer's fields and returns (x [N', D], size [N'], positions [n']) in output
order. A merge target keeps its own position, a fused row has that of the first token fused, a cluster that of its
centre. Sizes are always computed; callers whose plan does not track them ignore them.

float32 code may rightly decide differently if two candidates are nearly tied. So every oracle records in
`Image.margins` how clear each of its decisions was; `Image.margin` is the smallest. Exact ties go to the lowest index
by specification and are not recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Result = tuple[np.ndarray, np.ndarray, np.ndarray]
Row = tuple[np.ndarray, float, int]  # token [D], size, position
Group = tuple[int, list[int]]  # the member whose position the merged token inherits, and all members

TINY = 1e-12


@dataclass
class Image:
    """Input of a reducer for one image.

    Attributes:
        x: Tokens after the attention [N, D].
        size: Number of patches in each token [N]; 1 for prefix tokens.
        positions: Positions of the patch tokens in the original patch grid, row-major [n].
        prefix: P, number of leading tokens that are never touched.
        grid: Rows and columns of the original patch grid.
        attention: Softmax of every head, with biases and log sizes: row i is query i [H, N, N].
        keys, values: Of every head [H, N, d_h].
        embedded: Patch tokens that entered the first block [n0, D]; embedded_at: their positions in the grid [n0].
        margins: Filled by the oracles: how clear each decision was, relative to the numbers compared.
    """

    x: np.ndarray
    size: np.ndarray
    positions: np.ndarray
    prefix: int
    grid: tuple[int, int]
    attention: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    embedded: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    embedded_at: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    margins: list[float] = field(default_factory=list)

    @property
    def patches(self) -> list[int]:
        """Indices of the patch tokens in the sequence."""
        return list(range(self.prefix, len(self.x)))

    @property
    def margin(self) -> float:
        """The smallest margin so far; infinity if there was none."""
        return min(self.margins, default=math.inf)

    def class_attention(self, j: int) -> float:
        return sum(float(head[0, j]) for head in self.attention) / len(self.attention)

    def key(self, j: int) -> np.ndarray:
        return sum(head[j] for head in self.keys) / len(self.keys)

    def value_norm(self, j: int) -> float:
        return math.sqrt(sum(float(number) ** 2 for head in self.values for number in head[j]))

    def position(self, j: int) -> int:
        return int(self.positions[j - self.prefix])

    def row(self, j: int) -> Row:
        """Token j unchanged."""
        return self.x[j], float(self.size[j]), self.position(j)


def note(image: Image, a: float, b: float, scale: float | None = None) -> None:
    """Record a decision between a and b; `scale` is what rounding is relative to, by default a and b themselves."""
    if a != b:
        image.margins.append(abs(a - b) / (max(abs(a), abs(b)) if scale is None else scale))


def rank(scores: dict[int, float]) -> list[int]:
    """Indices by descending score, ties to the lowest index."""
    return sorted(scores, key=lambda j: (-scores[j], j))


def top(image: Image, scores: dict[int, float], count: int, scale: float | None = None) -> list[int]:
    """The `count` indices of highest score, best first; records their margin over the others."""
    ranked = rank(scores)
    for chosen in ranked[:count]:
        for other in ranked[count:]:
            note(image, scores[chosen], scores[other], scale)
    return ranked[:count]


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    lengths = [math.sqrt(float(w @ w)) for w in (u, v)]
    return float((u / lengths[0]) @ (v / lengths[1])) if all(lengths) else 0.0


def output(image: Image, rows: list[Row]) -> Result:
    """The prefix tokens unchanged, then the rows."""
    x = [image.x[j] for j in range(image.prefix)] + [row[0] for row in rows]
    size = [image.size[j] for j in range(image.prefix)] + [row[1] for row in rows]
    return np.array(x), np.array(size), np.array([row[2] for row in rows], dtype=int)


def size_weighted(image: Image, j: int, sources: list[int]) -> Row:
    """Token j merged with its sources."""
    total, x = 0.0, np.zeros(image.x.shape[1])
    for i in [j, *sources]:
        total += float(image.size[i])
        x = x + image.size[i] * image.x[i]
    return x / total, total, image.position(j)


def tome(image: Image, r: int, order: str = "position") -> Result:
    even = [j for j in image.patches if j % 2 == 0]
    odd = [j for j in image.patches if j % 2 == 1]
    similar = {a: {b: cosine(image.key(a), image.key(b)) for b in odd} for a in even}
    score = {a: max(similar[a].values()) for a in even}
    merged = top(image, score, r, scale=1.0)
    sources: dict[int, list[int]] = {b: [] for b in odd}
    for a in merged:
        partner = top(image, similar[a], 1, scale=1.0)[0]
        sources[partner].append(a)
    rest = [a for a in even if a not in merged]
    if order == "similarity":
        rest = [a for a in rank(score) if a not in merged]
        for before, after in pairwise(rest):
            note(image, score[before], score[after], scale=1.0)
    rows = [image.row(a) for a in rest]
    rows += [size_weighted(image, b, sources[b]) for b in odd]
    return output(image, rows)


def ppt(image: Image, r: int, tau: float, order: str = "position") -> Result:
    score = {j: image.class_attention(j) * image.value_norm(j) for j in image.patches}
    total, n = sum(score.values()), len(score)
    if not total:  # 0 / 0 is not below any tau, and all tie
        return output(image, [image.row(j) for j in image.patches[: n - r]])
    score = {j: value / total for j, value in score.items()}
    mean = sum(score.values()) / n
    variance = sum((value - mean) ** 2 for value in score.values()) / (n - 1) if n > 1 else 0.0
    note(image, variance, tau)
    if variance < tau:
        return tome(image, r)
    kept = top(image, score, n - r)
    if order == "position":
        kept = sorted(kept)
    else:
        for before, after in pairwise(kept):
            note(image, score[before], score[after])
    return output(image, [image.row(j) for j in kept])


def evit(image: Image, tokens_out: int, fuse: bool) -> Result:
    score = {j: image.class_attention(j) for j in image.patches}
    kept = sorted(top(image, score, tokens_out - image.prefix - (1 if fuse else 0)))
    rows = [image.row(j) for j in kept]
    if fuse:
        others = [j for j in image.patches if j not in kept]
        x = sum(score[j] * image.x[j] for j in others)
        size = sum(float(image.size[j]) for j in others)
        rows.append((x, size, image.position(others[0])))
    return output(image, rows)


def topk(image: Image, tokens_out: int, score: str) -> Result:
    scores = {}
    for j in image.patches:
        scores[j] = image.class_attention(j)
        if score == "ats":
            scores[j] *= image.value_norm(j)
    return output(image, [image.row(j) for j in sorted(top(image, scores, tokens_out - image.prefix))])


def diffrate(image: Image, prune_to: int, merge_to: int, weights: str = "similarity") -> Result:
    score = {j: image.class_attention(j) for j in image.patches}
    survivors = top(image, score, prune_to - image.prefix)
    kept = sorted(top(image, {j: score[j] for j in survivors}, merge_to - image.prefix))
    brings: dict[int, list[tuple[int, float]]] = {j: [] for j in kept}
    for i in survivors:
        if i not in kept:
            similar = {j: cosine(image.x[i], image.x[j]) for j in kept}
            best = top(image, similar, 1, scale=1.0)[0]
            brings[best].append((i, float(image.size[i]) * similar[best]))
    rows = []
    for j in kept:
        if weights == "equal":
            x = sum((image.x[i] for i, _ in brings[j]), start=image.x[j]) / (1 + len(brings[j]))
            size = max(float(image.size[j]) + sum(brought for _, brought in brings[j]), 1e-6)
            rows.append((x, size, image.position(j)))
            continue
        x, size = image.size[j] * image.x[j], float(image.size[j])
        for i, brought in brings[j]:
            weight = max(brought, 0.0)
            x, size = x + weight * image.x[i], size + weight
        rows.append((x / size, size, image.position(j)))
    return output(image, rows)


def bat(image: Image, tokens_out: int, clusters: int, pairs: int, weights: str = "attention") -> Result:
    attention = {j: image.class_attention(j) for j in image.patches}
    attentive = sorted(top(image, attention, tokens_out - image.prefix - clusters + pairs))
    inattentive = [j for j in image.patches if j not in attentive]
    weight = {}
    for j in image.patches:
        weight[j] = max(attention[j] if weights == "attention" else float(image.size[j]), TINY)
    rows = []
    for name, members in match_attentive(image, attentive, pairs) + cluster(image, inattentive, clusters):
        x = sum(weight[j] * image.x[j] for j in members) / sum(weight[j] for j in members)
        rows.append((x, sum(float(image.size[j]) for j in members), image.position(name)))
    return output(image, rows)


def match_attentive(image: Image, attentive: list[int], pairs: int) -> list[Group]:
    """Step 3 of bat: unmerged tokens of A, then all of B with those merged into each; without pairs, all ascending."""
    if pairs == 0:
        return [(j, [j]) for j in attentive]
    first, second = attentive[0::2], attentive[1::2]
    members = {b: [b] for b in second}
    similar = {a: {b: cosine(image.x[a], image.x[b]) for b in second} for a in first}
    partner = {a: top(image, similar[a], 1, scale=1.0)[0] for a in first}
    score = {a: similar[a][partner[a]] for a in first}
    winners = {}  # partner -> the token paired with it
    for b in second:
        suitors = {a: score[a] for a in first if partner[a] == b}
        if suitors:
            winners[b] = rank(suitors)[0]
    in_pairs = {a: score[a] for a in winners.values()}
    thirds = {a: score[a] for a in first if a not in in_pairs}
    merged = top(image, in_pairs, min(pairs, len(in_pairs)), scale=1.0)
    merged += top(image, thirds, pairs - len(merged), scale=1.0)
    for a in first:
        winner = winners[partner[a]]
        if winner in merged and a not in merged:  # the winner of the partner decided which one is merged
            note(image, score[winner], score[a], scale=1.0)
    for a in merged:
        members[partner[a]].append(a)
    alone: list[Group] = [(a, [a]) for a in first if a not in merged]
    return alone + [(b, members[b]) for b in second]


def cluster(image: Image, inattentive: list[int], clusters: int) -> list[Group]:
    """Step 2 of bat: density peaks; one group per centre, in ascending order."""
    width, count = image.x.shape[1], len(inattentive)
    # Rounding of squared distances is relative to the squared lengths that they are computed from.
    longest = max((float(image.x[j] @ image.x[j]) for j in inattentive), default=0.0) or 1.0
    square = {i: {j: float(((image.x[i] - image.x[j]) ** 2).sum()) for j in inattentive} for i in inattentive}
    # The logarithm of rho has the same order and does not underflow.
    log_rho = {i: -sum(square[i].values()) / (count * width) for i in inattentive}
    denser = {
        i: [j for j in inattentive if log_rho[j] > log_rho[i] or (log_rho[j] == log_rho[i] and j < i)]
        for i in inattentive
    }
    delta = {}
    for i in inattentive:
        if denser[i]:
            delta[i] = min(math.sqrt(square[i][j]) for j in denser[i])
        else:
            delta[i] = max(math.sqrt(square[i][j]) for j in inattentive)
    for i in inattentive:
        for j in denser[i]:  # would the result differ if i were denser than j?
            apart = math.sqrt(square[i][j])
            if apart <= delta[i] or apart < delta[j]:
                note(image, log_rho[i], log_rho[j], scale=max(1.0, longest / width))
    log_peak = {i: log_rho[i] + (math.log(delta[i]) if delta[i] > 0 else -math.inf) for i in inattentive}
    centres = sorted(top(image, log_peak, clusters, scale=max(1.0, longest / width)))
    members = {centre: [centre] for centre in centres}
    for i in inattentive:
        if i not in centres:
            nearness = {centre: -square[i][centre] for centre in centres}
            members[top(image, nearness, 1, scale=longest)[0]].append(i)
    return [(centre, members[centre]) for centre in centres]


def pitome(image: Image, r: int, margin: float, matching: str = "protect") -> Result:
    energy = {}
    for i in image.patches:
        total = 0.0
        for j in image.patches:
            z = cosine(image.key(i), image.key(j)) - margin
            total += z if z > 0 else math.exp(z) - 1
        energy[i] = total / len(image.patches)
    mergeable = top(image, energy, len(energy) if matching == "bipartite" else 2 * r, scale=1.0)
    for before, after in pairwise(mergeable):  # ranks alternate between a and b
        note(image, energy[before], energy[after], scale=1.0)
    sources: dict[int, list[int]] = {b: [] for b in mergeable[1::2]}
    # By position among a and among b: of equal cosines the lowest rank wins, not the lowest index in the sequence.
    first = dict(enumerate(mergeable[0::2]))
    similar = {p: {q: cosine(image.key(a), image.key(b)) for q, b in enumerate(sources)} for p, a in first.items()}
    closest = rank({p: max(similar[p].values()) for p in first})
    if matching == "bipartite":
        score = {p: max(similar[p].values()) for p in first}
        top(image, score, r, scale=1.0)
        for before, after in pairwise(closest[r:]):
            note(image, score[before], score[after], scale=1.0)
    for p in closest[:r] if matching == "bipartite" else first:
        sources[mergeable[1::2][top(image, similar[p], 1, scale=1.0)[0]]].append(first[p])
    alone = [j for j in image.patches if j not in mergeable]
    rows = [image.row(j) for j in ([first[p] for p in closest[r:]] if matching == "bipartite" else alone)]
    rows += [size_weighted(image, b, sources[b]) for b in mergeable[1::2]]
    return output(image, rows)


def gtp(
    image: Image,
    r: int,
    alpha: float,
    neighbours: int,
    score: str = "class",
    graph: str = "mixed",
    graph_from: str = "keys",
    theta: float = 1.0,
) -> Result:
    """The image's attention must already be sparsified by `theta`."""
    scores = {}
    for j in image.patches:
        if score == "class":
            scores[j] = image.class_attention(j)
        else:
            itself = max(float(head[j, j]) for head in image.attention)
            received = max(sum(float(number) for number in head[:, j]) for head in image.attention)
            scores[j] = itself * received
    kept = top(image, scores, len(image.patches) - r)
    if graph_from == "keys":
        kept = sorted(kept)
    else:
        for before, after in pairwise(kept):
            note(image, scores[before], scores[after])
    x = {j: image.x[j] for j in kept}
    size = {j: float(image.size[j]) for j in kept}
    given = from_keys if graph_from == "keys" else from_patches
    for i, j, weight in given(image, kept, graph, neighbours):
        x[j] = x[j] + alpha * weight * image.x[i]
        size[j] += alpha * weight * float(image.size[i])
    return output(image, [(x[j], size[j], image.position(j)) for j in kept])


Gift = tuple[int, int, float]  # a dropped token, a kept one, and the weight with which the kept one receives it


def from_keys(image: Image, kept: list[int], graph: str, neighbours: int) -> list[Gift]:
    """Each dropped token in equal parts to its kept neighbours."""
    gifts: list[Gift] = []
    for i in image.patches:
        if i in kept:
            continue
        near: set[int] = set()
        if graph in ("spatial", "mixed"):
            near |= {j for j in kept if adjacent(image, i, j)}
        if graph in ("semantic", "mixed"):
            similar = {j: cosine(image.key(i), image.key(j)) for j in kept}
            chosen = top(image, similar, min(neighbours, len(kept)), scale=1.0)
            near |= {j for j in kept if similar[j] >= similar[chosen[-1]]}  # ties add neighbours
        gifts += [(i, j, 1 / len(near)) for j in near]
    return gifts


def from_patches(image: Image, kept: list[int], graph: str, neighbours: int) -> list[Gift]:
    """Weights of the graph of all embedded patches: 1 / sqrt(d_i d_j) where i is a neighbour of j."""
    near = neighbours_of_patches(image, graph, neighbours + (1 if image.prefix == 0 else 0))
    at = {int(position): place for place, position in enumerate(image.embedded_at)}
    gifts: list[Gift] = []
    for i in image.patches:
        for j in kept:
            a, b = at[image.position(i)], at[image.position(j)]
            if i not in kept and a in near[b]:
                gifts.append((i, j, 1 / math.sqrt(max(1, len(near[a])) * len(near[b]))))
    return gifts


def neighbours_of_patches(image: Image, graph: str, neighbours: int) -> list[set[int]]:
    """Neighbours of each embedded patch, by its index."""
    count = len(image.embedded)
    near: list[set[int]] = []
    for b in range(count):
        found: set[int] = set()
        for a in range(count):
            (row_a, column_a), (row_b, column_b) = (
                divmod(int(image.embedded_at[place]), image.grid[1]) for place in (a, b)
            )
            touch = abs(row_a - row_b) <= 1 and abs(column_a - column_b) <= 1
            if graph in ("spatial", "mixed") and a != b and touch:
                found.add(a)
        if graph in ("semantic", "mixed"):
            similar = {a: cosine(image.embedded[b], image.embedded[a]) for a in range(count) if a != b}
            chosen = top(image, similar, min(neighbours, count - 1), scale=1.0)
            found |= {a for a in similar if similar[a] >= similar[chosen[-1]]}
        near.append(found)
    return near


def adjacent(image: Image, i: int, j: int) -> bool:
    """Whether two tokens are adjacent in the patch grid, diagonals included."""
    row_i, column_i = divmod(image.position(i), image.grid[1])
    row_j, column_j = divmod(image.position(j), image.grid[1])
    return abs(row_i - row_j) <= 1 and abs(column_i - column_j) <= 1


ORACLES: dict[str, Callable[..., Result]] = {
    "tome": tome,
    "ppt": ppt,
    "evit": evit,
    "topk": topk,
    "diffrate": diffrate,
    "bat": bat,
    "pitome": pitome,
    "gtp": gtp,
}
