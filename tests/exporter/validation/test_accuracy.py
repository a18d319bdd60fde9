import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.exporter.processes import in_threads
from vp_engines.backends.base import Runner, TensorSpec
from vp_exporter.data.image_folder import Batch, ImageFolder
from vp_exporter.errors import DataError, VpError
from vp_exporter.utils.distributed import Workers
from vp_exporter.validation import accuracy
from vp_exporter.validation.accuracy import evaluate, kl_divergence
from vp_exporter.validation.intervals import (
    bootstrap_mean,
    bootstrap_ratio_of_medians,
    mcnemar_exact,
    paired_difference,
    wilson,
)


class Table(Runner):
    """A fake engine: pixel [0, 0, 0] of an image is the row of the table that it returns."""

    def __init__(self, table):
        super().__init__(
            (TensorSpec("images", "float32", ("batch", 3, 2, 2)),),
            (TensorSpec("logits", "float32", ("batch", len(table[0]))),),
        )
        self.table = np.asarray(table, np.float32)

    def _run(self, images):
        return {"logits": self.table[images[:, 0, 0, 0].astype(int)]}


class Rows:
    """Image i selects row i."""

    def __init__(self, count, num_classes, labels=None, skipped=()):
        self.count, self.num_classes, self.labels, self.skipped = count, num_classes, labels, list(skipped)

    @property
    def labelled(self):
        return self.labels is not None

    def __len__(self):
        return self.count

    def batches(self, batch_size):
        for start in range(0, self.count, batch_size):
            rows = np.arange(start, min(start + batch_size, self.count))
            images = np.zeros((len(rows), 3, 2, 2), np.float32)
            images[:, 0, 0, 0] = rows
            labels = None if self.labels is None else np.asarray(self.labels, np.int64)[rows]
            yield Batch(images, labels, tuple(Path(f"{row}.png") for row in rows))


def numbered(root, count, labels=3, **options):
    """Files whose content is the row that they select; "x" is broken."""
    for row in range(count):
        path = root / f"{row * labels // count}" / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(str(row))
    return ImageFolder(root, read_number, classes=None, num_classes=labels, **options)


def read_number(path):
    image = np.zeros((3, 2, 2), np.float32)
    image[0, 0, 0] = int(path.read_text())
    return image


class Heard:
    def __init__(self):
        self.warnings = []

    def track(self, items, *, total, description):
        yield from items

    def warn(self, text):
        self.warnings.append(text)


def one_hot(answers, classes, height=3.0):
    table = np.zeros((len(answers), classes), np.float32)
    table[np.arange(len(answers)), answers] = height
    return table


def plain_kl(dense, reduced):
    """In plain floats, from the definition."""
    p, q = ([math.exp(x) for x in row] for row in (dense, reduced))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_counted_by_hand():
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    dense = [0, 1, 2, 0, 1, 2, 1, 2]  # right on 0-5
    reduced = [0, 1, 2, 0, 2, 1, 0, 2]  # right on 0-3 and 6; differs from dense on 4, 5, 6
    result = evaluate(
        Table(one_hot(dense, 3)), Table(one_hot(reduced, 3)), Rows(8, 3, labels, [("x", "y")]), batch_size=3
    )
    assert (result.images, result.skipped) == (8, 1)
    assert (result.dense_top1, result.reduced_top1) == (75.0, 62.5)
    assert (result.dense_top5, result.reduced_top5) == (None, None)  # three classes
    assert (result.only_dense_right, result.only_reduced_right) == (2, 1)
    assert result.mcnemar_p == 1.0
    assert result.top1_difference.value == pytest.approx(-12.5)
    assert result.agreement.value == pytest.approx(62.5)
    assert result.finite
    assert result.parity is None
    # 3 of 8 images have swapped one-hot logits of height 3 among three classes, the others are equal.
    assert result.kl.value == pytest.approx(3 / 8 * plain_kl([3, 0, 0], [0, 3, 0]), rel=1e-6)
    assert result.kl.low <= result.kl.value <= result.kl.high


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_against_plain_loops(batch_size):
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(50, 9)).astype(np.float32)
    reduced = (dense + rng.normal(size=dense.shape) * 0.7).astype(np.float32)
    labels = rng.integers(0, 9, 50)
    result = evaluate(Table(dense), Table(reduced), Rows(50, 9, labels), batch_size=batch_size)

    def top(table, k):
        hits = 0
        for row, label in zip(table, labels, strict=True):
            hits += label in sorted(range(9), key=lambda c: -row[c])[:k]
        return 100 * hits / 50

    assert result.dense_top1 == pytest.approx(top(dense, 1))
    assert result.reduced_top1 == pytest.approx(top(reduced, 1))
    assert result.dense_top5 == pytest.approx(top(dense, 5))
    assert result.reduced_top5 == pytest.approx(top(reduced, 5))
    expected = sum(plain_kl(a.tolist(), b.tolist()) for a, b in zip(dense, reduced, strict=True)) / 50
    assert result.kl.value == pytest.approx(expected, rel=1e-9)


