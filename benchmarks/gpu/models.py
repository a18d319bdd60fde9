"""Time whole models, dense and reduced, on torch's engines: images per second, and realised efficiency.

A row alternates rounds of the reduced model with the best dense model of the same batch and dtype, and with the dense
model on the same engine.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor
import torch.nn as nn
from torch import Tensor

from benchmarks.gpu.cases import TORCH_DTYPES
from benchmarks.gpu.jobs import Job, Wanted, describe, mac_ratio, mark, plan_for
from benchmarks.gpu.machine import clocks
from benchmarks.gpu.runs import PostponedError, Results, Row
from benchmarks.gpu.setup import first_line
from benchmarks.gpu.timing import CudaClock, Graph, Timing, interleave

STATIC_BAR, CHOOSING_BAR, ONE_IMAGE_BAR = 0.95, 0.90, 1.15
BAR_BATCH = 256
SAMPLE_SECONDS, ROUNDS = 0.03, 20


class TimmDense(nn.Module):
    """timm's module with our signature: float32 images in, float32 logits out."""

    def __init__(self, vit: nn.Module, dtype: str) -> None:
        super().__init__()
        self.vit, self.dtype = vit.to(TORCH_DTYPES[dtype]), TORCH_DTYPES[dtype]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.vit(images.to(self.dtype))
        return logits.float()


def create(model: str, **changes: Any) -> nn.Module:
    """Create a model with random weights, equal in every process."""
    import timm

    torch.manual_seed(0)
    vit: nn.Module = timm.create_model(model, pretrained=False, **changes)
    return vit.eval()


def module_of(job: Job, vit: nn.Module, description: Any, plan: Any) -> nn.Module:
    """The module for a job's engine.

    Raises:
        LookupError: if this working tree cannot run our kernels in a model (yet).
    """
    from vp_exporter.rewrite.reduced_vit import ReducedViT

    if job.form == "timm":
        return TimmDense(vit, job.dtype).eval()
    model = ReducedViT(vit, description, plan)
    if "kernels" in inspect.signature(model.for_export).parameters:
        return model.for_export(job.dtype, kernels=job.form).eval()
    if job.form == "vp":
        raise LookupError('ReducedViT.for_export takes no kernels="vp"')
    return model.for_export(job.dtype).eval()


