"""Terminal output of plans, bundles, verdicts and profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from vp_engines.backends import ENGINES, get_backend
from vp_engines.manifest import Manifest, Preprocessing, TensorInfo
from vp_exporter.cli.console import in_options, stderr, stdout
from vp_exporter.cli.tables import bare, facts, heading, table
from vp_exporter.profiling.groups import GROUPS
from vp_exporter.profiling.measure import Profile, Profiled
from vp_exporter.validation.baseline import DENSE, Baseline
from vp_exporter.validation.latency import LatencyRow
from vp_exporter.validation.report import ReportData

if TYPE_CHECKING:
    from vp_exporter.searching.pipeline import SearchResult


def macs(value: float) -> str:
    """Format a number of MACs: 1234567890 -> "1.235 G"."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:.0f}"


def tokens(rows: Sequence[Sequence[int]], dense: int) -> None:
    """Print a bar per block: its tokens relative to the dense model.

    Args:
        rows: (tokens in attention, tokens in MLP) of each block.
        dense: Tokens of the dense model.
    """
    labels = [str(attention) if attention == mlp else f"{attention} > {mlp}" for attention, mlp in rows]
    beside = 10 + max(map(len, labels))
    whole = max(1, min(40, stdout.width - beside))
    heading("tokens per block")
    drawn = bare(show_header=False)
    for block, ((attention, _), label) in enumerate(zip(rows, labels, strict=True)):
        width = round(whole * attention / dense)
        drawn.add_row(f"[dim]{block:3d}[/]", label, f"[cyan]{'█' * width}[/][dim]{'░' * (whole - width)}[/]")
    stdout.print(drawn)


def latency(rows: Sequence[LatencyRow], baseline: Baseline = DENSE) -> None:
    """Print the latency of baseline and reduced engine, one row per batch size."""
    columns = ("batch", baseline.label, baseline.own, "speed-up", "95% interval", "MAC ratio", "efficiency", "claim")
    cells = [
        (
            str(row.batch),
            f"{row.dense.median_ms:.2f}",
            f"{row.reduced.median_ms:.2f}",
            f"{row.speedup.value:.3f}x",
            f"{row.speedup.low:.3f}-{row.speedup.high:.3f}",
            f"{row.mac_ratio:.3f}" if row.mac_ratio else "-",
            f"{row.efficiency:.3f}" if row.efficiency else "-",
            row.outcome,
        )
        for row in rows
    ]
    table("latency, median ms", columns, cells)


def search(result: SearchResult, out: Path) -> None:
    """Print the stages of a search, its verdict and the path of the plan."""
    cells = [
        (
            row["stage"] + (" (winner)" if row["stage"] == result.winner else ""),
            f"{row['macs_share']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['agreement']:.2f}%",
            f"{row['seconds']:.1f}",
        )
        for row in [*result.baselines, *result.stages]
        if "kl" in row
    ]
    columns = ("stage", "MACs", "held-out KL", "agreement", "seconds")
    table(f"search, {result.plan.method}", columns, cells)
    if result.verdict is not None:
        stdout.print(result.verdict.text, markup=False, soft_wrap=True)
    model = result.plan.model
    tokens([(row.attention, row.mlp) for row in result.plan.tokens()], model.prefix_tokens + model.patches)
    for text in result.warnings:
        stdout.print(f"note: {text}", markup=False, soft_wrap=True)
    stdout.print(f"wrote {out} (MAC ratio {result.mac_ratio:.3f})", markup=False, soft_wrap=True)


def report(data: ReportData, *, brief: bool = False) -> None:
    """Print the verdict, then (unless `brief`) the measurements."""
    baseline = data.baseline
    colour = {"passed": "green", "failed": "red", "measured": "cyan", "unvalidated": "yellow"}[data.verdict.status]
    stdout.print(f"[bold {colour}]{data.verdict.status}[/]: {escape(data.verdict.headline)}", soft_wrap=True)
    if brief:
        return
    for check in data.verdict.checks:
        mark = "[green]ok[/]  " if check.passed else "[red]miss[/]"
        stdout.print(f"  {mark} {escape(check.explanation)}", soft_wrap=True)
    if data.latency:
        latency(data.latency, baseline)
    if (found := data.accuracy) is not None:
        rows: list[tuple[str, Any]] = [
            ("images", found.images if not found.skipped else f"{found.images} ({found.skipped} skipped)")
        ]
        if found.top1_difference is not None:
            change = found.top1_difference
            rows += [
                (f"top-1 {baseline.label}", f"{found.dense_top1:.2f}%"),
                (f"top-1 {baseline.own}", f"{found.reduced_top1:.2f}%"),
                ("difference", f"{change.value:+.2f} points, 95% interval {change.low:+.2f} to {change.high:+.2f}"),
            ]
        rows.append(("agreement", f"{found.agreement.value:.2f}%"))
        if found.kl is not None:
            rows.append((f"KL to {baseline.label}", f"{found.kl.value:.4f} nats"))
        if found.parity is not None and found.parity.max_abs is not None:
            rows.append(("engine against PyTorch", f"max abs logit difference {found.parity.max_abs:.2g}"))
        facts("accuracy", rows)
    if data.preprocessing is not None:
        preprocessing(data.preprocessing)
    for text in data.baseline.notes:
        stdout.print(f"[cyan]note:[/] {escape(in_options(text))}", soft_wrap=True)
    for text in data.warnings:
        stdout.print(f"[yellow]note:[/] {escape(in_options(text))}", soft_wrap=True)


