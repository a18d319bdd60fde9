"""Time alternatives to the tiles, warps and stages that an operator's `config` chooses, for kernel authors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.cases import Make
from benchmarks.gpu.runs import Row
from benchmarks.gpu.setup import fingerprint

OPERATORS = ("attention", "gather_norm")
TILES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "attention_whole": {"BLOCK_M": (64, 128)},
    "attention_looped": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128)},
    "gather_norm_kernel": {"ROWS": (1, 2, 4, 8)},
}
WARPS = {"attention": (4, 8), "gather_norm": (1, 2, 4)}
STAGES = {"attention": (1, 2, 3), "gather_norm": (1,)}
FAR = 0.05  # a candidate whose result differs by more, relative to the largest value, is wrong


@contextmanager
def using(module: Any, chosen: Any) -> Iterator[None]:
    """Make the kernel module's `config` return `chosen` within the context."""
    own = module.config
    module.config = lambda *args, **named: chosen
    try:
        yield
    finally:
        module.config = own


def base(module: Any, launch: Callable[[], Any]) -> Any:
    """The result of `config` for a launch (of its first call, if there are two)."""
    asked: list[Any] = []
    own = module.config

    def ask(*args: Any, **named: Any) -> Any:
        asked.append(own(*args, **named))
        return asked[-1]

    module.config = ask
    try:
        launch()
    finally:
        module.config = own
    return asked[0]


def candidates(module: Any, operator: str, chosen: Any) -> dict[str, Any]:
    """Name -> config: the same kernel with other tiles, and attention's other kernel."""
    found = {"chosen": chosen}
    kinds = {_name(chosen.kernel): chosen}
    looped = getattr(module, "attention_looped", None)
    if operator == "attention" and looped is not None and _name(chosen.kernel) != "attention_looped":
        kept = {key: value for key, value in chosen.constants.items() if key not in ("P0", "P1", "P2")}
        kinds["attention_looped"] = dataclasses.replace(chosen, kernel=looped, constants={**kept, "BLOCK_N": 64})
    for kind, start in kinds.items():
        tiles = {key: values for key, values in TILES.get(kind, {}).items() if key in start.constants}
        for values in itertools.product(*tiles.values()):
            sizes = dict(zip(tiles, values, strict=True))
            for warps, stages in itertools.product(WARPS[operator], STAGES[operator]):
                made = dataclasses.replace(
                    start, constants={**start.constants, **sizes}, num_warps=warps, num_stages=stages
                )
                said = " ".join(f"{key}={value}" for key, value in sizes.items())
                if made != chosen:
                    found[f"{kind} {said} warps={warps} stages={stages}"] = made
    return found


def _name(kernel: Any) -> str:
    return str(getattr(kernel, "__name__", None) or getattr(getattr(kernel, "fn", None), "__name__", "kernel"))


def tune(row: kernels.Timed, *, device: str = "cuda", only_warm: bool = False) -> dict[str, Any]:
    """Time every candidate of a row's operator; returns the fastest whose result agrees with the default's."""
    module = import_module(f"vp_kernels.{row.operator}.kernel")
    ours = next(variant for variant in row.variants if variant.ours)
    launch = getattr(module, f"launch_{row.operator}")
    first = ours.given(row.build(Make(device, 0)))
    chosen = base(module, lambda: launch(*first))
    right = kernels._tensors(launch(*first))[0].float()
    variants = []
    wrong = {}

    def form(config: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with using(module, config):
                return launch(*arguments)

        return run

    for name, config in candidates(module, row.operator, chosen).items():
        try:
            answer = kernels._tensors(form(config)(*first))[0].float()
        except Exception as error:  # out of registers or shared memory, as expected in a search
            wrong[name] = kernels.first_line(error)
            continue
        if not bool((answer - right).abs().max() <= FAR * right.abs().max()):
            wrong[name] = "another answer"
            continue
        variants.append(dataclasses.replace(ours, name=name, form=partial(form, config)))
    found = kernels.measure(dataclasses.replace(row, variants=tuple(variants)), device=device, only_warm=only_warm)
    found["refused"] = {**found.get("refused", {}), **wrong}
    if only_warm:
        return found
    medians = {name: timing["median"] for name, timing in found["times"].items()}
    order = sorted(medians, key=lambda name: medians[name])
    best = order[0]
    gain = medians["chosen"] / medians[best] if "chosen" in medians else float("nan")
    shown = "; ".join(f"{name} {medians[name] * 1e6:.1f} us" for name in order[:4])
    return {**found, "best": best, "gain": gain, "say": f"best {best} ({gain:.2f}x the chosen): {shown}"}


def rows(*, warm: bool = False) -> list[Row]:
    """Rows: bf16, batch 256, 6 heads of 64, every token count."""
    found = []
    for each in kernels.timed():
        if each.operator not in OPERATORS or each.shape.get("dtype") != "bf16" or each.shape["B"] != 256:
            continue
        if each.shape.get("H", 6) != 6 or each.shape.get("D", 384) != 384:
            continue
        mark = fingerprint("benchmarks/gpu/tune.py", *kernels.SOURCES, f"kernels/vp_kernels/{each.operator}")

        def run(each: kernels.Timed = each) -> dict[str, Any]:
            return tune(each, only_warm=warm)

        found.append(Row("tune", each.key, mark, 60.0 if warm else 20.0, run, each.operator))
    return found


def check_on_cpu(row: kernels.Timed) -> list[str]:
    """Names of the candidates, after checking that patching `config` affects the launcher; nothing is timed."""
    module = import_module(f"vp_kernels.{row.operator}.kernel")
    ours = next(variant for variant in row.variants if variant.ours)
    first = ours.given(row.build(Make("cpu", 0)))
    chosen = base(module, lambda: getattr(module, f"launch_{row.operator}")(*first))
    assert isinstance(first[0], torch.Tensor)
    return list(candidates(module, row.operator, chosen))
