"""report.html in a browser: on a phone nothing overflows or is cut off, and colours suit light and dark mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.exporter.browser import misfits, needs_browser, screenshot
from tests.exporter.validation.test_report import report_data
from tests.exporter.validation.test_verdict import accuracy, row
from vp_exporter.validation.accuracy import Parity
from vp_exporter.validation.baseline import Baseline
from vp_exporter.validation.report import Report, ReportData
from vp_exporter.validation.verdict import Budget, judge

LONG = "deit_small_patch16_224_static_and_diffrate_0.65_of_the_macs"
OTHER = Baseline(
    kind="bundle", label=f"{LONG}.vpe (baseline)", own=f"{LONG}.vpe", name=f"{LONG}.vpe (baseline)", macs=2e9,
    efficient=False, facts={"bundle": f"{LONG}.vpe", "fingerprint": "ab" * 32},
)  # fmt: skip


def wide(baseline: Baseline | None = None) -> ReportData:
    """Much of everything, with names that have no spaces to break at."""
    found = accuracy(parity=Parity(64, 1e-5, 1e-6, 1e-6, 64, 0), dense_top5=99.0, reduced_top5=98.5)
    rows = [row(1, 0.75, 0.72), row(8), replace(row(64), nonfinite_reduced=3, claim=False)]
    baseline = baseline or Baseline()
    kept = [(b, sorted({(7 * i) % 196 for i in range(196 - 12 * b)})) for b in range(12)]
    return report_data(
        found, rows, verdict=judge(found, rows, Budget(max_drop=0.1, min_speedup=1.2), baseline=baseline),
        baseline=baseline, grid=(14, 14), kept_stages=kept,
        tokens=[{"block": b, "attention": len(k) + 1, "mlp": len(k) + 1} for b, k in kept],
        model={"name": LONG, "weights": LONG + ".safetensors", "weights sha256": "ab" * 32},
        warnings=["skipped " + "x" * 90], notes=["a" * 90],
    )  # fmt: skip


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "baseline"), [(320, OTHER), (390, None), (390, OTHER), (600, None), (1200, None)],
    ids=["320 other", "390 dense", "390 other", "600 dense", "1200 dense"],
)  # fmt: skip
def test_nothing_sticks_out_or_is_cut(width: int, baseline: Baseline | None, tmp_path: Path) -> None:
    assert misfits(Report(wide(baseline)).to_html(), width, tmp_path) == {"out": [], "cut": [], "width": width}


@needs_browser
@pytest.mark.slow
def test_dark_mode_is_dark(tmp_path: Path) -> None:
    data = replace(wide(), samples=[])
    shades = {}
    for dark in (False, True):
        folder = tmp_path / str(dark)
        folder.mkdir()
        shades[dark] = screenshot(Report(data).to_html(), 390, 3000, folder, dark=dark).mean(axis=2)
    assert float(np.mean(shades[False])) > 200
    assert float(np.mean(shades[True])) < 60
    assert float((shades[True] > 200).mean()) < 0.1  # text, not areas
