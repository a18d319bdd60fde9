"""`load`: checks before an engine is opened, and the behaviour of an open engine."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vp_engines
from tests.engines.bundle_samples import FILES, document, fields, forge, linear_model, write_sample
from tests.engines.serving.triton.samples import write_linear
from tests.waiting import LONG, until
from vp_engines import engine as engine_module
from vp_engines.backends.base import Availability, Runner, RunOptions, TensorSpec
from vp_engines.bundle import write_bundle
from vp_engines.errors import (
    BundleCorruptError,
    BundleError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
)

ONES = np.ones((2, 3, 4, 4), np.float32)


class FakeRunner(Runner):
    """Returns the sum of each image as its first logit; records whether it was closed during a run."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(inputs, outputs)
        self.active = 0
        self.closed_while_running = False
        self.closes = 0
        self.go = threading.Event()
        self.go.set()

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.active += 1
        assert self.go.wait(LONG)
        self.active -= 1
        total = images.sum((1, 2, 3))
        return {"logits": np.stack([total, -total], 1)}

    def _close(self) -> None:
        self.closes += 1
        self.closed_while_running = self.active > 0


class FakeBackend:
    """Fake engine that records the arguments of `open`."""

    def __init__(self) -> None:
        self.ok = True
        self.opened: list[dict[str, Any]] = []
        self.runner: FakeRunner | None = None

    def available(self, purpose: str = "run") -> Availability:
        assert purpose == "run"
        return Availability(self.ok, "" if self.ok else "install it with 'pip install vp-export[cpu]'")

    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        self.opened.append({"artefact": artefact, "files": files, "requirements": requirements, "options": options})
        self.runner = FakeRunner(inputs, outputs)
        return self.runner


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    fake = FakeBackend()
    monkeypatch.setattr(engine_module, "get_backend", lambda name: fake)
    return fake


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_sample(tmp_path / "a.vpe")
    return tmp_path / "a.vpe"


def test_the_backend_gets_the_names_it_wrote(out: Path, backend: FakeBackend) -> None:
    vp_engines.load(out, threads=2, device="cpu").close()
    opened = backend.opened[0]
    assert opened["artefact"] == "model.onnx"
    assert opened["files"] == {
        "model.onnx": FILES["engine/model.onnx"],
        "more/weights.bin": FILES["engine/more/weights.bin"],
    }
    assert opened["requirements"]["onnxruntime"] == ">=1.23"
    assert opened["options"] == RunOptions(device="cpu", threads=2)


def test_the_dense_variant(out: Path, backend: FakeBackend) -> None:
    with vp_engines.load(out, variant="dense") as engine:
        assert engine.variant == "dense"
    assert backend.opened[0]["files"] == {"model.onnx": b"dense model"}


def test_a_missing_dense_variant_is_explained(tmp_path: Path, backend: FakeBackend) -> None:
    variants = fields()["variants"]
    del variants["dense"]
    write_sample(tmp_path / "a.vpe", variants=variants)
    with pytest.raises(BundleError, match=r"no dense baseline.*`dense=False`"):
        vp_engines.load(tmp_path / "a.vpe", variant="dense")


@pytest.mark.parametrize("name", ["engine/model.onnx", "dense/model.onnx", "report.json"])
def test_nothing_is_deserialised_from_a_corrupt_bundle(out: Path, backend: FakeBackend, name: str) -> None:
    data = bytearray((out / name).read_bytes())
    data[0] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(BundleCorruptError, match=name):
        vp_engines.load(out)
    assert backend.opened == []


def test_an_engine_that_is_not_here_says_what_to_install(out: Path, backend: FakeBackend) -> None:
    backend.ok = False
    with pytest.raises(EngineUnavailableError, match=r"'ort'.*pip install vp-export\[cpu\]"):
        vp_engines.load(out)
    assert backend.opened == []


def test_an_engine_of_the_future_says_to_upgrade(out: Path) -> None:
    changed = document(out)
    changed["engine"]["name"] = "warp"
    forge(out, changed)
    with pytest.raises(BundleIncompatibleError, match=r"'warp'.*expected one of ort.*upgrade"):
        vp_engines.load(out)


