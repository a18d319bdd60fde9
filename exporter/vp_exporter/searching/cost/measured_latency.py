"""Measure a latency table: the time of one block on the target engine, at each token count.

Two engines are built for each count, of the model cut to one and to three blocks, with all but that many patches
dropped before block 0. Half of their difference is the time of one block, free of the overhead of the call; the rest of
the first is everything else: copies, embedding, head.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
import torch.nn as nn

from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep
from vp_exporter.rewrite.reduced_vit import Kernels, ReducedViT
from vp_exporter.searching.cost.latency import LatencyTable, timed_model
from vp_exporter.utils.progress import SILENT, Progress

if TYPE_CHECKING:
    from vp_engines.backends.base import Backend, BuildOptions, Precision, Runner

SHORT, LONG = 1, 3  # blocks of the two engines


def default_counts(patches: int) -> tuple[int, ...]:
    """About 12 patch counts to measure, from 8 to all; multiples of 8 if there are enough."""
    if patches < 48:
        spread = np.linspace(1, patches, 8)
        return tuple(np.unique(spread.round().astype(int)).tolist())
    spread = np.linspace(8, patches, 12) / 8
    return tuple(sorted({*(8 * np.floor(spread).astype(int)).tolist(), patches}))


def measure_table(
    vit: nn.Module,
    description: ModelSpec,
    *,
    engine: str = "ort",
    precision: str | None = None,
    batch: int = 8,
    counts: Sequence[int] | None = None,
    seconds: float = 30.0,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    kernels: Kernels = "portable",
    progress: Progress = SILENT,
) -> LatencyTable:
    """Time one block of a model on an engine.

    Every round runs all engines once, in random order, so that drift affects all counts equally. The result is the
    median over rounds of the differences within a round. A run includes copies from and to the host, as in
    vp_exporter.validation.latency.

    Args:
        engine: A name in vp_engines.backends.ENGINES.
        precision: None for the engine's default.
        batch: Images per run.
        counts: Patch counts to measure, in any order (prefix tokens not counted); the dense count is added. None for
            `default_counts`.
        seconds: Timed work for all counts together, not including building the engines (two per count).
        threads: CPU threads per run; None for the engine's default.

    Raises:
        SearchError: if a count or the batch is out of range, blocks differ, or times are too noisy.
        EngineUnavailableError, BuildError: from the engine.
    """
    from vp_engines.backends import get_backend
    from vp_engines.backends.base import BuildOptions
    from vp_engines.errors import EngineUnavailableError
    from vp_exporter.validation.latency import environment

    model = timed_model(description)
    patches = description.patches
    asked = sorted({*(default_counts(patches) if counts is None else counts), patches})
    if asked[0] < 1 or asked[-1] > patches:
        raise SearchError(f"patch counts {asked[0]} to {asked[-1]}", expected=f"1 to {patches}")
    if batch < 1:
        raise SearchError(f"a batch of {batch} images", expected="1 or more")
    backend = get_backend(engine)
    chosen = cast("Precision", precision or backend.precisions[0])
    ready = backend.available("build")
    if not ready.ok:
        raise EngineUnavailableError(f"engine '{engine}' cannot build here: {ready.reason}")
    backend.check_precision(chosen)
    options = BuildOptions(min_batch=1, opt_batch=batch, max_batch=batch, device=device)
    backend.check_options(options)

    cut = {blocks: _cut(vit, description, blocks) for blocks in (SHORT, LONG)}
    with ExitStack() as stack:
        runners: list[Runner] = []
        for count in progress.track(asked, total=len(asked), description=f"building blocks for {engine}"):
            for blocks in (SHORT, LONG):
                reduced = ReducedViT(*cut[blocks], _plan(cut[blocks][1], count))
                runner = _open(
                    backend, reduced.for_export(chosen, backend.attention_form, kernels), chosen, options, threads
                )
                runners.append(stack.enter_context(runner))
        images = np.random.default_rng(0).standard_normal(
            (batch, description.in_chans, *description.image_size), dtype=np.float32
        )
        with progress.stage("timing one block at each token count"):
            taken = _rounds(runners, images, seconds)
    short, long = taken[:, 0::2], taken[:, 1::2]
    block = np.median(long - short, axis=0) / (LONG - SHORT)
    if not (block > 0).all():
        raise SearchError(
            f"the time of a block is lost in the noise at {asked[int(np.argmin(block))]} patches",
            expected=f"{LONG} blocks to take longer than {SHORT}", fix="time for longer, or a larger batch",
        )  # fmt: skip
    overhead = np.maximum(np.median(short, axis=0) - SHORT * block, 0.0)
    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device
    return LatencyTable(
        engine=engine,
        precision=chosen,
        device=device,
        batch=batch,
        threads=threads,
        model=model,
        tokens=tuple(description.prefix_tokens + n for n in asked),
        milliseconds=tuple(block.tolist()),
        overhead_ms=tuple(overhead.tolist()),
        repeats=len(taken),
        environment=environment(engine=engine, engine_version=backend.version(), device=name, threads=threads),
    )


def _cut(vit: nn.Module, description: ModelSpec, blocks: int) -> tuple[nn.Module, ModelSpec]:
    """Model cut or extended to `blocks` blocks. Extra ones are copies, since shared weights would stay in the cache."""
    twin = copy.deepcopy(vit)
    twin.blocks = nn.Sequential(*(copy.deepcopy(vit.blocks[i % description.depth]) for i in range(blocks)))
    return twin, replace(description, blocks=description.blocks[:1] * blocks)


def _plan(description: ModelSpec, count: int) -> ReductionPlan | None:
    """Keep `count` patches from block 0 on, spread over the image; the choice does not affect the time."""
    if count == description.patches:
        return None
    keep = np.arange(count) * description.patches // count
    return ReductionPlan(PlanModel.of(description), (StaticStep(0, tuple(keep.tolist())),))


def _open(
    backend: Backend, model: ReducedViT, precision: Precision, options: BuildOptions, threads: int | None
) -> Runner:
    """Lower, build and load a model prepared by `for_export`, without leaving files."""
    from vp_engines.backends.base import BuildSource, RunOptions
    from vp_exporter.lowering import export_program, lower_onnx, signature

    inputs, outputs = signature(model)
    with tempfile.TemporaryDirectory(prefix="vp-latency-") as scratch:
        folder = Path(scratch) / "engine"
        folder.mkdir()
        if backend.source == "program":
            program = export_program(model.to(options.device))
            source = BuildSource(precision, inputs, outputs, program=program, attention_blocks=model.fused_attentions)
        else:
            assert backend.opset is not None
            onnx = Path(scratch) / "model.onnx"
            lower_onnx(model, onnx, opset=backend.opset, functions=backend.onnx_functions)
            source = BuildSource(precision, inputs, outputs, onnx=onnx, attention_blocks=model.fused_attentions)
        built = backend.build(source, folder, options)
        files = {name: (folder / name).read_bytes() for name in built.files}
        how = RunOptions(device=options.device, threads=threads)
        return backend.open(built.artefact, files, inputs, outputs, built.requirements, how)


def _rounds(runners: Sequence[Runner], images: np.ndarray, seconds: float) -> np.ndarray:
    """Milliseconds, float64 [rounds, runners], interleaved.

    Raises:
        SearchError: if an output is not finite; such an engine is useless, whatever its time.
    """
    from vp_exporter.validation.finite import nonfinite_rows
    from vp_exporter.validation.latency import MAX_ROUNDS, MIN_ROUNDS, WARM_UP_CALLS

    quickest = math.inf
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        outputs = [runner.run(images) for runner in runners]
        quickest = min(quickest, time.perf_counter() - start)
        if any(nonfinite_rows(found, len(images)).any() for found in outputs):
            raise SearchError(
                "a timed engine gives NaN or infinite outputs", expected="finite ones", fix="use a wider `precision`"
            )
    rounds = int(np.clip(seconds / max(quickest, 1e-9), MIN_ROUNDS, MAX_ROUNDS))
    taken, rng = np.empty((rounds, len(runners))), np.random.default_rng(0)
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for row in taken:
            for which in rng.permutation(len(runners)):
                start_ns = time.perf_counter_ns()
                runners[which].run(images)
                row[which] = (time.perf_counter_ns() - start_ns) / 1e6
    finally:
        if was_on:
            gc.enable()
    return taken
