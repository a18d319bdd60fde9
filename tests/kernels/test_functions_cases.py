"""Calls of every operator, for each of its ONNX operator types, and a check that none is missing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels import bounds
from tests.kernels.density_merge.cases import Plan, decided
from tests.kernels.support import seeded
from vp_kernels.attention.function import attention_node
from vp_kernels.attention.op import attention
from vp_kernels.density_merge.function import density_merge_node
from vp_kernels.density_merge.op import density_merge
from vp_kernels.density_merge.reference import density_merge as density_reference
from vp_kernels.gather_norm.function import gather_norm_node
from vp_kernels.gather_norm.op import gather_norm
from vp_kernels.match_merge.function import match_merge_node
from vp_kernels.match_merge.op import match_merge
from vp_kernels.match_merge.reference import match_reference
from vp_kernels.merge_rows.function import merge_rows_node
from vp_kernels.merge_rows.op import merge_rows
from vp_kernels.onnx import function_names
from vp_kernels.select.function import select_fuse_node, select_node
from vp_kernels.select.op import select, select_fuse

BATCH, D = 3, 24
NAN = float("nan")


@dataclass
class Case:
    """One call of an operator.

    Attributes:
        op_type: Expected operator type.
        node, operator: Its implementations in ONNX and in torch.
        tensors: Arguments by name, with a batch axis of BATCH.
        settings: Other arguments.
        fixed: Tensors that are equal for every image: constants of the graph.
        note: Distinguishes cases of a type.
    """

    op_type: str
    node: Callable[..., Any]
    operator: Callable[..., Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.op_type}-{self.note}" if self.note else self.op_type

    def expected(self) -> tuple[Tensor, ...]:
        """Results of the operator itself, on the CPU."""
        return outputs(self.operator(**self.tensors, **self.fixed, **self.settings))

    def rounding(self) -> tuple[Tensor, ...]:
        """Rounding bound of each floating-point output, for any form of the operator."""
        given = {**self.tensors, **self.fixed, **self.settings}
        if self.operator is attention:
            return bounds.attention(given["qkv"], given.get("key_bias"), given["importance"], spelled_out=True)
        if self.operator is gather_norm:
            return bounds.gather_norm(**given, one_pass=True)
        if self.operator is select_fuse:
            return (bounds.select_fuse(**given),)
        if self.operator is merge_rows:
            return bounds.merge_rows(**given)
        if self.operator is match_merge:
            x, metric = given.pop("x"), given.pop("metric").double()
            return bounds.merge_rows(x, *match_reference(metric, **given))
        assert self.operator is density_merge
        x, scores, size = given["x"], given["scores"], given["size"]
        counts = tuple(given[name] for name in ("tokens_out", "clusters", "pairs", "prefix"))
        rows, mass = density_reference(x.double(), scores, size, *counts, given["weights"])
        members = bounds.density_members(x, scores, counts)
        return bounds.density_merge(x, rows, members), bounds.gamma(members) * mass


def outputs(found: Any) -> tuple[Tensor, ...]:
    """Results of an operator, without omitted ones."""
    return tuple(each for each in ((found,) if isinstance(found, Tensor) else found) if each is not None)


def _positive(*shape: int, seed: int = 0) -> Tensor:
    return torch.softmax(seeded(*shape, seed=seed) * 2, dim=-1)


def _sizes(tokens: int) -> Tensor:
    return 1.0 + seeded(BATCH, tokens, seed=9).abs().mul(3).floor()


def attention_cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    heads, width, tokens = 2, 32, 19
    qkv = seeded(BATCH, tokens, 3, heads, width, dtype=dtype)
    bias = seeded(BATCH, tokens, seed=1)
    bias[:, 3] = -torch.inf
    cases = []
    for word in ("none", "class", "mean"):
        suffix = "" if word == "none" else word.capitalize()
        settings: dict[str, Any] = {"importance": word}
        tensors = {"qkv": qkv, "key_bias": bias}
        cases += [
            Case(f"Attention{suffix or 'Plain'}", attention_node, attention, {"qkv": qkv}, settings),
            Case(f"AttentionBias{suffix}", attention_node, attention, tensors, settings, note="image"),
            Case(f"AttentionBias{suffix}", attention_node, attention, {"qkv": qkv}, settings, {"key_bias": bias[:1]}),
        ]
    return cases


def gather_norm_cases(dtype: torch.dtype = torch.float32, width: int = D) -> list[Case]:
    tokens = 17
    x, residual = seeded(BATCH, tokens, width, dtype=dtype) + 3.0, seeded(BATCH, tokens, width, dtype=dtype, seed=1)
    extra = seeded(BATCH, 2, width, dtype=dtype, seed=2)
    norm = {"weight": seeded(width, dtype=dtype, seed=3), "bias": seeded(width, dtype=dtype, seed=4)}
    one = torch.tensor([16, 0, 5, 5, 2])
    each = torch.stack([one, one.flip(0), torch.arange(5)])
    cases = []
    for image, with_residual, with_extra in itertools.product((False, True), repeat=3):
        op_type = "GatherNorm" + "Image" * image + "Residual" * with_residual + "Extra" * with_extra
        tensors, fixed = {"x": x}, dict(norm)
        (tensors if image else fixed)["index"] = each if image else one
        tensors |= {"residual": residual} if with_residual else {}
        tensors |= {"extra": extra} if with_extra else {}
        cases.append(Case(op_type, gather_norm_node, gather_norm, tensors, {"eps": 1e-6}, fixed))
    nothing = {**norm, "index": one[:0]}
    tensors = {"x": x, "extra": extra}
    cases.append(
        Case("GatherNormExtra", gather_norm_node, gather_norm, tensors, {"eps": 1e-2}, nothing, note="nothing-kept")
    )
    return cases


def select_cases(dtype: torch.dtype = torch.float32, width: int = D) -> list[Case]:
    n, tokens = 20, 22
    scores, x = _positive(BATCH, n), seeded(BATCH, tokens, width, dtype=dtype)
    equal = torch.ones(BATCH, n)
    equal[1, 5:] = 2.0
    wild = seeded(BATCH, n, seed=5)
    wild[0, 4:7], wild[1], wild[2, 19] = NAN, NAN, NAN
    wild[2, 3] = -torch.inf
    cases = []
    for note, values in (("", scores), ("ties", equal), ("nan", wild)):
        for k in (1, 7, n):
            what = f"{note}{k}"
            settings = {"k": k}
            tensors = {"scores": values}
            cases.append(Case("Select", select_node, select, tensors, settings, note=what))
            order = {**settings, "by_score": True}
            cases.append(Case("SelectByScore", select_node, select, tensors, order, note=what))
            if note != "nan":
                both = {**tensors, "x": x}
                cases.append(Case("SelectFuse", select_fuse_node, select_fuse, both, settings, note=what))
    return cases


def merge_rows_cases(dtype: torch.dtype = torch.float32, width: int = D) -> list[Case]:
    x = seeded(BATCH, 12, width, dtype=dtype)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(each)) for each in range(BATCH)])
    keep, source = order[:, :6].contiguous(), order[:, 6:11].contiguous()
    into = torch.tensor([[0, 0, 0, 3, 5], [1, 2, 3, 4, 5], [5, 5, 5, 5, 5]])
    weight, own = seeded(BATCH, 5, seed=1).abs() + 0.1, seeded(BATCH, 6, seed=2).abs() + 0.1
    cases = []
    for with_weight, with_own in itertools.product((False, True), repeat=2):
        op_type = "MergeRows" + "SourceWeight" * with_weight + "KeepWeight" * with_own
        tensors = {"x": x, "keep": keep, "source": source, "into": into}
        tensors |= {"source_weight": weight} if with_weight else {}
        tensors |= {"keep_weight": own} if with_own else {}
        cases.append(Case(op_type, merge_rows_node, merge_rows, tensors))
    # A source of weight 0 holds NaN, and a row of weight 0 has no source: neither may affect the result.
    poisoned, zero, light = x.clone(), weight.clone(), own.clone()
    poisoned[0, source[0, 1]] = NAN
    zero[0, 1], light[1, 0] = 0.0, 0.0
    tensors = {"x": poisoned, "keep": keep, "source": source, "into": into, "source_weight": zero, "keep_weight": light}
    cases.append(Case("MergeRowsSourceWeightKeepWeight", merge_rows_node, merge_rows, tensors, note="weight-0"))
    nothing = {"x": x, "keep": keep, "source": source[:, :0], "into": into[:, :0]}
    cases.append(Case("MergeRows", merge_rows_node, merge_rows, nothing, note="no-source"))
    return cases


def match_merge_cases(dtype: torch.dtype = torch.float32, width: int = D, head_dim: int = 16) -> list[Case]:
    cases = []
    for tokens, prefix, r in ((17, 1, 3), (17, 1, 8), (18, 2, 8), (16, 0, 5), (4, 1, 1)):
        x, metric = seeded(BATCH, tokens, width, dtype=dtype), seeded(BATCH, tokens, 2, head_dim, dtype=dtype, seed=1)
        metric[0, prefix] = 0.0  # a zero vector
        metric = metric if prefix else metric[:, :, 0].contiguous()
        n = tokens - prefix
        scores = _positive(BATCH, n, seed=2) * torch.tensor([[1.0], [1e-3], [7.0]])
        share = scores / scores.sum(dim=1, keepdim=True)
        size = _sizes(tokens)
        tau = share.var(dim=1).median().item() * 1.001  # some images merge, some prune
        for sized, scored in itertools.product((False, True), repeat=2):
            op_type = "MatchMerge" + "Size" * sized + "Scores" * scored
            tensors = {"x": x, "metric": metric}
            settings = {"r": r, "prefix": prefix}
            tensors |= {"size": size} if sized else {}
            settings |= {} if sized else {"size": None}
            tensors |= {"scores": scores} if scored else {}
            settings |= {"tau": tau} if scored else {}
            note = f"{tokens}-{prefix}-{r}"
            cases.append(Case(op_type, match_merge_node, match_merge, tensors, settings, note=note))
    # Every similarity and every score ties; sizes tell which tokens merged.
    size = 2.0 ** torch.arange(17).expand(BATCH, -1)
    x, same = seeded(BATCH, 17, width, dtype=dtype), torch.ones(BATCH, 17, 2, head_dim, dtype=dtype)
    tied = {"x": x, "metric": same, "size": size.contiguous()}
    settings = {"r": 4, "prefix": 1}
    cases.append(Case("MatchMergeSize", match_merge_node, match_merge, tied, settings, note="ties"))
    tied = {**tied, "scores": torch.ones(BATCH, 16)}
    settings = {**settings, "tau": 0.0}
    cases.append(Case("MatchMergeSizeScores", match_merge_node, match_merge, tied, settings, note="ties"))
    return cases


def density_merge_cases(dtype: torch.dtype = torch.float32, width: int = D) -> list[Case]:
    tokens, prefix = 23, 2
    x, scores, size = seeded(BATCH, tokens, width, dtype=dtype), _positive(BATCH, tokens), _sizes(tokens)
    cases = []

    def add(tensors: dict[str, Tensor], out: int, clusters: int, pairs: int, weights: str, note: str) -> None:
        parts = {"Clusters": clusters, "Pairs": pairs, "Size": "size" in tensors, "BySize": weights == "size"}
        op_type = "DensityMerge" + "".join(name for name, there in parts.items() if there)
        counts = {"tokens_out": out, "clusters": clusters, "pairs": pairs, "prefix": prefix, "weights": weights}
        settings = counts if "size" in tensors else {**counts, "size": None}
        cases.append(Case(op_type, density_merge_node, density_merge, tensors, settings, note=note))

    for weights, sized in itertools.product(("attention", "size"), (False, True)):
        tensors = {"x": x, "scores": scores} | ({"size": size} if sized else {})
        for out, clusters, pairs in ((14, 3, 4), (12, 2, 0), (21, 0, 2), (tokens, 0, 0)):
            add(tensors, out, clusters, pairs, weights, f"{out}-{clusters}-{pairs}")
    for out, clusters, pairs in ((8, 6, 0), (14, 5, 1), (13, 1, 5)):  # all clusters; the first and the last pair
        add({"x": x, "scores": scores, "size": size}, out, clusters, pairs, "attention", f"{out}-{clusters}-{pairs}")
    # Every comparison ties; sizes tell which tokens merged.
    apart = (2.0 ** torch.arange(tokens)).expand(BATCH, -1).contiguous()
    same = torch.ones(BATCH, tokens, 16, dtype=dtype)  # of 16: lengths and products are exact
    equal = {"x": same, "scores": torch.full((BATCH, tokens), 0.5), "size": apart}
    add(equal, 14, 3, 4, "attention", "ties")
    return cases


CASES: dict[str, Callable[..., list[Case]]] = {
    "attention": attention_cases,
    "gather_norm": gather_norm_cases,
    "select": select_cases,
    "merge_rows": merge_rows_cases,
    "match_merge": match_merge_cases,
    "density_merge": density_merge_cases,
}


def test_every_operator_type_has_a_case() -> None:
    tested = {case.op_type for make in CASES.values() for case in make(torch.float32)}
    assert tested == set(function_names())


def test_names_of_cases_are_unique() -> None:
    names = [case.name for make in CASES.values() for case in make(torch.float32)]
    assert len(names) == len(set(names))


def test_no_case_is_a_near_tie() -> None:
    """Engines that add in another order make the same decisions: none changes if the compared values are off by 1e-5.

    Exact ties stay ties, and do not count.
    """
    for case in match_merge_cases():
        if case.note != "ties":
            metric, rest = case.tensors["metric"].double(), {**case.tensors, **case.settings}
            rest = {name: rest.get(name) for name in ("size", "r", "prefix", "scores")} | {"tau": rest.get("tau", 0.0)}
            chosen = match_reference(metric, **rest)  # type: ignore[arg-type]
            for seed in (7, 8):
                moved = metric * (1.0 + 1e-5 * seeded(*metric.shape, dtype=torch.float64, seed=seed))
                for one, other in zip(chosen, match_reference(moved, **rest), strict=True):  # type: ignore[arg-type]
                    assert torch.equal(one, other), case.name
    for case in density_merge_cases():
        if case.note != "ties":
            counts = (case.settings[name] for name in ("tokens_out", "clusters", "pairs", "prefix"))
            out, clusters, pairs, prefix = counts
            x, scores = case.tensors["x"], case.tensors["scores"]
            assert len(decided(x, scores, Plan(x.shape[1], prefix, out, clusters, pairs))) == len(x), case.name