class Bench:
    """Models of one group on the GPU; engines are built on demand."""

    def __init__(self, model: str, dtype: str, batch: int, work: Path) -> None:
        self.model, self.dtype, self.batch, self.work = model, dtype, batch, work
        size = describe(model).image_size
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, *size, generator=generator).cuda()
        self._vit: nn.Module | None = None
        self._engines: dict[Job, Callable[[], Any]] = {}
        torch._dynamo.config.recompile_limit = 10_000  # every plan is a new shape for one forward()
        torch._dynamo.config.accumulated_recompile_limit = 100_000

    def module(self, job: Job) -> nn.Module:
        if self._vit is None:
            self._vit = create(job.model)
        plan = None if job.reducer is None else plan_for(job.model, job.reducer, job.ratio)
        made = module_of(job, copy.deepcopy(self._vit), describe(job.model), plan)
        return made.requires_grad_(False).cuda()

    @torch.no_grad()
    def engine(self, job: Job, *, keep: bool = False) -> Callable[[], Any]:
        """A function that runs the job's engine on the images."""
        if job in self._engines:
            return self._engines[job]
        images = self.images
        if job.engine.startswith("aoti"):
            graphed = job.engine == "aoti-graph"
            # Its run-time locks query events, which graph capture forbids; torch provides this switch for CUDA graphs.
            runner = torch._inductor.aoti_load_package(str(self.package(job)), run_single_threaded=graphed)
            call: Callable[[], Any] = lambda: runner(images)  # noqa: E731
        else:
            module = self.module(job)
            if job.engine != "eager":
                mode = "max-autotune-no-cudagraphs" if job.engine == "compile-max" else None
                module = torch.compile(module, dynamic=False, fullgraph=True, mode=mode)
            call = lambda: module(images)  # noqa: E731
        if job.engine in ("compile", "compile-max", "aoti-graph"):
            call()  # compiles and loads, outside the streams used for capture
            torch.cuda.synchronize()
            call = Graph([call], 1)
        if keep:
            self._engines[job] = call
        return call

    def package(self, job: Job) -> Path:
        """AOTInductor package of a job, with a dynamic batch as in vp-export; built if missing."""
        path = self.work / "aoti" / job.package
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            module = self.module(job)
            example = torch.zeros(2, *self.images.shape[1:], device="cuda")  # a batch of 1 would become a constant
            axes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
            with torch.no_grad():
                program = torch.export.export(module, (example,), dynamic_shapes=axes, strict=False)
                partial = path.with_name(f"{os.getpid()}-{path.name}")
                torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
            os.replace(partial, path)
        return path

    def warm(self, job: Job) -> dict[str, Any]:
        """Build what a later process only loads."""
        if job.engine.startswith("aoti"):
            self.package(job)
        else:
            with torch.no_grad():
                self.engine(job)()
        torch.cuda.synchronize()
        return {"say": "built"}

    def logits(self, call: Callable[[], Any]) -> Tensor:
        with torch.no_grad():
            found = call()
        found = call.results[0] if isinstance(call, Graph) else found
        torch.cuda.synchronize()
        answer: Tensor = found[0] if isinstance(found, list | tuple) else found
        return answer.float().clone()

    def time(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        with torch.no_grad():
            return interleave(calls, CudaClock(), rounds=ROUNDS, sample_seconds=SAMPLE_SECONDS)


def measure_dense(bench: Bench, jobs: Sequence[Job], broken: Mapping[str, str]) -> dict[str, Any]:
    """Time all dense models against each other.

    Args:
        broken: Jobs (by key) whose build has failed, and why.
    """
    calls, refused, answers = {}, {}, {}
    for job in jobs:
        print(f"{job.group} dense: {job.name}", flush=True)  # if the process dies, the last line shows where
        try:
            if job.key in broken:
                raise RuntimeError(broken[job.key])
            calls[job.name] = bench.engine(job, keep=True)
            answers[job.name] = bench.logits(calls[job.name])
        except Exception as error:  # a failing engine does not affect the others
            calls.pop(job.name, None)
            refused[job.name] = first_line(error)
            torch.cuda.synchronize()  # raises again if the device is lost
    before, times = clocks(), bench.time(calls)
    found = dense_result(times, bench.batch)
    reference = next(iter(answers.values()))
    apart = {name: _apart(answer, reference) for name, answer in answers.items()}
    return {**_facts(jobs[0]), **found, "refused": refused, "apart": apart,
            "clocks_before": before, "clocks_after": clocks()}  # fmt: skip


def dense_result(times: dict[str, Timing], batch: int) -> dict[str, Any]:
    """Times, the fastest form and engine overall, and the fastest form on each engine."""
    best = min(times, key=lambda name: times[name].median)
    engines: dict[str, str] = {}
    for name in sorted(times, key=lambda each: times[each].median):
        engines.setdefault(name.split()[1], name)
    rate = batch / times[best].median
    said = ", ".join(f"{name} {found.median * 1e3:.3f} ms" for name, found in times.items())
    return {
        "times": {name: found.to_dict() for name, found in times.items()}, "best": best, "best_of_engine": engines,
        "say": f"best {best}, {rate:,.0f} img/s ({said})",
    }  # fmt: skip


def measure_reduced(bench: Bench, job: Job, dense: dict[str, Any]) -> dict[str, Any]:
    """Time a reduced model against the fastest dense one and the dense one on the same engine."""
    rivals = {"dense": dense["best"], "same": dense["best_of_engine"].get(job.engine)}
    calls = {}
    for place, name in rivals.items():
        if name is not None and not (place == "same" and name == rivals["dense"]):
            form, engine = name.split()
            calls[place] = bench.engine(Job(job.model, job.dtype, job.batch, engine, form), keep=True)
    calls["reduced"] = bench.engine(job)
    answer = bench.logits(calls["reduced"])
    before, times = clocks(), bench.time(calls)
    plan = plan_for(job.model, job.reducer or "", job.ratio)
    judged = judge(job, times, mac_ratio(job.model, plan), rivals["same"] is not None)
    finite = bool(answer.isfinite().all())
    say = judged["say"] + ("" if finite else "; LOGITS NOT FINITE")
    return {**_facts(job), **judged, "dense": rivals["dense"], "same": rivals["same"], "finite": finite,
            "tokens": [row.mlp for row in plan.tokens()], "say": say,
            "times": {name: found.to_dict() for name, found in times.items()},
            "clocks_before": before, "clocks_after": clocks()}  # fmt: skip


def judge(job: Job, times: dict[str, Timing], macs: float, has_same: bool) -> dict[str, Any]:
    """Speed-ups, the efficiency, and the result of the bar for this row."""
    mine = times["reduced"].median
    speedup = times["dense"].median / mine
    same = times.get("same", times["dense"]).median / mine if has_same else None
    met: bool | None = None
    bar = ""
    if job.form == "vp" and job.batch == BAR_BATCH:
        least = STATIC_BAR if job.reducer == "static" else CHOOSING_BAR
        met, bar = speedup / macs >= least, f"efficiency {least:.2f}"
    elif job.form == "vp" and job.batch == 1 and same is not None:
        met, bar = same >= ONE_IMAGE_BAR, f"speed-up {ONE_IMAGE_BAR:.2f} on the same engine"
    said = f"{mine * 1e3:.3f} ms, {job.batch / mine:,.0f} img/s, {speedup:.3f}x at {macs:.3f}x MACs"
    said += f", efficiency {speedup / macs:.3f}" + (f", same engine {same:.3f}x" if same is not None else "")
    return {"macs": macs, "speedup": speedup, "same_speedup": same, "efficiency": speedup / macs, "met": met,
            "bar": bar, "say": said + ("" if met is None else f": {bar} {'met' if met else 'NOT MET'}")}  # fmt: skip


def _facts(job: Job) -> dict[str, Any]:
    return {"model": job.model, "dtype": job.dtype, "batch": job.batch, "engine": job.engine, "form": job.form,
            "reducer": job.reducer, "ratio": job.ratio}  # fmt: skip


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-12))