def test_unlabelled():
    result = evaluate(Table(one_hot([0, 1], 7)), Table(one_hot([0, 2], 7)), Rows(2, 7))
    assert not result.labelled
    assert result.agreement.value == 50
    assert result.kl.value > 0
    fields = ("dense_top1", "reduced_top1", "dense_top5", "reduced_top5", "top1_difference", "only_dense_right")
    assert all(getattr(result, name) is None for name in (*fields, "only_reduced_right", "mcnemar_p"))


def test_equal_logits_are_ranked_by_class_number():
    # All-equal logits: argmax gives class 0, so label 0 is top-1, labels 0-4 are top-5, and the rest are not.
    flat = Table(np.zeros((8, 8)))
    result = evaluate(flat, flat, Rows(8, 8, range(8)))
    assert (result.dense_top1, result.dense_top5) == (12.5, 62.5)
    assert result.agreement.value == 100


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["dense", "reduced"])
def test_nonfinite_outputs_fail_and_are_not_averaged_away(poison, where):
    good, bad = one_hot([0, 1, 2, 3], 6), one_hot([0, 1, 2, 3], 6)
    bad[2, 5] = poison
    heard = Heard()
    pair = (Table(bad), Table(good)) if where == "dense" else (Table(good), Table(bad))
    result = evaluate(*pair, Rows(4, 6, [0, 1, 2, 3]), progress=heard)
    assert not result.finite
    assert (result.nonfinite_dense, result.nonfinite_reduced) == ((1, 0) if where == "dense" else (0, 1))
    assert result.nonfinite_images == ("2.png",)
    assert result.kl is None
    assert result.agreement.value == 75
    assert {result.dense_top1, result.reduced_top1} == {75.0, 100.0}
    assert {result.dense_top5, result.reduced_top5} == {75.0, 100.0}
    assert "NaN or infinite" in heard.warnings[0]
    json.dumps(result.to_dict(), allow_nan=False)


def test_nan_on_both_sides_is_no_agreement():
    table = np.full((3, 4), np.nan)
    result = evaluate(Table(table), Table(table), Rows(3, 4, [0, 1, 2]))
    assert (result.agreement.value, result.dense_top1, result.reduced_top1) == (0, 0, 0)
    assert (result.only_dense_right, result.only_reduced_right) == (0, 0)


def test_parity_with_pytorch():
    dense, reduced = one_hot([0] * 10, 4), one_hot([1] * 10, 4, 2.0)
    asked = []

    def reference(images):
        rows = images[:, 0, 0, 0].astype(int)
        asked.append(len(rows))
        logits = reduced[rows].copy()
        logits[:, 3] += np.where(rows == 4, 0.5, 0.0)  # only row 4 differs
        return logits

    result = evaluate(
        Table(dense), Table(reduced), Rows(10, 4), batch_size=4, reference=reference, reference_limit=6
    ).parity
    assert asked == [4, 2]
    assert (result.images, result.same_top1, result.nonfinite) == (6, 6, 0)
    assert result.max_abs == pytest.approx(0.5)
    assert result.mean_abs == pytest.approx(0.5 / 24)
    assert result.relative == pytest.approx(math.sqrt(0.25 / 24) / math.sqrt((6 * 4 + 0.25) / 24))


def test_a_nan_in_the_reference_fails():
    table = Table(one_hot([0, 1], 4))
    result = evaluate(table, table, Rows(2, 4), reference=lambda images: np.full((len(images), 4), np.nan))
    assert (result.parity.nonfinite, result.parity.max_abs, result.finite) == (2, None, False)


def test_wrong_outputs_are_named():
    good = Table(one_hot([0, 1], 4))
    with pytest.raises(DataError, match=r"reduced engine's logits have shape \[2, 3\].*\[2, 4\]"):
        evaluate(good, Table(one_hot([0, 1], 3)), Rows(2, 4))

    class Other(Table):
        def _run(self, images):
            return {"features": images}

    with pytest.raises(DataError, match=r"dense engine's outputs are \['features'\]"):
        evaluate(Other(one_hot([0, 1], 4)), good, Rows(2, 4))
    with pytest.raises(DataError, match="no image"):
        evaluate(good, good, Rows(0, 4))


