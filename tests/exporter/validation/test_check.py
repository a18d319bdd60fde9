"""A bundle against its dense baseline, with fake engines: what is run, reported and rejected."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vp_engines
from tests.exporter.processes import in_threads
from tests.exporter.validation.samples import CLASSES, QUICK, FakeEngine, make_bundle
from tests.exporter.validation.test_report import page
from vp_engines.backends.base import Availability
from vp_engines.errors import BundleError, VpError
from vp_exporter.utils.distributed import Workers
from vp_exporter.utils.progress import SilentProgress, recording
from vp_exporter.validation import check
from vp_exporter.validation.check import CheckRequest, check_bundle, open_data
from vp_exporter.validation.report import Report, ReportData, report_files, validation_fields
from vp_exporter.validation.verdict import Budget


def test_images_give_accuracy_and_samples(tmp_path: Path, images: Path, loaded: list) -> None:
    path = make_bundle(tmp_path / "x")
    found = check_bundle(path, CheckRequest(data=images, budget=Budget(max_drop=0), threads=1, **QUICK))
    assert [(where, variant) for where, variant, _ in loaded] == [(path, "reduced"), (path, "dense")]
    assert all(options == {"device": None, "threads": 1} for _, _, options in loaded)
    assert found.accuracy is not None
    assert (found.accuracy.images, found.accuracy.dense_top1, found.accuracy.reduced_top1) == (12, 100, 100)
    assert found.verdict.status in ("passed", "measured")  # the fakes are equal, except for noise
    assert len(found.samples) == check.SAMPLES
    assert found.samples[0].shape == (32, 32, 3)
    assert found.samples[0][16, 16].tolist() == [200, 0, 0]
    assert found.kept_stages == [(0, (0, 1, 2, 3)), (1, (0, 1, 3))]
    assert found.grid == (2, 2)
    assert validation_fields(found)["status"] == found.verdict.status
    assert set(report_files(found)) == {"report.json", "report.html"}


def test_without_images_accuracy_is_unvalidated(tmp_path: Path, loaded: list) -> None:
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(**QUICK))
    assert found.accuracy is None
    assert found.samples == ()
    fields = validation_fields(found)
    assert (fields["accuracy"], fields["latency"]) == ("unmeasured", "measured")


def test_samples_can_be_left_out(tmp_path: Path, images: Path, loaded: list) -> None:
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(data=images, samples=False, **QUICK))
    assert found.samples == ()


def test_reference_gives_parity(tmp_path: Path, images: Path, loaded: list) -> None:
    def reference(batch: np.ndarray) -> np.ndarray:
        return FakeEngine().run(batch)["logits"] + np.float32(0.5)

    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(data=images, **QUICK), reference=reference)
    assert found.accuracy is not None
    assert found.accuracy.parity is not None
    assert found.accuracy.parity.max_abs == pytest.approx(0.5)


def test_wrong_engine_fails(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vp_engines, "load", lambda path, variant, **options: FakeEngine(wrong=variant == "reduced"))
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(data=images, budget=Budget(1), **QUICK))
    assert found.verdict.exit_code == 1
    assert validation_fields(found)["status"] == "failed"


@pytest.mark.parametrize("request_", [{"data": True}, {"budget": Budget(min_speedup=1.1)}], ids=["data", "budget"])
def test_no_baseline_is_refused_where_one_is_needed(request_: dict, tmp_path: Path, images: Path, loaded: list) -> None:
    if "data" in request_:
        request_ = {"data": images}
    with pytest.raises(BundleError, match=r"no dense baseline to compare with.*`against`"):
        check_bundle(make_bundle(tmp_path / "x", dense=False), CheckRequest(**request_, **QUICK))
    assert loaded == []


def test_no_baseline_measures_nothing(tmp_path: Path, loaded: list) -> None:
    path = make_bundle(tmp_path / "x", dense=False)
    found = check_bundle(path, CheckRequest(**QUICK))
    assert (found.accuracy, found.latency) == (None, None)
    assert [(where, variant) for where, variant, _ in loaded] == [(path, "reduced")]  # only for its outputs
    assert [(check.name, check.passed) for check in found.verdict.checks] == [("finite outputs", True)]
    assert found.warnings == ["The bundle holds no dense baseline: neither speed-up nor accuracy is measured."]


def test_against_another_bundle(tmp_path: Path, loaded: list) -> None:
    path, other = make_bundle(tmp_path / "x", dense=False), make_bundle(tmp_path / "y")
    found = check_bundle(path, CheckRequest(against=other, **QUICK))
    assert [(where, variant) for where, variant, _ in loaded] == [(path, "reduced"), (other, "reduced")]
    assert found.notes == ["The baseline is the bundle b.vpe, not this bundle's own dense engine."]
    assert found.baseline.label == "b.vpe (baseline)"


def test_batches_outside_the_profile_are_not_timed(tmp_path: Path, loaded: list) -> None:
    path = make_bundle(tmp_path / "x", batch={"min": 2, "opt": 4, "max": 4})
    found = check_bundle(path, CheckRequest(seconds=0.01, batches=(1, 2, 8)))
    assert found.latency is not None
    assert [row.batch for row in found.latency] == [2]
    assert "Batch sizes that the engine was not built for are not timed." in found.warnings


def test_engine_that_cannot_run_here(tmp_path: Path, loaded: list, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(available=lambda purpose: Availability(False, "no GPU"))
    monkeypatch.setattr(check, "get_backend", lambda name: backend)
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(**QUICK))
    assert loaded == []
    assert found.verdict.status == "unvalidated"
    assert found.warnings == ["The engine was built but not run: no GPU. Neither speed nor accuracy is measured."]
    assert validation_fields(found)["latency"] == "unmeasured"


def test_skipped_images_are_counted(tmp_path: Path, images: Path, loaded: list) -> None:
    for i in range(4):
        (images / "a" / f"bad{i}.png").write_bytes(b"no image")
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(data=images, **QUICK))
    text = "Skipped 4 images that could not be decoded: a/bad0.png, a/bad1.png, a/bad2.png and 1 more."
    assert found.warnings == [text]
    assert len(found.samples) == check.SAMPLES


def test_engines_are_closed_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[FakeEngine] = []

    def load(path: Path, **options: Any) -> FakeEngine:
        engines.append(FakeEngine())
        return engines[-1]

    def fail(*args: Any, **options: Any) -> None:
        raise VpError("no")

    monkeypatch.setattr(vp_engines, "load", load)
    monkeypatch.setattr(check, "compare", fail)
    with pytest.raises(VpError, match="no"):
        check_bundle(make_bundle(tmp_path / "x"), CheckRequest(**QUICK))
    assert [engine.closed for engine in engines] == [True, True]


def test_data_is_opened_before_the_engines(tmp_path: Path, loaded: list, images: Path) -> None:
    shutil.rmtree(images / "c")
    with pytest.raises(VpError, match="2 class folders"):
        check_bundle(make_bundle(tmp_path / "x"), CheckRequest(data=images, **QUICK))
    assert loaded == []


def test_no_data_opens_nothing() -> None:
    assert open_data(CheckRequest(), None, None, CLASSES) is None


def test_several_processes_give_one_report(
    tmp_path: Path, images: Path, loaded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "c" / "bad.png").write_bytes(b"no image")
    path, request_ = make_bundle(tmp_path / "x"), CheckRequest(data=images, batch_size=4, **QUICK)
    alone = check_bundle(path, request_)
    timed, compare = [], check.compare

    def count(*args: Any, **options: Any) -> Any:
        timed.append(1)
        return compare(*args, **options)

    monkeypatch.setattr(check, "compare", count)
    first, second = in_threads(2, lambda workers: check_bundle(path, request_, workers=workers))
    assert isinstance(first, ReportData), first
    assert first is second  # the leader's
    assert len(timed) == 1
    assert first.accuracy == alone.accuracy
    assert first.warnings == alone.warnings == ["Skipped 1 image that could not be decoded: c/bad.png."]
    assert first.notes == alone.notes
    assert len(first.samples) == check.SAMPLES


def test_an_engine_that_loads_on_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workers: Workers) -> ReportData:
        return check_bundle(make_bundle(tmp_path / str(workers.rank)), CheckRequest(**QUICK), workers=workers)

    def load(path: Path, **options: Any) -> FakeEngine:
        if path.parent.name == "1":
            raise VpError("no memory left on the GPU")
        return FakeEngine()

    monkeypatch.setattr(vp_engines, "load", load)
    found = in_threads(2, run)
    assert [str(error) for error in found] == ["no memory left on the GPU"] * 2


class Nan(FakeEngine):
    """Returns NaN for some images of a batch."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self.rows = rows

    def run(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        logits = np.array(super().run(images)["logits"])
        logits[self.rows] = np.nan
        return {"logits": logits}


@pytest.mark.slow
@pytest.mark.parametrize(("dense", "rows"), [(True, slice(None)), (False, slice(1, 2))], ids=["both, all", "one image"])
def test_nan_without_images_fails(dense: bool, rows: slice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, variant: str, **options: Any) -> FakeEngine:
        return Nan(rows) if dense or variant == "reduced" else FakeEngine()

    monkeypatch.setattr(vp_engines, "load", load)
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(seconds=0.01, batches=(1, 3)))
    assert (found.verdict.exit_code, validation_fields(found)["status"]) == (1, "failed")
    headline = validation_fields(found)["summary"]
    assert ("dense too (4 of 4" in headline) == dense
    assert ("1 of 4 timed images, not from the dense engine" in headline) == (not dense)
    alone = check_bundle(make_bundle(tmp_path / "y", dense=False), CheckRequest(seconds=0.01, batches=(1, 3)))
    assert alone.verdict.exit_code == 1


