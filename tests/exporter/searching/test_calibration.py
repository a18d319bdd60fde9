"""Image folders as calibration batches: shuffling, skipped files, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.exporter.tiny import tiny_vit
from vp_engines.preprocess import preprocess
from vp_exporter.errors import SearchError
from vp_exporter.model.preprocessing import preprocessing_of
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.calibration import Calibration, load_calibration
from vp_exporter.utils.distributed import Workers

CLASSES, EACH = 7, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (tmp_path / f"class-{label}").mkdir()
        for i in range(EACH):
            picture = rng.integers(0, 255, (70, 70, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"class-{label}" / f"{i}.png")
    return tmp_path


def load(root: Path, **given: object) -> tuple[Calibration, torch.nn.Module]:
    vit, description = tiny_vit()
    spec = preprocessing_of(vit, description)
    settings = {"limit": None, "batch_size": 8, **given}
    found = load_calibration(
        root,
        lambda path: preprocess([path], spec)[0],
        vit,
        description,
        **settings,  # type: ignore[arg-type]
    )
    return found, vit


def labels(calibration: Calibration) -> list[int]:
    parts = [calibration.labels(batch) for batch in (*calibration.search, *calibration.held)]
    return torch.cat([part for part in parts if part is not None]).tolist()


def test_batches_mix_the_classes_and_carry_their_own_labels(folder: Path) -> None:
    calibration, vit = load(folder, augment="none")
    assert (calibration.search, calibration.held) == ((0, 1, 2), (3,))
    assert sorted(labels(calibration)) == sorted(list(range(CLASSES)) * EACH)
    assert len(set(labels(calibration)[:8])) > 3, "a sorted folder would give two classes a batch"
    # Labels name the files: undo the shuffle by comparing pixels.
    spec = preprocessing_of(vit, tiny_vit()[1])
    known = {
        preprocess([path], spec)[0].tobytes(): int(path.parent.name.removeprefix("class-"))
        for path in sorted(folder.rglob("*.png"))
    }
    for batch in (*calibration.search, *calibration.held):
        got = [known[image.numpy().tobytes()] for image in calibration.images(batch)]
        assert got == calibration.labels(batch).tolist()  # type: ignore[union-attr]
        with torch.no_grad():
            dense = ReducedViT(vit, tiny_vit()[1])(calibration.images(batch))
        assert torch.equal(dense, calibration.dense(batch))


def test_the_seed_decides_the_order(folder: Path) -> None:
    assert labels(load(folder)[0]) == labels(load(folder)[0])
    assert labels(load(folder)[0]) != labels(load(folder, seed=1)[0])
    assert load(folder)[0].fingerprint == load(folder, seed=1)[0].fingerprint != ""


def test_a_broken_image_is_skipped_and_said(folder: Path) -> None:
    (folder / "class-3" / "1.png").write_bytes(b"no image")
    calibration, _ = load(folder)
    assert [name for name, _ in calibration.skipped] == ["class-3/1.png"]
    assert len(labels(calibration)) == CLASSES * EACH - 1
    assert labels(calibration).count(3) == EACH - 1
    with pytest.raises(Exception, match=r"class-3/1\.png"):
        load(folder, strict=True)


def test_labels_are_asked_for(folder: Path) -> None:
    flat = folder / "class-0"
    calibration, _ = load(flat, batch_size=2)
    assert not calibration.labelled
    with pytest.raises(SearchError, match="has no labels"):
        load(flat, batch_size=2, need_labels=True)


def test_too_few_images(folder: Path) -> None:
    with pytest.raises(SearchError, match="28 calibration images; expected at least 64"):
        load(folder, batch_size=32)
    with pytest.raises(SearchError, match="12 calibration images"):
        load(folder, limit=12)


def test_a_model_without_classes_is_refused(folder: Path) -> None:
    vit, description = tiny_vit("features")
    with pytest.raises(SearchError, match="gives features"):
        load_calibration(folder, lambda path: np.zeros((3, 64, 64), np.float32), vit, description)


def test_a_process_decodes_its_own_batches_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = load(folder)
    read: list[Path] = []
    vit, description = tiny_vit()
    spec = preprocessing_of(vit, description)

    def prepare(path: Path) -> np.ndarray:
        read.append(path)
        return preprocess([path], spec)[0]

    # what the other process would send
    def gather(self: Workers, function: object, items: range) -> list[torch.Tensor]:
        mine = {item: function(item) for item in items if self.owns(item)}  # type: ignore[operator]
        if len(next(iter(mine.values())).shape) == 2:
            return [mine.get(item, whole.dense(item)) for item in items]
        return [mine.get(item, torch.arange(len(whole.dense(item)))) for item in items]

    monkeypatch.setattr(Workers, "map", gather)
    found = load_calibration(folder, prepare, vit, description, limit=None, batch_size=8, workers=Workers(1, 2))
    assert len(read) == 8 + 4, "batches 1 and 3"
    assert torch.equal(found.images(1), whole.images(1))
    with pytest.raises(KeyError):
        found.images(0)
