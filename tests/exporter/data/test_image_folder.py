import hashlib
import os
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vp_exporter.data import image_folder
from vp_exporter.data.image_folder import ImageFolder
from vp_exporter.errors import DataError

SIZE = 6


def prepare(path):
    """A constant image with the file's number as its value, to identify order and labels."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1)


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (value, value, value)).save(path)
    return path


@pytest.fixture
def flowers(tmp_path):
    """daisy 0 1 2 (one of them nested), rose 3 4, tulip 5."""
    for name, value in [("daisy/a.png", 0), ("daisy/b.PNG", 1), ("daisy/sub/deep/c.png", 2)]:
        save(tmp_path / name, value)
    for name, value in [("rose/a.png", 3), ("rose/b.png", 4), ("tulip/z.png", 5)]:
        save(tmp_path / name, value)
    return tmp_path


def folder(root, num_classes=3, classes=None, **options):
    return ImageFolder(root, prepare, classes=classes, num_classes=num_classes, **options)


def gather(source, batch_size=2):
    batches = list(source.batches(batch_size))
    values = [int(image[0, 0, 0]) for batch in batches for image in batch.images]
    labels = [int(label) for batch in batches for label in (batch.labels if batch.labels is not None else [])]
    return values, labels, [len(batch.images) for batch in batches]


class Heard:
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def test_sorted_order_when_names_are_unknown(flowers):
    source = folder(flowers)
    assert gather(source, 4) == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 2], [4, 2])
    assert len(source) == 6
    assert any("sorted order" in note for note in source.notes)
    batch = next(source.batches(2))
    assert batch.images.dtype == np.float32
    assert batch.images.shape == (2, 3, SIZE, SIZE)
    assert batch.labels.dtype == np.int64
    assert [path.name for path in batch.paths] == ["a.png", "b.PNG"]


def test_by_name_when_all_folders_are_classes(flowers):
    source = folder(flowers, 5, ["tulip", "x", "rose", "y", "daisy"])
    assert gather(source)[1] == [4, 4, 4, 2, 2, 0]
    assert not any("sorted" in note for note in source.notes)


def test_foreign_names_fall_back_to_sorted_order(flowers):
    # ImageNet: folders are wnids, the model's class names are words.
    assert gather(folder(flowers, 3, ["tench", "goldfish", "shark"]))[1] == [0, 0, 0, 1, 1, 2]


def test_one_misspelt_folder_is_not_scored_by_order(flowers):
    with pytest.raises(DataError, match="no class of the model: 'tulip'"):
        folder(flowers, 3, ["daisy", "rose", "tulips"])


def test_folders_numbered_past_nine_are_taken_as_numbers(tmp_path):
    for i in range(11):
        save(tmp_path / str(i) / "x.png", i)
    values, labels, _ = gather(folder(tmp_path, 11))
    assert values == labels  # not 0, 1, 10, 2, ...


def test_wrong_number_of_folders(flowers):
    with pytest.raises(DataError, match=r"3 class folders .*'daisy', 'rose', 'tulip'.*exactly 1000.*flat folder"):
        folder(flowers, 1000)


def test_two_classes_of_one_name(flowers):
    with pytest.raises(DataError, match="more than one class named 'rose'"):
        folder(flowers, 4, ["daisy", "rose", "tulip", "rose"])


def test_class_names_must_fit_the_model(flowers):
    with pytest.raises(DataError, match="2 class names for a model of 3"):
        folder(flowers, 3, ["a", "b"])


def test_an_empty_class_folder_keeps_its_place(flowers):
    (flowers / "pansy").mkdir()
    assert gather(folder(flowers, 4))[1] == [0, 0, 0, 2, 2, 3]


def test_flat_folder_has_no_labels(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "empty").mkdir()
    source = folder(tmp_path)
    assert not source.labelled
    assert gather(source) == ([0, 1, 2], [], [2, 1])
    assert next(source.batches(1)).labels is None
    assert any("without labels" in note for note in source.notes)


def test_hidden_and_foreign_files_are_passed_over(flowers):
    save(flowers / "daisy" / "._a.png")
    save(flowers / ".cache" / "a.png")
    (flowers / "daisy" / "notes.txt").write_text("x")
    save(flowers / "loose.png")
    source = folder(flowers)
    assert len(source) == 6
    assert any("1 images directly in" in note for note in source.notes)


def test_links_that_loop(flowers):
    (flowers / "daisy" / "up").symlink_to(flowers, target_is_directory=True)
    (flowers / "rose" / "self").symlink_to(flowers / "rose", target_is_directory=True)
    (flowers / "rose" / "further").symlink_to(flowers.parent, target_is_directory=True)
    (flowers / "tulip" / "knot").symlink_to("knot")
    (flowers / "again").symlink_to(flowers, target_is_directory=True)
    assert gather(folder(flowers))[0] == [0, 1, 2, 3, 4, 5]


def test_linked_class_folders_and_files_count(tmp_path, flowers):
    other = tmp_path / "other"
    (other / "a").mkdir(parents=True)
    (other / "a" / "x.png").symlink_to(flowers / "rose" / "a.png")
    (other / "b").symlink_to(flowers / "tulip", target_is_directory=True)
    assert gather(folder(other, 2))[:2] == ([3, 5], [0, 1])


def test_a_pipe_does_not_hang(flowers):
    os.mkfifo(flowers / "daisy" / "pipe.png")
    assert len(folder(flowers)) == 6


def test_corrupt_images_are_named_skipped_and_counted(flowers):
    (flowers / "daisy" / "b.PNG").write_bytes(b"no image")
    whole = save(flowers / "rose" / "b.png", 4).read_bytes()
    (flowers / "rose" / "b.png").write_bytes(whole[: len(whole) // 2])
    (flowers / "tulip" / "gone.png").symlink_to(flowers / "nowhere.png")
    heard = Heard()
    source = folder(flowers, progress=heard)
    for _ in range(2):  # a second pass counts afresh and does not warn again
        assert gather(source) == ([0, 2, 3, 5], [0, 0, 1, 2], [2, 2])  # batches stay full
        assert [name for name, _ in source.skipped] == ["daisy/b.PNG", "rose/b.png", "tulip/gone.png"]
        assert all(reason for _, reason in source.skipped)
    assert len(heard.warnings) == 3
    assert "daisy/b.PNG" in heard.warnings[0]


def test_strict_raises_on_the_first(flowers):
    (flowers / "rose" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"rose/a\.png .*cannot be decoded"):
        gather(folder(flowers, strict=True))


def test_every_image_corrupt(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(DataError, match=r"none of the 3 images .*0\.jpg"):
        gather(folder(tmp_path))


def test_nan_in_an_image_is_corruption(flowers):
    def poisoned(path):
        image = prepare(path)
        return image * np.float32("nan") if path.name == "z.png" else image

    source = ImageFolder(flowers, poisoned, classes=None, num_classes=3)
    assert gather(source)[0] == [0, 1, 2, 3, 4]
    assert source.skipped[0][0] == "tulip/z.png"


@pytest.mark.parametrize(
    "broken", [lambda image: image.astype(np.float64), lambda image: image[:, :4], lambda image: image[0]]
)
def test_prepared_arrays_must_fit(flowers, broken):
    def odd(path):
        return broken(prepare(path)) if path.name == "z.png" else prepare(path)

    with pytest.raises(DataError, match=r"tulip/z\.png was prepared as"):
        gather(ImageFolder(flowers, odd, classes=None, num_classes=3))


def test_missing_file_and_empty(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        folder(save(tmp_path / "x.png"))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no image in"):
        folder(tmp_path / "empty")


@pytest.mark.parametrize("locked", [".", "rose"])
def test_unreadable_folder(flowers, monkeypatch, locked):
    scandir = os.scandir

    def refuse(path):
        if Path(path) == flowers / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(image_folder.os, "scandir", refuse)  # chmod has no effect on root
    with pytest.raises(DataError, match=r"Permission denied.*check its permissions"):
        folder(flowers)


def test_limit_is_even_and_deterministic(tmp_path):
    for c in range(5):
        for i in range(20):
            save(tmp_path / f"class{c}" / f"{i:02}.png", 20 * c + i)
    values, labels, _ = gather(folder(tmp_path, 5, limit=10), 3)
    assert values == list(range(0, 100, 10))
    assert labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert gather(folder(tmp_path, 5, limit=7)) == gather(folder(tmp_path, 5, limit=7))
    assert len(folder(tmp_path, 5, limit=7)) == 7
    assert len(folder(tmp_path, 5, limit=1000)) == 100
    with pytest.raises(DataError, match="limit of 0"):
        folder(tmp_path, 5, limit=0)
    with pytest.raises(DataError, match="batch size of 0"):
        next(folder(tmp_path, 5).batches(0))


def test_fingerprint(flowers):
    source = folder(flowers)
    lines = b"".join(
        name.encode() + b"\0" + str((flowers / name).stat().st_size).encode() + b"\n"
        for name in ["daisy/a.png", "daisy/b.PNG", "daisy/sub/deep/c.png", "rose/a.png", "rose/b.png", "tulip/z.png"]
    )
    assert source.fingerprint() == hashlib.sha256(lines).hexdigest()
    with (flowers / "rose" / "a.png").open("ab") as file:
        file.write(b"x")
    assert folder(flowers).fingerprint() != hashlib.sha256(lines).hexdigest()


def test_names_that_are_no_utf8(flowers):
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        (flowers / "daisy" / name).write_bytes(b"broken")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    heard = Heard()
    source = folder(flowers, progress=heard)
    gather(source)
    assert source.skipped[0][0].encode("utf-8") == b"daisy/\\udcff\\udcfe.png"
    assert heard.warnings[0].encode("utf-8")
    assert len(source.fingerprint()) == 64


def test_decodes_ahead_but_not_without_end(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i:02}.png", i)
    seen, lock = set(), threading.Lock()

    def count(path):
        with lock:
            seen.add(path)
        return prepare(path)

    source = ImageFolder(tmp_path, count, classes=None, num_classes=3, workers=2)
    batches = source.batches(4)
    next(batches)
    batches.close()  # waits for decoding in progress, so the count is final; 4 taken, at most 8 ahead
    assert 4 <= len(seen) <= 12


@pytest.mark.parametrize(
    ("world", "batch_size", "sizes"),
    [(1, 2, [6]), (2, 2, [4, 2]), (3, 2, [2, 2, 2]), (2, 4, [4, 2]), (4, 2, [2, 2, 2, 0]), (3, 10, [6, 0, 0])],
)
def test_shares_are_runs_of_whole_batches(flowers, world, batch_size, sizes):
    source = folder(flowers)
    shares = [source.part(rank, world, batch_size) for rank in range(world)]
    assert [len(share) for share in shares] == sorted(sizes, reverse=True)
    together = [gather(share, batch_size) for share in shares]
    assert tuple(list(chain(*each)) for each in zip(*together, strict=True)) == gather(source, batch_size)
    assert all(share.labelled for share in shares)
    assert len(source) == 6


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 13, 29])
def test_no_share_is_more_than_a_batch_larger(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i:02}.png").touch()
    source = folder(tmp_path)
    for world in (1, 2, 3, 5, 8):
        shares = [source.part(rank, world, 4) for rank in range(world)]
        assert list(chain(*(share.paths for share in shares))) == source.paths
        batches = [-(-len(share) // 4) for share in shares]
        assert max(batches) - min(batches) <= 1
        assert batches[0] == max(batches)  # the leader's
        assert all(len(share) % 4 == 0 for share in shares if share.paths and share.paths[-1] != source.paths[-1])
        assert all(share.labels is None for share in shares)


def test_shares_account_for_what_they_skip(flowers):
    for name in ("daisy/a.png", "rose/b.png", "tulip/z.png"):
        (flowers / name).write_bytes(b"no image")
    heard = Heard()
    source = folder(flowers, progress=heard)
    shares = [source.part(rank, 3, 2) for rank in range(3)]
    assert [gather(share)[0] for share in shares] == [[1], [2, 3], []]  # the last has no valid image
    assert [[name for name, _ in share.skipped] for share in shares] == [
        ["daisy/a.png"],
        [],
        ["rose/b.png", "tulip/z.png"],
    ]
    assert source.skipped == []
    source.rejoin([entry for share in shares for entry in share.skipped])
    joined = list(source.skipped)
    gather(source)
    assert source.skipped == joined
    assert len(heard.warnings) == 3  # one per file


def test_shares_without_any_sound_image(flowers):
    for path in folder(flowers).paths:
        path.write_bytes(b"no image")
    source = folder(flowers)
    with pytest.raises(DataError) as alone:
        gather(source)
    shares = [source.part(rank, 2, 2) for rank in range(2)]
    assert [gather(share)[0] for share in shares] == [[], []]
    with pytest.raises(DataError) as caught:
        source.rejoin([entry for share in shares for entry in share.skipped])
    assert str(caught.value) == str(alone.value)


def test_a_strict_share_raises_on_the_first(flowers):
    (flowers / "rose" / "b.png").write_bytes(b"")
    source = folder(flowers, strict=True)
    assert gather(source.part(0, 2, 2))[0] == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"rose/b\.png .*cannot be decoded"):
        gather(source.part(1, 2, 2))
    with pytest.raises(DataError, match="batch size of 0"):
        source.part(0, 2, 0)
