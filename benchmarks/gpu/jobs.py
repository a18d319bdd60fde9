"""Models to measure: engines, forms, plans of the reducers, and their order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.gpu.setup import fingerprint

MODELS = (
    "deit_small_patch16_224", "deit_base_patch16_224", "deit_tiny_patch16_224", "vit_large_patch16_224",
    "vit_base_patch16_384", "vit_large_patch16_384",
)  # fmt: skip
BATCHES = (256, 1, 64, 8)
DTYPES = ("bf16", "fp16")
RATIOS = (1.5, 2.0)
ENGINES = ("aoti", "aoti-graph", "compile", "compile-max", "eager")
USUAL_ENGINES = ("aoti", "aoti-graph", "compile", "eager")
FEW_IMAGES = 8  # up to this batch, launch overhead matters: also run AOTInductor inside a CUDA graph
# Arguments of build_plan besides the MACs. tau is PPT's for DeiT-S: random weights give flat scores, so it pools.
REDUCERS: dict[str, dict[str, Any]] = {
    "static": {"method": "random"},
    "tome": {"method": "tome"},
    "ppt": {"method": "ppt", "tau": 7e-5},
    "evit": {"method": "evit"},
    "topk": {"method": "topk"},
    "bat": {"method": "bat"},
    "diffrate": {"method": "diffrate"},
    "pitome": {"method": "pitome"},
    "gtp": {"method": "gtp"},
}
SOURCES = (
    "exporter/vp_exporter", "kernels/vp_kernels", "engines/vp_engines/errors.py",
    "benchmarks/gpu/models.py", "benchmarks/gpu/jobs.py", "benchmarks/gpu/timing.py",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A model as run by an engine.

    Attributes:
        form: "timm" (its own module), "portable" or "vp" (ours, with torch operations or our kernels).
        reducer: None for the dense model.
    """

    model: str
    dtype: str
    batch: int
    engine: str
    form: str
    reducer: str | None = None
    ratio: float = 1.0

    @property
    def group(self) -> str:
        return f"{self.model} {self.dtype} B={self.batch}"

    @property
    def name(self) -> str:
        return f"{self.form} {self.engine}"

    @property
    def key(self) -> str:
        what = "dense" if self.reducer is None else f"{self.reducer} {self.ratio:g}"
        return f"{self.group} {what} {self.name}"

    @property
    def package(self) -> str:
        """Name of its AOTInductor package, shared by all batch sizes and both ways to run it."""
        what = f"{self.model} {self.dtype} {self.form} {self.reducer} {self.ratio} {mark()} {torch.__version__}"
        return f"{self.model}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt2"


@cache
def mark() -> str:
    return fingerprint(*SOURCES)


@dataclass(frozen=True)
class Wanted:
    """Selection on the command line."""

    models: Sequence[str] = MODELS
    batches: Sequence[int] = BATCHES
    dtypes: Sequence[str] = DTYPES
    reducers: Sequence[str] = tuple(REDUCERS)
    engines: Sequence[str] = USUAL_ENGINES
    ratios: Sequence[float] = RATIOS

    def groups(self) -> Iterator[tuple[str, str, int]]:
        """(model, dtype, batch), most important first: batch sizes of the two bars, first two models, bf16."""
        rank = {name: place for place, name in enumerate(MODELS)}
        order = sorted(
            itertools.product(self.models, self.dtypes, self.batches),
            key=lambda g: (g[1] != "bf16", g[2] not in (256, 1), rank.get(g[0], 99), BATCHES.index(g[2])),
        )
        yield from order

    def dense(self, model: str, dtype: str, batch: int) -> list[Job]:
        """Dense jobs: timm's own module, always eager and compiled (also with max-autotune), then ours.

        The fastest of all is the dense baseline.
        """
        engines = list(dict.fromkeys(["eager", "compile", "compile-max", *self._engines(batch, eager=True)]))
        jobs = [Job(model, dtype, batch, engine, "timm") for engine in engines]
        for form in ("portable", "vp"):
            jobs += [Job(model, dtype, batch, engine, form) for engine in self._engines(batch, eager=False)]
        return jobs

    def reduced(self, model: str, dtype: str, batch: int) -> list[Job]:
        """Our kernels at the first ratio on each engine, then at the others, then torch operations for comparison."""
        engines, jobs = self._engines(batch, eager=False), []
        for form, ratios in (("vp", self.ratios), ("portable", self.ratios[:1])):
            for ratio, engine in itertools.product(ratios, engines if form == "vp" else engines[:1]):
                jobs += [Job(model, dtype, batch, engine, form, reducer, ratio) for reducer in self.reducers]
        return jobs

    def _engines(self, batch: int, *, eager: bool) -> list[str]:
        """For few images the graph first; for many, a graph gains nothing over AOTInductor alone."""
        found = [e for e in self.engines if (e != "eager" or eager) and (e != "aoti-graph" or batch <= FEW_IMAGES)]
        return sorted(found, key=lambda engine: engine == "aoti") if batch <= FEW_IMAGES else found


@cache
def describe(model: str) -> Any:
    """Description of a model by name, without weights."""
    from vp_exporter.model.loading import describe_by_name

    return describe_by_name(model, {})


@cache
def plan_for(model: str, reducer: str, ratio: float) -> Any:
    """A plan with about 1 / ratio of the dense model's MACs."""
    from vp_exporter.methods import MethodRequest, build_plan

    return build_plan(MethodRequest(target_macs=1 / ratio, **REDUCERS[reducer]), describe(model))


def mac_ratio(model: str, plan: Any) -> float:
    """Dense MACs divided by reduced MACs."""
    from vp_exporter.plan.macs import mac_ratio as ratio

    return float(ratio(describe(model), plan))
