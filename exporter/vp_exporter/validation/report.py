"""Write report.json, and report.html: a self-contained page without scripts or network access."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vp_exporter.validation import charts
from vp_exporter.validation.accuracy import Accuracy
from vp_exporter.validation.baseline import DENSE, Baseline
from vp_exporter.validation.latency import LatencyRow
from vp_exporter.validation.verdict import Check, Verdict, interval, points

if TYPE_CHECKING:
    import jinja2

    from vp_engines.manifest import Preprocessing

# Version 2: a verdict may have the status "measured" (version 1: "passed" if there was no budget); figures of another
# bundle are called "baseline" (version 1: "dense").
FORMAT, VERSION = "vp-report", 2


@dataclass(frozen=True)
class ReportData:
    """Content of a report. Mappings are shown key by key; they must not contain paths of this machine.

    Attributes:
        model: Facts such as name, image size, weights.
        engine: Facts such as name, version, precision, device.
        plan: Facts such as method, budget, fingerprint.
        tokens: {"block", "attention", "mlp"} per block: tokens, including prefix tokens, that enter each half.
        prefix_tokens: Number of class and register tokens, which no plan removes.
        macs: {"dense", "reduced"}: multiply-accumulates per image, without and with the plan.
        verdict: Result of `verdict.judge`.
        accuracy, latency: Measurements; None if not measured, which the page states prominently.
        kept_stages: (block, kept positions in the original patch grid, row by row) in order of blocks; empty for
            plans that choose tokens per image.
        grid: Rows and columns of patches.
        samples: Images uint8 [H, W, 3], cropped as for the model; the first six are shown.
        environment: Result of `latency.environment`.
        baseline: Baseline of the measurements.
        preprocessing: Preprocessing of the images.
        notes, warnings: One line each.

    Raises:
        ValueError: if the values are inconsistent.
    """

    model: Mapping[str, Any]
    engine: Mapping[str, Any]
    plan: Mapping[str, Any]
    tokens: Sequence[Mapping[str, int]]
    prefix_tokens: int
    macs: Mapping[str, float]
    verdict: Verdict
    accuracy: Accuracy | None
    latency: Sequence[LatencyRow] | None
    grid: tuple[int, int]
    kept_stages: Sequence[tuple[int, Sequence[int]]] = ()
    samples: Sequence[np.ndarray] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    baseline: Baseline = DENSE
    preprocessing: Preprocessing | None = None
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        patches = self.grid[0] * self.grid[1]
        if not self.tokens:
            raise ValueError("a report needs the tokens of at least one block")
        for block, kept in self.kept_stages:
            if len(kept) and not 0 <= min(kept) <= max(kept) < patches:
                raise ValueError(f"kept positions of block {block} lie outside a grid of {patches} patches")
        for sample in self.samples:
            if sample.dtype != np.uint8 or sample.ndim != 3 or sample.shape[2] != 3:
                raise ValueError(f"a sample is {sample.dtype} {list(sample.shape)}; expected uint8 [H, W, 3]")

    @property
    def mac_ratio(self) -> float:
        """Multiply-accumulates of the baseline over those of the reduced model."""
        macs = self.baseline.macs if self.baseline.kind == "bundle" else None
        return (self.macs["dense"] if macs is None else macs) / self.macs["reduced"]

    @property
    def dense_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.prefix_tokens

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values: report.json."""
        return Report(self).to_dict()

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write report.json and report.html to an existing folder, replacing existing files. Returns their paths."""
        return Report(self).write(folder)


@dataclass(frozen=True)
class Figure:
    """One of the four figures at the top of the page."""

    name: str
    value: str
    detail: str


class Report:
    """Renders `ReportData`."""

    def __init__(self, data: ReportData) -> None:
        self.data = data

    def to_dict(self) -> dict[str, Any]:
        """Content of report.json: every figure of the page, without the pictures.

        Within a format version, keys are only added. If the baseline is another bundle, "dense" in the keys of
        measurements becomes "baseline".
        """
        data = self.data
        accuracy = data.accuracy.to_dict() if data.accuracy else None
        latency = [row.to_dict() for row in data.latency] if data.latency else None
        macs: dict[str, float | None] = {**data.macs, "ratio": data.mac_ratio}
        baseline = {"kind": data.baseline.kind, "name": data.baseline.label, **data.baseline.facts}
        if data.baseline.kind == "bundle":
            accuracy, latency = _of_baseline(accuracy), _of_baseline(latency)
            macs["baseline"] = data.baseline.macs
        body = {
            "format": FORMAT,
            "version": VERSION,
            "verdict": data.verdict.to_dict(),
            "accuracy_validated": data.accuracy is not None,
            "baseline": baseline,
            "accuracy": accuracy,
            "latency": latency,
            "macs": macs,
            "tokens": list(data.tokens),
            "dense_tokens": data.dense_tokens,
            "prefix_tokens": data.prefix_tokens,
            "grid": list(data.grid),
            "kept_stages": [{"block": block, "kept": list(kept)} for block, kept in data.kept_stages],
            "preprocessing": data.preprocessing.model_dump(mode="json") if data.preprocessing else None,
            "model": data.model,
            "plan": data.plan,
            "engine": data.engine,
            "environment": data.environment,
            "notes": list(data.notes),
            "warnings": list(data.warnings),
        }
        return charts.plain(body)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self) -> str:
        data = self.data
        stages = charts.stages(data.kept_stages, data.grid)
        return (
            _environment()
            .get_template("report.html.j2")
            .render(
                data=data,
                accuracy=data.accuracy,
                verdict=data.verdict,
                status=STATUS_WORDS[data.verdict.status],
                baseline=data.baseline,
                figures=_figures(data),
                checks=[(check, _limit(check), _found(check)) for check in data.verdict.checks],
                # In two widths, for a page and for a phone: a scaled-down chart is not readable.
                token_charts=[
                    charts.token_chart(data.tokens, data.dense_tokens, w) for w in (charts.WIDTH, charts.NARROW)
                ],
                latency_charts=[charts.latency_chart(data.latency, data.baseline, narrow=n) for n in (False, True)]
                if data.latency
                else [],
                stages=stages,
                thumbnails=[charts.thumbnail(image) for image in data.samples[: charts.MAX_SAMPLES]] if stages else [],
                accuracy_rows=_accuracy_rows(data.accuracy, data.baseline) if data.accuracy else [],
                facts=[
                    ("Baseline", _facts(data.baseline.facts)),
                    ("Preprocessing", _facts(data.preprocessing.facts()) if data.preprocessing else []),
                    ("Plan", _facts(data.plan)),
                    ("Model", _facts(data.model)),
                    ("Engine", _facts(data.engine)),
                    ("Measured on", _facts(data.environment)),
                ],
            )
        )

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write report.json and report.html to an existing folder, replacing existing files."""
        # Render both before writing, so that an error leaves no partial report.
        texts = {"report.json": self.to_json(), "report.html": self.to_html()}
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
        return Path(folder, "report.json"), Path(folder, "report.html")