def test_labels_in_the_wrong_order_are_noticed():
    heard = Heard()
    answers = np.arange(40) % 10
    table = Table(one_hot(answers, 10))
    evaluate(table, table, Rows(40, 10, (answers + 1) % 10), progress=heard)
    assert "about chance" in heard.warnings[0]
    heard.warnings.clear()
    evaluate(table, table, Rows(40, 10, answers), progress=heard)
    assert not heard.warnings


def test_kl_is_stable():
    dense = np.array([[1e30, 0, -1e30], [700.0, -700, 0], [0, 0, 0]])
    assert kl_divergence(dense, dense).tolist() == [0, 0, 0]
    # KL([1, 0] || softmax(0, 1000)) = 1000 up to rounding, where a naive softmax would say log 0.
    assert kl_divergence(np.array([[1000.0, 0]]), np.array([[0, 1000.0]]))[0] == pytest.approx(1000)
    shifted = np.array([[1.0, 2, 3]])
    assert kl_divergence(shifted, shifted + 1e6)[0] == pytest.approx(0, abs=1e-9)
    assert (kl_divergence(np.random.default_rng(0).normal(size=(99, 5)), np.zeros((99, 5))) >= 0).all()


def test_wilson_against_the_quadratic():
    """Its ends are the shares p with (share - p)^2 = z^2 p (1 - p) / n."""
    for successes, trials in [(0, 5), (3, 7), (97, 100), (736, 736), (1, 1)]:
        result = wilson(successes, trials)
        assert 0 <= result.low <= result.value <= result.high <= 1
        for end in (result.low, result.high):
            assert (successes / trials - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, abs=1e-6)


def test_mcnemar_against_every_outcome():
    """Sum the probabilities of all outcomes of coin tosses that are at least as uneven."""
    for b, c in [(0, 0), (1, 0), (5, 5), (9, 6), (2, 12), (0, 10)]:
        n, uneven = b + c, 0
        for tosses in range(2**n):
            heads = bin(tosses).count("1")
            uneven += abs(2 * heads - n) >= abs(b - c)
        assert mcnemar_exact(b, c) == pytest.approx(uneven / 2**n)
    assert 0 < mcnemar_exact(3000, 2500) < 1e-10
    assert mcnemar_exact(9, 6) == mcnemar_exact(6, 9)


def test_paired_difference_by_hand():
    # b = 9, c = 6, n = 736: adjusted 9.5 and 6.5 of 738.
    result = paired_difference(9, 6, 736)
    centre, error = -3 / 738, math.sqrt(16 - 9 / 738) / 738
    assert result.value == pytest.approx(-3 / 736)
    assert (result.low, result.high) == (
        pytest.approx(centre - 1.959964 * error),
        pytest.approx(centre + 1.959964 * error),
    )
    same = paired_difference(0, 0, 100)
    assert same.value == 0
    assert same.low < 0 < same.high  # no observed difference does not prove equality


@pytest.mark.parametrize(("n", "b", "c"), [(50, 0.1, 0.05), (200, 0.03, 0.01), (736, 0.012, 0.008), (1000, 0.15, 0.1)])
def test_coverage_of_the_paired_interval(n, b, c):
    """Over many data sets drawn from known probabilities, the interval covers the truth about 95 times in 100."""
    rng = np.random.default_rng(1)
    draws = rng.multinomial(n, [b, c, 1 - b - c], 4000)
    results = [paired_difference(int(x), int(y), n) for x, y, _ in draws]
    covered = np.mean([result.low <= c - b <= result.high for result in results])
    assert 0.935 <= covered <= 0.99


def test_bootstraps_cover():
    rng = np.random.default_rng(2)
    means = ratios = 0
    for i in range(150):
        values = rng.exponential(1, 80)
        mean = bootstrap_mean(values, seed=i, resamples=200)
        means += mean.low <= 1 <= mean.high
        common = rng.normal(1, 0.2, 80)  # drift shared by both
        ratio = bootstrap_ratio_of_medians(
            2 * (5 + common + rng.normal(0, 0.1, 80)), 5 + common + rng.normal(0, 0.1, 80), seed=i, resamples=200
        )
        ratios += ratio.low <= 2 <= ratio.high
    assert means >= 0.87 * 150
    assert ratios >= 0.87 * 150
    assert bootstrap_mean(np.arange(9.0)) == bootstrap_mean(np.arange(9.0))  # seeded


