"""A bundle against its dense twin, with engines that are made up: what runs, what is said, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vp_engines
from tests.exporter.processes import in_threads
from vp_engines.backends.base import Availability
from vp_engines.bundle import write_bundle
from vp_engines.errors import BundleError, VpError
from vp_exporter.package import NOT_VALIDATED, report_files, validation_fields
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep
from vp_exporter.validate import check
from vp_exporter.validate.check import CheckRequest, check_bundle, open_data
from vp_exporter.validate.report import ReportData
from vp_exporter.validate.verdict import Budget
from vp_exporter.workers import Workers

CLASSES = 3
QUICK: dict[str, Any] = {"seconds": 0.01, "batches": (1,)}


class FakeEngine:
    """Answers with the brightest channel, so that red, green and blue images are the classes 0, 1 and 2."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong
        self.closed = False

    def run(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        logits = images.mean(axis=(2, 3)).astype(np.float32)
        return {"logits": np.roll(logits, 1, axis=1) if self.wrong else logits}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *args: object) -> None:
        self.closed = True


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str, dict[str, Any]]]:
    """What was loaded, in order; every engine is a fake one."""
    calls: list[tuple[Path, str, dict[str, Any]]] = []

    def load(path: Path, *, variant: str, **options: Any) -> FakeEngine:
        calls.append((path, variant, options))
        return FakeEngine()

    monkeypatch.setattr(vp_engines, "load", load)
    return calls


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(4):
            colour = [0, 0, 0]
            colour[i] = 200
            Image.new("RGB", (40, 36), tuple(colour)).save(tmp_path / "images" / name / f"{n}.png")
    return tmp_path / "images"


def make_bundle(folder: Path, *, dense: bool = True, batch: dict[str, int] | None = None) -> Path:
    """A bundle whose engine files are a few bytes; its plan drops one of four patches at block 1."""
    plan = ReductionPlan(PlanModel("vit_x", (32, 32), (16, 16), 1, 2, 4), (StaticStep(block=1, keep=(0, 1, 3)),))
    folder.mkdir(exist_ok=True)
    variants = {}
    files: dict[str, bytes | Path] = {"plan.json": plan.dumps().encode()}
    for name, inside in (("reduced", "engine"), ("dense", "dense"))[: 2 if dense else 1]:
        files[f"{inside}/model.onnx"] = b"engine"
        path = f"{inside}/model.onnx"
        variants[name] = {"artefact": path, "files": [path], "requirements": {}, "notes": []}
    write_bundle(
        folder / "b.vpe",
        files=files,
        name="b",
        engine={"name": "ort", "version": "1", "precision": "fp32", "device": "cpu", "batch": batch},
        variants=variants,
        inputs=[{"name": "images", "dtype": "float32", "shape": ["batch", 3, 32, 32]}],
        outputs=[{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
        preprocessing={"input_size": (3, 32, 32), "resize": 32, "crop_mode": "center", "interpolation": "bicubic",
                       "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        classes=None,
        model={"name": "vit_x", "num_classes": CLASSES, "img_size": (32, 32), "patch_size": (16, 16),
               "weights_sha256": "0" * 64, "weights_source": "made up"},
        plan={"path": "plan.json", "fingerprint": plan.fingerprint(), "method": "test", "macs_dense": 10,
              "macs_reduced": 8, "tokens": [[5, 5], [4, 4]]},
        validation=NOT_VALIDATED,
        kernels="portable",
    )  # fmt: skip
    return folder / "b.vpe"


def test_images_give_accuracy_and_samples(tmp_path: Path, images: Path, loaded: list) -> None:
    path = make_bundle(tmp_path / "x")
    found = check_bundle(path, CheckRequest(data=images, budget=Budget(max_drop=0), threads=1, **QUICK))
    assert [(where, variant) for where, variant, _ in loaded] == [(path, "reduced"), (path, "dense")]
    assert all(options == {"device": None, "threads": 1} for _, _, options in loaded)
    assert found.accuracy is not None
    assert (found.accuracy.images, found.accuracy.dense_top1, found.accuracy.reduced_top1) == (12, 100, 100)
    assert found.verdict.status == "passed"
    assert len(found.samples) == check.SAMPLES
    assert found.samples[0].shape == (32, 32, 3)
    assert found.samples[0][16, 16].tolist() == [200, 0, 0]
    assert found.kept_stages == [(0, (0, 1, 2, 3)), (1, (0, 1, 3))]
    assert found.grid == (2, 2)
    assert validation_fields(found)["status"] == "passed"
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
    with pytest.raises(BundleError, match=r"no dense baseline to compare with.*--against"):
        check_bundle(make_bundle(tmp_path / "x", dense=False), CheckRequest(**request_, **QUICK))
    assert loaded == []


def test_no_baseline_measures_nothing(tmp_path: Path, loaded: list) -> None:
    found = check_bundle(make_bundle(tmp_path / "x", dense=False), CheckRequest(**QUICK))
    assert (found.accuracy, found.latency, loaded) == (None, None, [])
    assert found.warnings == ["The bundle holds no dense baseline: neither speed-up nor accuracy is measured."]


def test_against_another_bundle(tmp_path: Path, loaded: list) -> None:
    path, other = make_bundle(tmp_path / "x", dense=False), make_bundle(tmp_path / "y")
    found = check_bundle(path, CheckRequest(against=other, **QUICK))
    assert [(where, variant) for where, variant, _ in loaded] == [(path, "reduced"), (other, "reduced")]
    assert found.notes == ["The baseline is the bundle b.vpe, not this bundle's own dense engine."]


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