class Warns(SilentProgress):
    """Records warnings."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def warn(self, text: str) -> None:
        self.heard.append(text)


def test_what_the_terminal_is_warned_of_is_in_the_report(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in images.iterdir():
        for n in range(4, 8):
            shutil.copy(folder / "0.png", folder / f"{n}.png")
    (images / "a" / "bad.png").write_bytes(b"no image")
    monkeypatch.setattr(vp_engines, "load", lambda path, **options: FakeEngine(wrong=True))
    progress = recording(Warns())
    progress.warn("said while the model was loaded")
    found = check_bundle(make_bundle(tmp_path / "x"), CheckRequest(data=images, **QUICK), progress=progress)
    content, page = Report(found).to_dict(), Report(found).to_html()
    for text in (
        "said while the model was loaded",
        "the dense model's top-1 is 0.00%, about chance",
        "the dense model's top-1 is 0.00%, poor for a trained model",
        "Skipped 1 image that could not be decoded: a/bad.png.",
    ):
        assert sum(text in line for line in content["warnings"]) == 1, text
        assert page.count(text.replace("'", "&#39;")) == 1, text
    assert not any(line.startswith("skipped ") for line in content["warnings"])
    assert set(content["warnings"]) >= {text for text in progress.warnings if not text.startswith("skipped ")}


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "source", "stated", "wrong", "warned"),
    [
        (IMAGENET, "mine.pth", False, True, True),
        ({}, "mine.pth", False, True, True),  # 0.5 everywhere is a default of timm's too
        (IMAGENET, "mine.pth", False, False, False),  # top-1 is good
        (IMAGENET, "mine.pth", True, True, False),  # said by the user
        ({"mean": (0.3, 0.3, 0.3)}, "mine.pth", False, True, False),  # no default
        (IMAGENET, "timm pretrained (augreg_in1k)", False, True, False),  # timm's own weights
        (IMAGENET, "random", False, True, False),
        (IMAGENET, "folder/model.safetensors", False, True, False),  # its config.json says them
    ],
)
def test_own_weights_with_timms_statistics(
    spec: dict, source: str, stated: bool, wrong: bool, warned: bool,
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for folder in images.iterdir():
        for n in range(4, 8):
            shutil.copy(folder / "0.png", folder / f"{n}.png")
    monkeypatch.setattr(vp_engines, "load", lambda path, **options: FakeEngine(wrong=wrong))
    path = make_bundle(tmp_path / "x", preprocessing=spec, model={"weights_source": source})
    found = check_bundle(path, CheckRequest(data=images, statistics_stated=stated, **QUICK))
    said = [line for line in found.warnings if "`mean` and `std`" in line]
    assert bool(said) == warned
    assert not said or "timm's defaults for vit_x; if the weights (mine.pth) were trained with others" in said[0]


def test_the_report_says_how_images_are_prepared(tmp_path: Path, loaded: list) -> None:
    found = check_bundle(make_bundle(tmp_path / "x", preprocessing=IMAGENET), CheckRequest(**QUICK))
    assert Report(found).to_dict()["preprocessing"] == {
        "input_size": [3, 32, 32], "resize": 32, "crop_mode": "center", "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    text = page(found).text
    for words in ("Preprocessing", "resize shorter side 32", "crop 32x32, center", "interpolation bicubic",
                  "mean 0.485, 0.456, 0.406", "std 0.229, 0.224, 0.225"):  # fmt: skip
        assert words in text
