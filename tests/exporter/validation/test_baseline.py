"""Comparing a bundle with another one: pairs rejected before anything runs, and labels of the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.validation.samples import LARGE, QUICK, make_bundle
from tests.exporter.validation.test_report import page
from vp_engines.errors import EngineUnavailableError, VpError
from vp_exporter.cli import show
from vp_exporter.validation import check
from vp_exporter.validation.check import CheckRequest, check_bundle
from vp_exporter.validation.report import Report, ReportData
from vp_exporter.validation.verdict import Budget

Loaded = list[tuple[Path, str, dict[str, Any]]]
PAIRS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, LARGE, r"b\.vpe takes images of 3x64x64; expected 3x32x32, as a\.vpe"),
    ({}, {"model": {"num_classes": 1000}}, r"b\.vpe has 1000 classes; expected 3 classes, as a\.vpe"),
    ({}, {"model": {"num_classes": 0}}, r"b\.vpe has no classes \(features\); expected 3 classes"),
    ({}, {"outputs": [{"name": "features", "dtype": "float32", "shape": ["batch", 3]}]},
     r"b\.vpe gives features of 3; expected logits of 3"),
    ({"classes": ["x", "y", "z"]}, {"classes": ["x", "q", "z"]}, r"class 1 of b\.vpe is 'q'; expected 'y', as a\.vpe"),
    ({"classes": ["x", "y", "z"]}, {"classes": ["y", "x", "z"]}, r"classes of a\.vpe in another order; .*`classes`"),
    ({}, {"preprocessing": {"mean": (0.485, 0.456, 0.406)}}, r"mean 0\.485, 0\.456, 0\.406; expected 0\.5, 0\.5, 0\.5"),
    ({}, {"preprocessing": {"std": (0.2, 0.2, 0.2)}}, r"with std 0\.2"),
    ({}, {"preprocessing": {"resize": 36}}, r"with resize 36; expected 32, as a\.vpe"),
    ({}, {"preprocessing": {"resize": None}}, r"with resize none; expected 32"),
    ({}, {"preprocessing": {"crop_mode": "border"}}, r"with crop mode border"),
    ({}, {"preprocessing": {"interpolation": "bilinear"}}, r"with interpolation bilinear; expected bicubic"),
    ({}, {"engine": {"device": "cuda"}}, r"b\.vpe runs on cuda; expected cpu, as a\.vpe"),
    ({"batch": {"min": 1, "opt": 2, "max": 4}}, {"batch": {"min": 8, "opt": 8, "max": 8}},
     r"b\.vpe was built for batches of 8 to 8; expected one of 1 to 4"),
]  # fmt: skip


def pair(folder: Path, mine: dict[str, Any], other: dict[str, Any]) -> tuple[Path, Path]:
    return make_bundle(folder / "x", name="a.vpe", **mine), make_bundle(folder / "y", name="b.vpe", **other)


@pytest.mark.parametrize(("mine", "other", "message"), PAIRS)
def test_pairs_that_cannot_be_compared(
    mine: dict[str, Any], other: dict[str, Any], message: str, tmp_path: Path,
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(check, "open_data", lambda *args: pytest.fail("opened the data"))
    first, second = pair(tmp_path, mine, other)
    with pytest.raises(VpError, match=message) as caught:
        check_bundle(first, CheckRequest(against=second, **QUICK))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert loaded == []


def compared(tmp_path: Path, mine: dict[str, Any], other: dict[str, Any], **asked: Any) -> ReportData:
    first, second = pair(tmp_path, mine, other)
    return check_bundle(first, CheckRequest(against=second, **{**QUICK, **asked}))


def test_both_are_named_wherever_a_figure_stands(
    tmp_path: Path, images: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    """And multiply-accumulates are those of the other bundle: 4 against 8, not 10 against 8."""
    budget = Budget(max_drop=0, min_speedup=0.001, min_agreement=50)
    found = compared(tmp_path, {}, {"plan": {"macs_reduced": 4}}, data=images, budget=budget)
    assert found.latency is not None
    for row in found.latency:
        assert (row.mac_ratio, row.efficiency) == (0.5, pytest.approx(row.speedup.value / 0.5))
    report = Report(found).to_dict()
    assert report["macs"] == {"dense": 10, "reduced": 8, "baseline": 4, "ratio": 0.5}
    assert (report["baseline"]["kind"], report["baseline"]["name"], report["baseline"]["macs"]) == (
        "bundle",
        "b.vpe",
        4,
    )
    for key in ("accuracy", "latency", "verdict"):
        assert "dense" not in json.dumps(report[key]), key
    assert report["latency"][0]["baseline"]["median_ms"] > 0
    assert report["accuracy"]["baseline_top1"] == 100
    assert "against b.vpe on the same engine" in report["verdict"]["headline"]
    show.report(found)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("against b.vpe", "top-1 b.vpe", "KL to b.vpe", "the class that b.vpe gives"):
        assert words in said
    assert "dense" not in said.replace("not this bundle's own dense engine", "")
    text = page(found).text
    for words in ("a.vpe against b.vpe", "Agreement with b.vpe", "KL divergence, b.vpe to a.vpe", "of the 0.50× MAC"):
        assert words in text
    visible = text.replace("not this bundle's own dense engine", "").split("Tokens per block")[0]
    assert "dense" not in visible.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": {"precision": "fp16"}}, "a.vpe is ort fp32, b.vpe is ort fp16"),
        ({"engine": {"name": "openvino"}}, "a.vpe is ort fp32, b.vpe is openvino fp32"),
        ({"kernels": "vp"}, "a.vpe has portable kernels, b.vpe has vp"),
    ],
)
def test_efficiency_is_a_claim_within_one_engine(
    change: dict[str, Any], words: str, tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    found = compared(tmp_path, {}, change)
    assert found.latency is not None
    assert all(row.efficiency is None and row.mac_ratio == 1 for row in found.latency)
    assert any(words in note and "none is stated" in note for note in found.notes)
    assert ("on the same engine" in found.verdict.headline) == ("kernels" in change)
    assert "Realised efficiency not stated" in page(found).text
    show.report(found)
    assert words in " ".join(capsys.readouterr().out.split())


def test_other_weights_are_two_models(tmp_path: Path, loaded: Loaded) -> None:
    found = compared(tmp_path, {}, {"model": {"weights_sha256": "1" * 64, "name": "vit_y"}})
    assert any("b.vpe holds other weights (vit_y, made up)" in note for note in found.notes)


def test_a_bundle_with_itself_is_noise(tmp_path: Path, loaded: Loaded) -> None:
    path = make_bundle(tmp_path / "x")
    found = check_bundle(path, CheckRequest(against=path, **QUICK))
    assert any("this very bundle" in note for note in found.notes)
    assert found.mac_ratio == 1
    assert "against b.vpe (baseline)" in found.verdict.headline


def test_class_names_on_one_side_do_not_matter(tmp_path: Path, loaded: Loaded) -> None:
    assert compared(tmp_path, {"classes": ["x", "y", "z"]}, {}).latency


def test_one_device_by_order(tmp_path: Path, loaded: Loaded) -> None:
    """A bundle built for a GPU can be run on the CPU, together with the other."""
    assert compared(tmp_path, {}, {"engine": {"device": "cuda"}}, device="cpu").latency


def test_batches_that_both_run(tmp_path: Path, loaded: Loaded) -> None:
    profiles = [{"batch": {"min": 1, "opt": 2, "max": 4}}, {"batch": {"min": 2, "opt": 4, "max": 8}}]
    found = compared(tmp_path, *profiles, batches=(1, 2, 4, 8))
    assert [row.batch for row in found.latency or ()] == [2, 4]


def test_an_engine_that_is_not_here(tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from vp_engines.backends.base import Availability
    from vp_engines.backends.ort import OnnxRuntimeBackend

    first, second = pair(tmp_path, {"engine": {"name": "openvino"}}, {})
    monkeypatch.setattr(OnnxRuntimeBackend, "available", lambda *args: Availability(False, "not installed"))
    with pytest.raises(EngineUnavailableError, match=r"'ort' of b\.vpe cannot run here: not installed"):
        check_bundle(first, CheckRequest(against=second, **QUICK))
    assert loaded == []
