"""Cases for checking the kernels: edge-case sizes, dtypes and modes, as lists of operator calls.

A case is one row of the results. Its calls differ in batch size and content. For kernels compiled per token count, a
case has a single count, so that cases can be distributed over processes that compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOKENS = (
    1, 2, 15, 16, 17, 50, 63, 64, 65, 69, 98, 100, 127, 128, 129, 138, 196, 197, 198, 256, 257, 577, 1024,
)  # fmt: skip
FEW = (1, 17, 50, 69, 129, 197, 257, 577)
QUICK = (1, 17, 69, 129, 197)
DTYPES = ("bf16", "fp16", "fp32")
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS, PREFIX = 3, 1
BATCHES = (1, 3, 64)
FEW_IMAGES = 8  # instead of 64 if N is above LARGE: the attention in fp64 would fill the memory
LARGE = 257


@dataclass(frozen=True)
class Case:
    """One row: an operator with fixed compile-time parameters.

    Attributes:
        operator: Name of the public function; `room` is its folder.
        decides: The operator compares computed numbers, so near-ties may go either way.
        compiles: Approximate number of kernel builds.
    """

    operator: str
    room: str
    tokens: tuple[int, ...]
    settings: dict[str, Any] = field(hash=False)
    decides: bool = False
    compiles: int = 1

    @property
    def key(self) -> str:
        said = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.operator} {said} N={','.join(map(str, self.tokens))}".replace("  ", " ")


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        what: The parameters, for failure messages.
        nudged: Positions of arguments whose rounding may affect near-ties.
    """

    what: str
    arguments: tuple[Any, ...]
    nudged: tuple[int, ...] = ()


def cases(sizes: Sequence[int] = TOKENS, *, quick: bool = False) -> list[Case]:
    """All cases; `quick`: fewer sizes and settings, but every operator and mode."""
    sizes = [n for n in sizes if n in QUICK] if quick else list(sizes)
    return [*_attention(sizes, quick), *_rows(sizes, quick), *_selection(sizes, quick), *_merging(sizes, quick)]


def _attention(sizes: Sequence[int], quick: bool) -> Iterator[Case]:
    every = [(importance, bias) for importance in ("none", "class", "mean") for bias in ("none", "some")]
    some = [("none", "none"), ("class", "some"), ("mean", "none")]
    for n in sizes:
        for dtype in DTYPES:
            for importance, bias in every if dtype == "bf16" and not quick else some:
                yield _attend(n, 64, dtype, importance, bias)
    for n in sizes if not quick else [n for n in sizes if n in (17, 197)]:
        if n not in FEW:
            continue
        for width in (32, 80, 96, 128):
            for dtype in DTYPES:
                for importance, bias in (("none", "none"), ("mean", "some")):
                    yield _attend(n, width, dtype, importance, bias)


def _attend(n: int, width: int, dtype: str, importance: str, bias: str) -> Case:
    settings = {"d": width, "dtype": dtype, "importance": importance, "bias": bias}
    return Case("attention", "attention", (n,), settings)


def _rows(sizes: Sequence[int], quick: bool) -> Iterator[Case]:
    """gather_norm and merge_rows, for which token counts are no compile-time constants, or only a few."""
    for dtype in DTYPES:
        for width in (384,) if quick else (192, 384, 768, 1024, 200):
            for residual, extra in ((False, False), (True, True)) if quick else _both():
                settings = {"dtype": dtype, "D": width, "residual": residual, "extra": extra}
                yield Case("gather_norm", "gather_norm", tuple(sizes), settings, compiles=4)
        for width in (384,) if quick else (384, 768):
            for weights in ("none", "both") if quick else ("none", "source", "both"):
                settings = {"dtype": dtype, "D": width, "weights": weights}
                yield Case("merge_rows", "merge_rows", tuple(sizes), settings, compiles=8)


def _selection(sizes: Sequence[int], quick: bool) -> Iterator[Case]:
    for part in _split(sizes, 6):
        yield Case("select", "select", part, {}, compiles=6)
    for dtype in DTYPES:
        for width in (384,) if quick else (384, 768):
            yield Case("select_fuse", "select", tuple(sizes), {"dtype": dtype, "D": width}, compiles=8)


def _merging(sizes: Sequence[int], quick: bool) -> Iterator[Case]:
    modes = ("plain", "size", "scores")
    for part in _split([n for n in sizes if n >= 3], 4):
        for dtype in DTYPES:
            for mode in modes if dtype == "bf16" else modes[-1:]:
                settings = {"dtype": dtype, "mode": mode}
                yield Case("match_merge", "match_merge", part, settings, decides=True, compiles=2 * len(part))
    for part in _split([n for n in sizes if n >= 15], 3):
        for dtype in DTYPES:
            for weights in ("attention",) if quick else ("attention", "size"):
                settings = {"dtype": dtype, "weights": weights}
                yield Case("density_merge", "density_merge", part, settings, decides=True, compiles=3 * len(part))


