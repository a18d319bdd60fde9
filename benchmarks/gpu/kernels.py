"""Time the kernels against torch alternatives, in CUDA graphs over rotating buffers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import forms
from benchmarks.gpu.cases import Make
from benchmarks.gpu.machine import clocks, measure_ceilings
from benchmarks.gpu.runs import Row
from benchmarks.gpu.setup import fingerprint, first_line, part_of
from benchmarks.gpu.timing import CpuClock, CudaClock, Graph, Timing, buffers_for, interleave, per_launch

LAUNCHES = 20
SAMPLE_SECONDS, ROUNDS = 0.004, 25
TOKENS = (197, 138, 98, 69)
BATCHES = (256, 64)
WIDTHS = {6: 384, 12: 768}  # heads -> D, with 64 channels per head
BARS = {  # operator -> (minimum speed-up over the best torch alternative, minimum share of the copy bandwidth)
    "attention": (1.0, 0.6), "gather_norm": (None, 0.8), "match_merge": (8.0, None), "select": (4.0, None),
    "select_fuse": (None, None), "merge_rows": (None, None), "density_merge": (None, None),
}  # fmt: skip
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Variant:
    """One way to compute a row's result.

    Attributes:
        rival: Group of torch alternatives to compare with; for a torch alternative, the group that it belongs to.
        ours: Whether it is one of our kernels.
        bar: Whether it counts for the bar (compiled torch code is shown, but does not count).
        given: Selects its arguments from those of the row.
    """

    name: str
    form: Callable[[], forms.Form]
    rival: str
    ours: bool = False
    bar: bool = True
    given: Callable[[Arguments], Arguments] = lambda arguments: arguments


@dataclass(frozen=True)
class Timed:
    """A row: an operator at a shape, its arguments and the ways to compute it."""

    operator: str
    shape: dict[str, Any] = field(hash=False)
    build: Callable[[Make], Arguments] = field(hash=False)
    variants: tuple[Variant, ...] = ()
    moved: Callable[[Arguments, Any], int] = lambda arguments, found: forms.nbytes(*arguments, *_tensors(found))

    @property
    def key(self) -> str:
        return f"{self.operator} " + " ".join(f"{name}={value}" for name, value in self.shape.items())


def timed(*, quick: bool = False, small: bool = False) -> list[Timed]:
    """All rows, most important first.

    Args:
        small: Batch 2 and few channels, to try everything on a CPU.
    """
    batches = (2,) if small else BATCHES[:1] if quick else BATCHES
    dtypes = ("bf16",) if quick else ("bf16", "fp16")
    heads = (6,) if quick or small else (6, 12)
    tokens = TOKENS[::2] if quick else TOKENS
    shapes = [
        {"N": n, "B": batch, "H": h, "dtype": dtype}
        for dtype, batch, h, n in itertools.product(dtypes, batches, heads, tokens)
    ]
    width = 32 if small else 64
    bf16 = [shape for shape in shapes if shape["dtype"] == "bf16"]
    found = [_attention(shape, width) for shape in bf16]
    one = [] if quick or small else [{**shape, "B": 1} for shape in bf16 if shape["B"] == 256 and shape["N"] == 197]
    for shape in bf16:
        found += [_gather_norm(shape, width, full) for full in (False, True) if shape["N"] < 197]
    for shape in [*bf16, *one]:
        if shape["N"] in (197, 98):
            found += [_match_merge(shape, width, scored) for scored in (False, True)]
    for shape in [*bf16, *one]:
        if shape["N"] in (197, 98):
            found += [_select(shape, width), _select_fuse(shape, width), _merge_rows(shape, width)]
            found.append(_density_merge(shape, width))
    return found + [_attention(shape, width) for shape in shapes if shape["dtype"] != "bf16"]


def _attention(shape: dict[str, Any], d: int) -> Timed:
    def build(make: Make) -> Arguments:
        qkv = make.normal(shape["B"], shape["N"], 3, shape["H"], d, dtype=shape["dtype"])
        bias = make.whole(4, shape["B"], shape["N"]).add(1).float().log()  # log sizes, as after merging
        return qkv, bias, bias[:, None, None, :].to(qkv.dtype)

    def plain(arguments: Arguments) -> Arguments:
        return arguments[0], None

    def masked(arguments: Arguments) -> Arguments:
        return arguments[0], arguments[2]

    variants = []
    for importance in ("none", "class", "mean"):
        for biased in (False, True):

            def given(a: Arguments, importance: str = importance, biased: bool = biased) -> Arguments:
                return a[0], a[1] if biased else None, importance

            name = "vp" + ("" if importance == "none" else f" {importance}") + (" bias" if biased else "")
            rival = "bias" if biased else "plain"
            variants.append(Variant(name, lambda: forms.operator("attention", "attention"), rival, True, given=given))
    for backend in forms.SDPA:
        variants.append(Variant(f"sdpa {backend}", lambda b=backend: forms.sdpa(b), "plain", given=plain))  # type: ignore[misc]
        variants.append(Variant(f"sdpa {backend} bias", lambda b=backend: forms.sdpa(b), "bias", given=masked))  # type: ignore[misc]

    def moved(arguments: Arguments, found: Any) -> int:
        return forms.nbytes(arguments[0], *_tensors(found))  # qkv once, out, importance; a bias is negligible

    return Timed("attention", {**shape, "d": d}, build, tuple(variants), moved)


def _gather_norm(shape: dict[str, Any], d: int, full: bool) -> Timed:
    kept, width = shape["N"], shape["H"] * d  # N is the number of remaining tokens of 197: K here

    def build(make: Make) -> Arguments:
        dtype = shape["dtype"]
        x = make.normal(shape["B"], 197, width, dtype=dtype)
        index = make.permutation(shape["B"], 197)[:, :kept].sort(dim=1).values.contiguous()
        weight, bias = make.normal(width, dtype=dtype), make.normal(width, dtype=dtype)
        residual = make.normal(shape["B"], 197, width, dtype=dtype) if full else None
        return x, index, weight, bias, 1e-6, residual, None

    def moved(arguments: Arguments, found: Any) -> int:
        kept_rows, normed = _tensors(found)
        return forms.nbytes(kept_rows) * (2 if full else 1) + forms.nbytes(kept_rows, normed, arguments[1])

    variants = (
        Variant("vp", lambda: forms.operator("gather_norm", "gather_norm"), "torch", True),
        Variant("torch", lambda: forms.gather_norm_torch, "torch"),
        Variant("torch compiled", lambda: compiled(forms.gather_norm_torch), "torch", bar=False),
    )
    said = {"N": 197, "K": kept, "B": shape["B"], "D": width, "residual": full, "dtype": shape["dtype"]}
    return Timed("gather_norm", said, build, variants, moved)


def _match_merge(shape: dict[str, Any], d: int, scored: bool) -> Timed:
    n, batch, heads = shape["N"], shape["B"], shape["H"]
    r = n // 4

    def build(make: Make) -> Arguments:
        x = make.normal(batch, n, heads * d, dtype=shape["dtype"])
        qkv = make.normal(batch, n, 3, heads, d, dtype=shape["dtype"])
        size = make.whole(4, batch, n).float() + 1.0
        if not scored:
            return x, qkv[:, :, 1], size, r, 1, None, 0.0
        # Half of the images merge and half are pruned, so that both policies cost time.
        sharp = make.normal(batch, n - 1) * torch.linspace(0, 3, batch, device=x.device)[:, None]
        scores = torch.softmax(sharp, dim=1)
        tau = float(scores.var(dim=1).median()) * (1 + 1e-4)
        return x, qkv[:, :, 1], size, r, 1, scores, tau

    variants = (
        Variant("vp", lambda: forms.operator("match_merge", "match_merge"), "torch", True),
        Variant("torch portable", lambda: forms.match_merge_portable, "torch"),
        Variant("torch textbook", lambda: forms.match_merge_textbook, "torch"),
        Variant("torch portable compiled", lambda: compiled(forms.match_merge_portable), "torch", bar=False),
    )
    said = {"N": n, "r": r, "B": batch, "H": heads, "scores": scored, "dtype": shape["dtype"]}
    return Timed("match_merge", said, build, variants)


def _select(shape: dict[str, Any], d: int) -> Timed:
    n, batch = shape["N"] - 1, shape["B"]
    k = round(0.7 * n)

    def build(make: Make) -> Arguments:
        return torch.softmax(make.normal(batch, n + 1), dim=1)[:, 1:], k, make.normal(batch, n + 1, shape["H"] * d)

    def two(arguments: Arguments) -> Arguments:
        return arguments[:2]

    variants = (
        Variant("vp", lambda: forms.operator("select", "select"), "torch", True, given=two),
        Variant("torch topk + sort", lambda: forms.select_torch, "torch", given=two),
        Variant("torch stable sort + sort", lambda: forms.select_stable, "stable", bar=False, given=two),
        Variant("torch topk + sort + gather", lambda: forms.select_gather, "gather", bar=False,
                given=lambda a: (a[0], a[2], a[1])),
    )  # fmt: skip

    def moved(arguments: Arguments, found: Any) -> int:
        return forms.nbytes(arguments[0], *_tensors(found))

    return Timed("select", {"n": n, "k": k, "B": batch, "D": shape["H"] * d}, build, variants, moved)


def _select_fuse(shape: dict[str, Any], d: int) -> Timed:
    n, batch, width = shape["N"] - 1, shape["B"], shape["H"] * d
    k = round(0.7 * n)

    def build(make: Make) -> Arguments:
        scores = torch.softmax(make.normal(batch, n + 1), dim=1)[:, 1:]
        return scores, make.normal(batch, n + 1, width, dtype=shape["dtype"]), k

    variants = (
        Variant("vp", lambda: forms.operator("select", "select_fuse"), "torch", True),
        Variant("torch", lambda: forms.select_fuse_torch, "torch"),
        Variant("torch compiled", lambda: compiled(forms.select_fuse_torch), "torch", bar=False),
    )

    def moved(arguments: Arguments, found: Any) -> int:
        rest = forms.nbytes(arguments[1]) * (n - k) // (n + 1)  # only rows that are fused need to be read
        return rest + forms.nbytes(arguments[0], *_tensors(found))

    said = {"n": n, "k": k, "B": batch, "D": width, "dtype": shape["dtype"]}
    return Timed("select_fuse", said, build, variants, moved)


def _merge_rows(shape: dict[str, Any], d: int) -> Timed:
    n, batch, width = shape["N"], shape["B"], shape["H"] * d
    kept = n - n // 4

    def build(make: Make) -> Arguments:
        order = make.permutation(batch, n)
        keep, source = order[:, :kept].sort(dim=1).values, order[:, kept:].contiguous()
        into = make.whole(kept, batch, n - kept)
        weight, own = make.uniform(batch, n - kept) + 0.5, make.uniform(batch, kept) + 0.5
        return make.normal(batch, n, width, dtype=shape["dtype"]), keep, source, into, weight, own

    variants = (
        Variant("vp", lambda: forms.operator("merge_rows", "merge_rows"), "torch", True),
        Variant("torch portable", lambda: forms.merge_rows_matmul, "torch"),
        Variant("torch scatter", lambda: part_of("merge_rows", "op", "merge_rows_torch"), "torch"),
    )
    said = {"N": n, "K": kept, "B": batch, "D": width, "dtype": shape["dtype"]}
    return Timed("merge_rows", said, build, variants)


def _density_merge(shape: dict[str, Any], d: int) -> Timed:
    n, batch, width = shape["N"], shape["B"], shape["H"] * d
    left = round(0.7 * (n - 1))
    clusters = round(0.15 * left)
    pairs = round(0.08 * (left - clusters))

    def build(make: Make) -> Arguments:
        x = make.normal(batch, n, width, dtype=shape["dtype"])
        return x, torch.softmax(make.normal(batch, n), dim=1), None, left + 1, clusters, pairs, 1, "attention"

    variants = (
        Variant("vp", lambda: forms.operator("density_merge", "density_merge"), "torch", True),
        Variant("torch portable", lambda: forms.density_merge_portable, "torch"),
        Variant("torch portable compiled", lambda: compiled(forms.density_merge_portable), "torch", bar=False),
    )
    said = {"N": n, "left": left + 1, "B": batch, "D": width, "dtype": shape["dtype"]}
    return Timed("density_merge", said, build, variants)


def compiled(form: forms.Form) -> forms.Form:
    """Compile anew for each row: beyond a few shapes of one function, torch.compile silently falls back to eager."""
    torch._dynamo.reset()
    found: forms.Form = torch.compile(form, dynamic=False, fullgraph=True)
    return found


@cache
def copy_rate() -> float:
    """Bytes read and written per second by a large copy, in this process."""
    return float(measure_ceilings(rounds=10)["copy_bytes_per_s"])


def measure(row: Timed, *, device: str = "cuda", only_warm: bool = False) -> dict[str, Any]:
    """Time all variants of a row against each other.

    Args:
        device: "cpu" runs every variant once on the host, without graphs.
        only_warm: Compile everything without timing.
    """
    cuda = device == "cuda"
    first = row.build(Make(device, 0))
    sets = [first]
    if cuda and not only_warm:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        sets += [row.build(Make(device, 1 + i)) for i in range(buffers_for(forms.nbytes(*first), l2) - 1)]
    calls: dict[str, Callable[[], object]] = {}
    moved, refused, answers = {}, {}, {}
    for variant in row.variants:
        try:
            form = variant.form()
            if not cuda and "compiled" in variant.name:
                continue
            answers[variant.name] = found = form(*variant.given(first))
            moved[variant.name] = row.moved(first, found)
            if only_warm:
                continue
            each = [partial(form, *variant.given(given)) for given in sets]
            calls[variant.name] = Graph(each, LAUNCHES) if cuda else each[0]
        except Exception as error:  # an unsupported shape or a failing compiler: continue with the others
            refused[variant.name] = first_line(error)
            if cuda:
                torch.cuda.synchronize()  # raises again if the device is lost
    if only_warm:
        return {"say": f"warm, {len(answers)} variants"}
    clock = CudaClock() if cuda else CpuClock()
    seconds = SAMPLE_SECONDS if cuda else 0.0
    times = interleave(calls, clock, rounds=ROUNDS if cuda else 1, sample_seconds=seconds)
    times = per_launch(times, LAUNCHES) if cuda else times
    rate = copy_rate() if cuda else None
    found_row = {
        "operator": row.operator, "shape": row.shape, "times": {name: each.to_dict() for name, each in times.items()},
        "refused": refused, "bytes": moved, "copy_bytes_per_s": rate, "buffers": len(sets),
        "clocks_after": clocks() if cuda else {}, **judge(row, times, moved, rate),
    }  # fmt: skip
    del calls, sets, answers
    if cuda:
        torch.cuda.empty_cache()
    return {**found_row, "say": say(found_row)}


def judge(row: Timed, times: dict[str, Timing], moved: dict[str, int], rate: float | None) -> dict[str, Any]:
    """Compare each kernel with the best torch alternative of its group, with the copy, and with the bars."""
    ratio_bar, share_bar = BARS[row.operator]
    judged = {}
    for variant in row.variants:
        if not variant.ours or variant.name not in times:
            continue
        rivals = [v.name for v in row.variants if not v.ours and v.bar and v.rival == variant.rival and v.name in times]
        best = min(rivals, key=lambda name: times[name].median, default=None)
        mine = times[variant.name].median
        ratio = times[best].median / mine if best else None
        share = moved[variant.name] / mine / rate if rate else None
        bars = [(ratio, ratio_bar), (share, share_bar)]
        # A bar without a torch alternative or a copy to compare with is neither met nor missed.
        met = [None if value is None else value >= bar for value, bar in bars if bar is not None]
        judged[variant.name] = {"rival": best, "ratio": ratio, "share": share, "met": met}
    return {"judged": judged}


def say(row: dict[str, Any]) -> str:
    parts = []
    for name, found in row["judged"].items():
        text = f"{name} {row['times'][name]['median'] * 1e6:.1f} us"
        text += f", {found['ratio']:.2f}x {found['rival']}" if found["ratio"] is not None else ""
        text += f", {found['share']:.0%} of copy" if found["share"] is not None else ""
        parts.append(text + (" NOT MET" if False in found["met"] else ""))
    return "; ".join(parts) + "".join(f"; {name} refused" for name in row["refused"])


def _tensors(found: Any) -> list[Tensor]:
    several = found if isinstance(found, tuple) else (found,)
    return [each for each in several if isinstance(each, Tensor)]


SOURCES = (
    "benchmarks/gpu/kernels.py",
    "benchmarks/gpu/forms.py",
    "benchmarks/gpu/timing.py",
    "kernels/vp_kernels/launch.py",
)
ROOMS = {"select_fuse": ("select",), "match_merge": ("match_merge", "merge_rows", "select")}


def rows(*, quick: bool = False, warm: bool = False) -> list[Row]:
    """Rows of the results; `warm`: the same names, compiled but not timed."""
    found = []
    for each in timed(quick=quick):
        rooms = ROOMS.get(each.operator, (each.operator,))
        mark = fingerprint(*SOURCES, *(f"kernels/vp_kernels/{room}" for room in rooms))
        part = "kernels-time"

        def run(each: Timed = each) -> dict[str, Any]:
            return measure(each, only_warm=warm)

        heavy = any("compiled" in variant.name for variant in each.variants)
        seconds = (25.0 if heavy else 15.0) if warm else 4.0
        found.append(Row(part, each.key, mark, seconds, run, each.operator))
    return found