def rows(wanted: Wanted, group: tuple[str, str, int], work: Path, known: Results, built: Results) -> list[Row]:
    """Rows of a group: its dense models, then the reduced ones.

    Args:
        known: Results so far, which name the fastest dense model.
        built: Results of `warm_rows` on this machine.
    """
    bench = cache(lambda: Bench(*group, work))
    dense, name = wanted.dense(*group), " ".join([group[0], group[1], f"B={group[2]}"])

    def failure(job: Job) -> str | None:
        """Why a job's build failed, to avoid spending the time again."""
        tried = built.fresh(_warm(job, dict))
        return None if tried is None or "error" not in tried else f"its build failed: {tried['error']}"

    def time_dense() -> dict[str, Any]:
        broken = {job.key: why for job in dense if (why := failure(job)) is not None}
        return measure_dense(bench(), dense, broken)

    # With other engines the fastest may differ: measure again.
    asked = f"{mark()} {' '.join(job.name for job in dense)}"
    first = Row("models", f"{name} dense", asked, 60.0, time_dense, name)
    found = [first]
    for job in wanted.reduced(*group):

        def run(job: Job = job) -> dict[str, Any]:
            best = known.rows.get(first.name) or {}
            if "best" not in best:
                raise PostponedError(f"no dense model of {name} has been timed")
            why = failure(job)
            if why is not None:
                raise RuntimeError(why)
            try:
                return measure_reduced(bench(), job, best)
            finally:
                torch.cuda.empty_cache()

        quick = built.fresh(_warm(job, dict))
        seconds = 70.0 if quick is None else 6.0 if job.engine.startswith("aoti") else 15.0
        found.append(Row("models", job.key, mark(), seconds, run, name))
    return found


def warm_rows(wanted: Wanted, group: tuple[str, str, int], work: Path) -> list[Row]:
    """Builds that later processes load: packages, and the compiler's cache."""
    bench = cache(lambda: Bench(*group, work))
    found: dict[str, Row] = {}
    for job in [*wanted.dense(*group), *wanted.reduced(*group)]:
        if job.engine != "eager":
            row = _warm(job, lambda job=job: bench().warm(job))  # type: ignore[misc]
            found.setdefault(row.key, row)
    return list(found.values())


def _warm(job: Job, run: Callable[[], dict[str, Any]]) -> Row:
    """A single row for both ways to run a package, and for all batch sizes."""
    key = f"aoti {job.package}" if job.engine.startswith("aoti") else job.key
    return Row("build", key, mark(), 45.0, run, job.group)