def _both() -> list[tuple[bool, bool]]:
    return [(first, second) for first in (False, True) for second in (False, True)]


def _split(sizes: Sequence[int], most: int) -> list[tuple[int, ...]]:
    return [tuple(sizes[i : i + most]) for i in range(0, len(sizes), most)]


def calls(case: Case, device: str, batches: Sequence[int] = BATCHES) -> Iterator[Call]:
    """Calls of a case, on random data that is the same in every run."""
    build: Callable[[Make, dict[str, Any], int, int], Iterator[Call]] = _BUILDERS[case.operator]
    for n in case.tokens:
        for batch in batches:
            batch = min(batch, FEW_IMAGES) if n > LARGE else batch
            yield from build(Make(device, 7919 * n + batch), case.settings, n, batch)


class Make:
    """Creates random tensors on a device."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, dtype: str = "fp32", scale: float = 1.0, shift: float = 0.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, device=self.device)
        return (drawn * scale + shift).to(TORCH_DTYPES[dtype])

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def permutation(self, batch: int, n: int) -> Tensor:
        """int64 [B, n], each row a permutation."""
        return self.uniform(batch, n).argsort(dim=1)


def _attention_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    qkv = make.normal(batch, n, 3, HEADS, settings["d"], dtype=settings["dtype"])
    sharp = qkv.clone()
    sharp[:, :, 0] *= 6  # nearly one-hot rows
    forms: dict[str, Tensor | None] = {"none": None}
    if settings["bias"] != "none":
        each = make.normal(batch, n)
        removed = each.masked_fill(make.uniform(batch, n) < 0.3, -torch.inf)
        removed[:, 0] = 0.0
        nobody = each.clone()
        nobody[-1] = -torch.inf  # all keys of one image are masked: NaN there, and only there
        forms = {"shared": each[:1].contiguous(), "each": each, "removed": removed, "all removed": nobody}
    for name, bias in forms.items():
        yield Call(f"B={batch} N={n} bias {name}", (qkv, bias, settings["importance"]))
    yield Call(f"B={batch} N={n} sharp", (sharp, next(iter(forms.values())), settings["importance"]))


def _gather_norm_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    dtype, width = settings["dtype"], settings["D"]
    x = make.normal(batch, n, width, dtype=dtype, scale=2.0, shift=0.5)
    weight, bias = make.normal(width, dtype=dtype, shift=1.0, scale=0.2), make.normal(width, dtype=dtype)
    residual = make.normal(batch, n, width, dtype=dtype) if settings["residual"] else None
    extra = make.normal(batch, 2, width, dtype=dtype) if settings["extra"] else None
    half = (n + 1) // 2
    indices = {
        "shared, ascending": torch.arange(0, n, 2, device=make.device),
        "shared, any order, repeated": make.whole(n, half + 1),
        "each, any order": make.permutation(batch, n)[:, :half].contiguous(),
        "each, repeated, K > N": make.whole(n, batch, n + 3),
        "none kept": torch.empty(0, dtype=torch.int64, device=make.device),
    }
    for name, index in indices.items():
        yield Call(f"B={batch} N={n} index {name}", (x, index, weight, bias, 1e-6, residual, extra))


def _scores(make: Make, batch: int, n: int) -> dict[str, Tensor]:
    drawn = make.normal(batch, n + PREFIX)
    odd = drawn.clone()
    odd[:, ::3] = torch.nan
    odd[:, 1::5] = torch.inf
    odd[:, 2::7] = -torch.inf
    return {
        "random": drawn[:, PREFIX:],  # a view past the prefix, as callers pass it
        "ties": (drawn * 2).round()[:, PREFIX:].contiguous(),
        "equal": torch.full((batch, n), 0.25, device=make.device),
        "not finite": odd[:, PREFIX:],
        "zeros of both signs": torch.where(drawn > 0, 0.0, -0.0)[:, PREFIX:],
    }


def _amounts(n: int) -> list[int]:
    return sorted({1, max(1, n // 2), max(1, n - 1), n})


def _select_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    for name, scores in _scores(make, batch, n).items():
        for k in _amounts(n):
            for by_score in (False, True):
                yield Call(f"B={batch} n={n} k={k} by_score={by_score} scores {name}", (scores, k, by_score))


def _select_fuse_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    x = make.normal(batch, n + PREFIX, settings["D"], dtype=settings["dtype"])
    spread = torch.softmax(make.normal(batch, n + PREFIX), dim=1)
    for name, scores in {"softmax": spread[:, PREFIX:], "equal": torch.full_like(spread, 1 / n)[:, PREFIX:]}.items():
        for k in _amounts(n):
            yield Call(f"B={batch} n={n} k={k} scores {name}", (scores, x, k))


def _merge_rows_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    x = make.normal(batch, n, settings["D"], dtype=settings["dtype"], shift=1.0)
    order = make.permutation(batch, n)
    for kept in sorted({1, max(1, n // 2), max(1, n - 1), n}):
        keep, source = order[:, :kept].contiguous(), order[:, kept:].contiguous()
        into = make.whole(kept, batch, n - kept)
        weight = own = None
        if settings["weights"] != "none":
            weight = make.uniform(batch, n - kept).masked_fill(make.uniform(batch, n - kept) < 0.2, 0.0)
        if settings["weights"] == "both":
            own = make.uniform(batch, kept) + 0.5
        yield Call(f"B={batch} N={n} K={kept}", (x, keep, source, into, weight, own))


def apart(make: Make, batch: int, n: int, width: int, prefix: int, dtype: str) -> Tensor:
    """A metric with clear best partners: each row of A is at an angle of its own to one row of B.

    With random rows, the best of hundreds of similarities is often a near-tie, and a check that has to excuse every
    second image is weak.
    """
    metric = make.normal(batch, n, width)
    first_a, first_b = prefix + prefix % 2, prefix + (prefix + 1) % 2
    a, b = metric[:, first_a::2], torch.nn.functional.normalize(metric[:, first_b::2], dim=2)
    count = a.shape[1]
    partner = make.whole(b.shape[1], batch, count)
    near = b.gather(1, partner[:, :, None].expand(-1, -1, width))
    across = torch.nn.functional.normalize(a - (a * near).sum(2, keepdim=True) * near, dim=2)
    angle = (make.permutation(batch, count) + 1).float() / (count + 1) * 0.7  # radians: cosines from 0.76 to 1
    metric[:, first_a::2] = (angle.cos()[:, :, None] * near + angle.sin()[:, :, None] * across) * 3.0
    return metric.to(TORCH_DTYPES[dtype])


def _match_merge_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    dtype, mode = settings["dtype"], settings["mode"]
    x = make.normal(batch, n, 384, dtype=dtype, shift=1.0)
    for prefix in (1, 0, 2):
        patches = n - prefix
        if patches < 2 or (prefix != 1 and batch == 64):
            continue
        metric = apart(make, batch, n, 64, prefix, dtype)
        qkv = make.normal(batch, n, 3, HEADS, 64, dtype=dtype, scale=0.05)
        qkv[:, :, 1] += (metric / HEADS)[:, :, None]  # keys whose sum over heads is approximately the metric
        size = None if mode == "plain" else make.whole(5, batch, n).float() + 1.0
        scores, tau = None, 0.0
        if mode == "scores":
            sharp = torch.softmax(
                make.normal(batch, patches) * torch.linspace(0, 4, batch, device=x.device)[:, None], 1
            )
            share = sharp / sharp.sum(1, keepdim=True)
            spread = share.var(dim=1).sort().values
            middle = batch // 2  # half of the images merge, half are pruned, none is close to the threshold
            tau = float(spread[middle] + spread[max(0, middle - 1)]) / 2 if batch > 1 else 1e-9
            scores = sharp
        for r in sorted({1, max(1, patches // 4), patches // 2}):
            for name, given in {"[B, N, d]": metric, "keys of qkv": qkv[:, :, 1]}.items():
                what = f"B={batch} N={n} prefix={prefix} r={r} metric {name}"
                yield Call(what, (x, given, size, r, prefix, scores, tau), nudged=(1,))
        equal = torch.ones_like(metric)
        yield Call(f"B={batch} N={n} prefix={prefix} all similar", (x, equal, size, patches // 2, prefix, scores, tau))


def _density_merge_calls(make: Make, settings: dict[str, Any], n: int, batch: int) -> Iterator[Call]:
    patches = n - PREFIX
    x = make.normal(batch, n, 384, dtype=settings["dtype"], shift=0.5)
    scores = torch.softmax(make.normal(batch, n), dim=1)
    size = None if settings["weights"] == "attention" else make.whole(4, batch, n).float() + 1.0
    for share in (0.7, 0.4):
        left = max(3, round(share * patches))
        clusters = max(1, round(0.15 * left))
        for pairs in sorted({0, max(0, min(round(0.09 * (left - clusters)), (patches - left) // 2))}):
            if left - clusters + pairs > patches - clusters or 2 * pairs > left - clusters + pairs:
                continue
            what = f"B={batch} N={n} tokens_out={left + PREFIX} clusters={clusters} pairs={pairs}"
            arguments = (x, scores, size, left + PREFIX, clusters, pairs, PREFIX, settings["weights"])
            yield Call(what, arguments, nudged=(0,))


_BUILDERS: dict[str, Callable[[Make, dict[str, Any], int, int], Iterator[Call]]] = {
    "attention": _attention_calls,
    "gather_norm": _gather_norm_calls,
    "select": _select_calls,
    "select_fuse": _select_fuse_calls,
    "merge_rows": _merge_rows_calls,
    "match_merge": _match_merge_calls,
    "density_merge": _density_merge_calls,
}