def test_pickled_it_is_opened_again(out: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    with vp_engines.load(out.name, variant="dense", threads=2, device="cpu") as engine:
        pickled = pickle.dumps(engine)
    monkeypatch.chdir(out)  # the other process may have another working directory
    with pickle.loads(pickled) as again:
        assert (again.variant, again.manifest) == ("dense", engine.manifest)
        assert backend.opened[1] == backend.opened[0]
        np.testing.assert_array_equal(again.run(ONES)["logits"], [[48, -48], [48, -48]])


def test_pickled_it_runs_in_another_process(tmp_path: Path) -> None:
    bundle = write_linear(tmp_path / "linear.vpe")
    images = np.ones((2, 3, 4, 4), np.float32)
    with vp_engines.load(bundle) as engine:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with pool:
            answer = pool.submit(engine.run, images).result()
        np.testing.assert_array_equal(answer["logits"], engine.run(images)["logits"])


def test_pickled_it_is_held_to_its_bundle(out: Path, backend: FakeBackend) -> None:
    with vp_engines.load(out) as engine:
        pickled = pickle.dumps(engine)
        write_sample(out, force=True, name="another")
        with pytest.raises(BundleError, match=r"has changed since .*; expected digest [0-9a-f]{64}; load the bundle"):
            pickle.loads(pickled)
        assert backend.runner is not None
        assert backend.runner.closes == 1
    with pytest.raises(InputError, match="a closed engine cannot be pickled"):
        pickle.dumps(engine)


@pytest.mark.parametrize(
    "arguments", [{"variant": "int8"}, {"device": "tpu"}, {"threads": 0}, {"threads": 1.5}, {"threads": True}]
)
def test_wrong_arguments(out: Path, backend: FakeBackend, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        vp_engines.load(out, **arguments)


def test_run_and_what_it_refuses(out: Path, backend: FakeBackend) -> None:
    with vp_engines.load(out) as engine:
        assert engine.inputs[0] == TensorSpec("images", "float32", ("batch", 3, 4, 4))
        assert engine.outputs[0].name == "logits"
        assert np.array_equal(engine.run(ONES)["logits"], [[48, -48], [48, -48]])
        for wrong in (ONES.astype(np.float64), ONES[:, :2], ONES[0], ONES[:0], ONES.tolist(), None):
            with pytest.raises(InputError):
                engine.run(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"65 images.*1 to 64"):
            engine.run(np.ones((65, 3, 4, 4), np.float32))


def test_any_batch_where_the_engine_takes_any(tmp_path: Path, backend: FakeBackend) -> None:
    write_sample(tmp_path / "a.vpe", engine={**fields()["engine"], "batch": None})
    with vp_engines.load(tmp_path / "a.vpe") as engine:
        assert len(engine.run(np.ones((65, 3, 4, 4), np.float32))["logits"]) == 65


def test_preprocess_follows_the_manifest(out: Path, backend: FakeBackend) -> None:
    with vp_engines.load(out) as engine:
        batch = engine.preprocess([Image.new("RGB", (9, 7), "white")])
        assert batch.shape == (1, 3, 4, 4)
        assert np.allclose(batch[0, :, 0, 0], (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]))
        engine.run(batch)


def test_closing_twice_is_fine_and_running_afterwards_is_not(out: Path, backend: FakeBackend) -> None:
    engine = vp_engines.load(out)
    engine.close()
    engine.close()
    assert backend.runner is not None
    assert backend.runner.closes == 1
    with pytest.raises(InputError, match="closed"):
        engine.run(ONES)


def test_threads_run_side_by_side_and_close_waits_for_them(out: Path, backend: FakeBackend) -> None:
    engine = vp_engines.load(out)
    runner = backend.runner
    assert runner is not None
    runner.go.clear()
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(engine.run(ONES)["logits"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: runner.active == 4)
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()  # it waits for runs in progress
    runner.go.set()
    closer.join(LONG)
    assert runner.closes == 1
    assert not runner.closed_while_running
    for thread in threads:
        thread.join()
    assert len(results) == 4


def test_a_failing_run_does_not_block_close(out: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeRunner, images: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("boom")

    engine = vp_engines.load(out)
    monkeypatch.setattr(FakeRunner, "_run", fail)
    with pytest.raises(RuntimeError, match="boom"):
        engine.run(ONES)
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    closer.join(LONG)
    assert not closer.is_alive()


def test_a_real_model_through_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("vp_engines.backends.ort", reason="the ort backend is not written yet")
    variants = fields()["variants"]
    variants["reduced"] |= {"files": ["engine/model.onnx"], "requirements": {}}
    write_bundle(
        tmp_path / "a.vpe",
        files={"plan.json": b"{}", "engine/model.onnx": linear_model(1.0), "dense/model.onnx": linear_model(2.0)},
        **fields(variants=variants),
    )
    with vp_engines.load(tmp_path / "a.vpe", threads=1) as reduced:
        assert np.allclose(reduced.run(ONES)["logits"], [[48, -48], [48, -48]])
    with vp_engines.load(tmp_path / "a.vpe", variant="dense", device="cpu") as dense:
        assert np.allclose(dense.run(ONES)["logits"], [[96, -96], [96, -96]])