def preprocessing(found: Preprocessing) -> None:
    """Print the preprocessing in one line."""
    stdout.print(f"preprocessing: {escape(found.summary())}", soft_wrap=True)


def manifest(info: Manifest, digest: str) -> None:
    """Print a bundle's manifest and digest."""
    plan, engine, batch = info.plan, info.engine, info.engine.batch
    size = sum(entry.size for entry in info.files) / 1e6
    facts(
        f"bundle {escape(info.name)}",
        [
            (
                "model",
                f"{info.model.name}, {info.model.num_classes or 'no'} classes, weights {info.model.weights_source}",
            ),
            (
                "engine",
                f"{engine.name}, built with {engine.version}, {engine.precision}, {engine.device}"
                + (f", batch {batch.min}-{batch.max}" if batch else ""),
            ),
            ("needs", _needs(engine.name, info.variants["reduced"].requirements)),
            ("input", ", ".join(map(_tensor, info.inputs))),
            ("output", ", ".join(map(_tensor, info.outputs))),
            ("preprocessing", info.preprocessing.summary()),
            ("plan", f"{plan.method}, {plan.fingerprint[:12]}"),
            (
                "MACs",
                f"{macs(plan.macs_reduced)} of {macs(plan.macs_dense)} "
                f"(ratio {plan.macs_dense / plan.macs_reduced:.3f})",
            ),
            ("variants", ", ".join(info.variants)),
            (
                "validation",
                f"{info.validation.status}; accuracy {info.validation.accuracy}, latency {info.validation.latency}",
            ),
            ("", info.validation.summary),
            ("files", f"{len(info.files)}, {size:.1f} MB, every one verified"),
            ("created", f"{info.created} by {info.tool.name} {info.tool.version}"),
            ("digest", digest),
        ],
    )


def _needs(engine: str, requirements: Mapping[str, Any]) -> Mapping[str, Any]:
    return get_backend(engine).needs(requirements) if engine in ENGINES else requirements


def _tensor(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def profiles(found: Profiled, top: int) -> None:
    """Print a table of model parts by engine per batch size, and the `top` slowest operations of each engine."""
    for batch in dict.fromkeys(profile.batch for profile in found.profiles):
        side = [profile for profile in found.profiles if profile.batch == batch]
        saved = ["saved"] if len(side) > 1 else []
        columns = ["", *(profile.label for profile in side), *saved]
        cells: list[list[str]] = []
        for name, values in _profile_rows(side):
            difference = [f"{values[0] - values[-1]:.3f}"] if saved else []
            cells.append([name, *(f"{value:.3f}" for value in values), *difference])
        summary = [[name, *texts, *([""] if saved else [])] for name, texts in _profile_summary(side, found)]
        table(f"batch {batch}, milliseconds", columns, cells + summary, dim=len(summary))
        for profile in side:
            for operation in sorted(profile.operations, key=lambda each: -each.milliseconds)[:top]:
                stdout.print(
                    f"  {operation.milliseconds:9.3f}  {escape(profile.label)}  {operation.group}  "
                    f"{escape(operation.name)}  {escape(operation.kind)}",
                    soft_wrap=True,
                )  # fmt: skip
    for batch, speedup in found.speedups.items() if found.finite else ():
        first, last = found.profiles[0].label, found.profiles[-1].label
        text = f"batch {batch}: {last} is {speedup.value:.3f}x as fast as {first}"
        stdout.print(f"{escape(text)} ({speedup.low:.3f} to {speedup.high:.3f})", soft_wrap=True)
    for note in found.notes:
        stderr.print(f"[yellow]note:[/] {escape(in_options(note))}", soft_wrap=True)


def _profile_rows(profiles: list[Profile]) -> list[tuple[str, list[float]]]:
    """Rows for the parts of the model, then for whole runs."""
    lines = [(group, [profile.groups[group] for profile in profiles]) for group in GROUPS]
    shown = [line for line in lines if any(line[1])]
    whole = [("p50", "median_ms"), ("p90", "p90_ms"), ("p99", "p99_ms")]
    return shown + [(name, [getattr(profile.timing, field) for profile in profiles]) for name, field in whole]


def _profile_summary(profiles: list[Profile], found: Profiled) -> list[tuple[str, list[str]]]:
    lines = [
        ("parts' sum / p50", [f"{100 * profile.covered:.1f}%" for profile in profiles]),
        ("images/s", [f"{profile.timing.images_per_second:.1f}" for profile in profiles]),
    ]
    memories = [found.memory.get(profile.label) for profile in profiles]
    if any(memories):
        peaks = [
            memory.peak.get(profile.batch) if memory else None
            for memory, profile in zip(memories, profiles, strict=True)
        ]
        lines.append(("peak memory, MiB", ["?" if peak is None else f"{peak:.0f}" for peak in peaks]))
        if any(memory and memory.gpu is not None for memory in memories):
            used = [memory.gpu if memory else None for memory in memories]
            lines.append(("GPU memory, MiB", ["?" if value is None else f"{value:.0f}" for value in used]))
    return lines