def report_files(report: ReportData) -> dict[str, bytes]:
    """Files of the report in a bundle."""
    page = Report(report)
    return {"report.json": page.to_json().encode(), "report.html": page.to_html().encode()}


def validation_fields(report: ReportData) -> dict[str, str]:
    """Field `validation` of the manifest."""
    status = report.verdict.status
    return {
        "status": status,
        "accuracy": "measured" if report.accuracy is not None else "unmeasured",
        "latency": "measured" if report.latency else "unmeasured",
        "summary": report.verdict.headline,
    }


STATUS_WORDS = {
    "passed": "Passed",
    "failed": "Failed",
    "measured": "Measured",
    "unvalidated": "Accuracy not validated",
}


def _of_baseline(value: Any) -> Any:
    """Replace "dense" by "baseline" in every key: dense_top1 -> baseline_top1."""
    if isinstance(value, Mapping):
        return {key.replace("dense", "baseline"): _of_baseline(item) for key, item in value.items()}
    return [_of_baseline(item) for item in value] if isinstance(value, list) else value


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ms=charts.milliseconds, px=lambda value: f"{value:.1f}".removesuffix(".0"), macs=_macs)
    return environment


def _figures(data: ReportData) -> list[Figure]:
    """Speed-up, top-1 change, agreement and realised efficiency."""
    speed = Figure("Speed-up", "not measured", "")
    efficiency = Figure("Realised efficiency", "not measured", "")
    baseline = data.baseline
    if data.latency:
        row = max(data.latency, key=lambda row: row.batch)
        others = "".join(f"; {r.speedup.value:.2f}× at batch {r.batch}" for r in data.latency if r is not row)
        noise = "" if row.outcome != "within noise" else ", no difference beyond noise"
        spread = f"95% interval {row.speedup.low:.2f} to {row.speedup.high:.2f}"
        speed = Figure("Speed-up", f"{row.speedup.value:.2f}×", f"at batch {row.batch}{noise}, {spread}{others}")
        if not all(each.finite for each in data.latency):
            speed = Figure("Speed-up", "none", "the outputs are not finite, so no time counts")
            efficiency = Figure("Realised efficiency", "none", "the outputs are not finite")
        elif row.efficiency is not None:
            detail = (
                f"of the {data.mac_ratio:.2f}× MAC ratio at batch {row.batch}; 100% when all work saved is time saved"
            )
            efficiency = Figure("Realised efficiency", f"{100 * row.efficiency:.0f}%", detail)
        elif not baseline.efficient:
            detail = "a claim within one engine, precision and set of kernels"
            efficiency = Figure("Realised efficiency", "not stated", detail)
    accuracy = data.accuracy
    if accuracy is None:
        top1 = Figure("Top-1 change", "not validated", "no images were given")
        agreement = Figure(f"Agreement with {baseline.label}", "not validated", "no images were given")
    else:
        share = accuracy.agreement
        detail = f"same answer on {accuracy.images} images, 95% interval {share.low:.2f} to {share.high:.2f}"
        agreement = Figure(f"Agreement with {baseline.label}", f"{share.value:.2f}%", detail)
        if accuracy.top1_difference is None:
            top1 = Figure("Top-1 change", "unknown", "the images have no labels")
        else:
            detail = (
                f"points, from {accuracy.dense_top1:.2f}% to {accuracy.reduced_top1:.2f}%, "
                f"95% interval {interval(accuracy.top1_difference)}"
            )
            top1 = Figure("Top-1 change", points(accuracy.top1_difference.value), detail)
    return [speed, top1, agreement, efficiency]