@pytest.fixture
def noisy():
    """Dense and reduced outputs of 50 images in 7 classes, four of them with a NaN."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(50, 7)).astype(np.float32)
    reduced = (dense + rng.normal(size=dense.shape)).astype(np.float32)
    return dense, reduced


def together(world, root, dense, reduced, batch_size=4, heard=None, **options):
    def one(workers):
        data = numbered(root, 50, 7, **options)
        progress = (heard or [Heard() for _ in range(world)])[workers.rank]
        found = evaluate(Table(dense), Table(reduced), data, batch_size=batch_size, progress=progress, workers=workers)
        return found, data.skipped

    return in_threads(world, one)


@pytest.mark.parametrize("world", [2, 3, 20])  # 50 images are 13 batches of 4
@pytest.mark.parametrize("broken", [(), (0, 1, 2, 3, 40, 49)], ids=["sound", "broken"])
def test_any_number_of_processes_gives_the_same(world, broken, noisy, tmp_path):
    numbered(tmp_path, 50, 7)
    for row in broken:
        next(tmp_path.glob(f"*/{row:03}.png")).write_text("x")
    ((alone, skipped),) = together(1, tmp_path, *noisy)
    assert (alone.images, alone.skipped) == (50 - len(broken), len(broken))
    assert alone.kl.low < alone.kl.high
    found = together(world, tmp_path, *noisy)
    assert found == [(alone, skipped)] * world


def test_failures_of_engines_are_named_in_the_order_of_files(noisy, tmp_path):
    dense, reduced = noisy
    for i, row in enumerate((5, 20, 21, 30, 48, 49)):
        (dense, reduced)[i % 2][row] = np.nan
    heard = [Heard(), Heard(), Heard()]
    ((alone, _),) = together(1, tmp_path, dense, reduced, heard=heard[2:])
    assert (alone.nonfinite_dense, alone.nonfinite_reduced, alone.kl) == (3, 3, None)
    found = together(2, tmp_path, dense, reduced, heard=heard)
    assert [each for each, _ in found] == [alone] * 2
    assert alone.nonfinite_images == ("005.png", "020.png", "021.png", "030.png", "048.png")
    assert heard[0].warnings == heard[2].warnings
    assert "NaN or infinite" in heard[0].warnings[0]
    assert heard[1].warnings == []  # the leader warns for all


def test_merged_tallies_are_one(noisy):
    dense, reduced = noisy
    dense[3], reduced[40] = np.nan, np.inf
    labels = np.arange(50) % 7
    paths = tuple(Path(f"{row}.png") for row in range(50))

    def tally(*cuts):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            part = accuracy._Tally(7, True)
            if stop > start:
                part.add(dense[start:stop], reduced[start:stop], Batch(None, labels[start:stop], paths[start:stop]))
            parts.append(part)
        for later in parts[1:]:
            parts[0].merge(later)
        kl = np.concatenate(parts[0].kl).tolist()
        return dataclasses.replace(parts[0], kl=[]), kl

    assert tally(0, 17, 17, 50) == tally(0, 50)
    assert tally(0, 0, 50) == tally(0, 50)


def test_strict_stops_every_process(noisy, tmp_path):
    numbered(tmp_path, 50, 7)
    next(tmp_path.glob("*/040.png")).write_text("x")
    found = together(2, tmp_path, *noisy, strict=True)
    assert [type(error) for error in found] == [DataError] * 2
    assert str(found[0]) == str(found[1])
    assert "5/040.png" in str(found[0])


def test_no_sound_image_on_any_process(noisy, tmp_path):
    for path in numbered(tmp_path, 50, 7).paths:
        path.write_text("x")
    alone, *found = together(1, tmp_path, *noisy) + together(2, tmp_path, *noisy)
    assert "none of the 50 images" in str(alone)
    assert [str(error) for error in found] == [str(alone)] * 2


def test_an_engine_that_fails_on_one_process_fails_on_all(noisy, tmp_path):
    dense, reduced = noisy
    found = together(2, tmp_path, dense, reduced[:40])
    assert isinstance(found[1], IndexError)
    assert str(found[0]).startswith("process 1 of 2 failed: IndexError")


def test_no_parity_over_processes(noisy, tmp_path):
    with pytest.raises(VpError, match="parity with PyTorch asked of 2 processes; expected one process"):
        evaluate(Table(noisy[0]), Table(noisy[1]), Rows(4, 7), reference=lambda images: images, workers=Workers(0, 2))