def _accuracy_rows(accuracy: Accuracy, baseline: Baseline) -> list[tuple[str, str, str, str]]:
    """Rows (name, dense, reduced, comparison) of the accuracy table, with "" for an empty cell."""
    rows = []
    if accuracy.top1_difference is not None:
        change = f"{points(accuracy.top1_difference.value)} points {interval(accuracy.top1_difference)}"
        rows.append(("Top-1", f"{accuracy.dense_top1:.2f}%", f"{accuracy.reduced_top1:.2f}%", change))
        if accuracy.dense_top5 is not None and accuracy.reduced_top5 is not None:
            change = f"{points(accuracy.reduced_top5 - accuracy.dense_top5)} points"
            rows.append(("Top-5", f"{accuracy.dense_top5:.2f}%", f"{accuracy.reduced_top5:.2f}%", change))
        p_value = f"McNemar's exact p = {accuracy.mcnemar_p:.3g}"
        rows.append(
            (
                "Right where the other is wrong",
                str(accuracy.only_dense_right),
                str(accuracy.only_reduced_right),
                p_value,
            )
        )
    share = accuracy.agreement
    rows.append(("Same top-1 class", "", "", f"{share.value:.2f}% [{share.low:.2f}, {share.high:.2f}]"))
    kl = accuracy.kl
    text = f"{kl.value:.4f} nats [{kl.low:.4f}, {kl.high:.4f}]" if kl else "none: outputs are not finite"
    rows.append((f"KL divergence, {baseline.label} to {baseline.own}, mean", "", "", text))
    if accuracy.nonfinite_dense or accuracy.nonfinite_reduced:
        bad = (str(accuracy.nonfinite_dense), str(accuracy.nonfinite_reduced))
        rows.append(("Images with NaN or infinite outputs", *bad, ", ".join(accuracy.nonfinite_images)))
    if parity := accuracy.parity:
        text = f"same top-1 class on {parity.same_top1} of {parity.images}"
        if parity.max_abs is not None:
            text += f"; logits differ by {parity.max_abs:.2g} at most, {parity.mean_abs:.2g} on average"
        else:
            text += f"; {parity.nonfinite} with NaN or infinite logits"
        rows.append(("Reduced engine against reduced PyTorch model", "", "", text))
    return rows


def _limit(check: Check) -> str:
    """Describe the limit of a check."""
    return {
        "finite outputs": "only finite outputs",
        "max_drop": f"at most {check.limit:g} points of top-1 lost",
        "min_agreement": f"at least {check.limit:g}% agreement",
        "min_speedup": f"at least {check.limit:g}× at every batch size",
    }[check.name]


def _found(check: Check) -> str:
    if check.measured is None:
        return "not measured"
    change = points(-check.measured) + " points"
    return {
        "finite outputs": f"{check.measured:g} not finite" if check.measured else "all are",
        "max_drop": change,
        "min_agreement": f"{check.measured:.2f}%",
        "min_speedup": f"{check.measured:.2f}× at worst",
    }[check.name]


def _facts(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), _fact(charts.plain(value))) for key, value in mapping.items()]


def _fact(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(str, value)) or "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _macs(value: float) -> str:
    """Format a number of MACs: 4.61 G, 12.3 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
