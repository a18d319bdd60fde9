"""The class of an image folder, rule by rule, and the sources of class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from timm.data.imagenet_info import ImageNetInfo

from vp_engines.errors import VpError
from vp_exporter.data.labels import known_names, label_folders, read_names
from vp_exporter.errors import DataError

WHERE = Path("val")


def labels(folders: list[str], classes: list[str] | None, count: int) -> dict[str, int]:
    return label_folders(folders, classes, count, WHERE).label_of


@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        (["cat", "dog"], ["dog", "cat", "eel"], {"cat": 1, "dog": 0}),  # a subset, in another order
        (["golden_retriever", "Tabby"], ["tabby", "golden retriever"], {"golden_retriever": 1, "Tabby": 0}),
        (["1", "0"], ["1", "0"], {"1": 0, "0": 1}),  # names win over numbers
    ],
)
def test_by_name(folders: list[str], classes: list[str], expected: dict[str, int]) -> None:
    assert labels(folders, classes, len(classes)) == expected


def test_spelling_is_not_guessed_where_it_leaves_a_choice() -> None:
    with pytest.raises(DataError, match="no class of the model: 'A-B'"):
        labels(["A-B", "c"], ["a b", "a_b", "c"], 3)


def test_names_that_fit_in_part_show_the_first_that_do_not() -> None:
    with pytest.raises(DataError) as caught:
        labels(["cat", "dgo", "ele"], ["cat", "dog", "eel"], 3)
    assert "no class of the model: 'dgo', 'ele'" in str(caught.value)
    assert "such as 'dog', 'eel'" in str(caught.value)


@pytest.mark.parametrize("names", [["0", "2", "10"], ["000", "002", "010"], ["00", "02", "10"]])
def test_by_number(names: list[str]) -> None:
    found = label_folders(names, None, 11, WHERE)
    assert sorted(found.label_of.values()) == [0, 2, 10]
    assert all(int(name) == label for name, label in found.label_of.items())
    assert "class numbers" in found.note
    assert found.names is None


def test_numbers_that_are_one_class() -> None:
    with pytest.raises(DataError, match="2 class folders"):
        labels(["1", "01"], None, 5)


def test_by_synset() -> None:
    """Ten folders of ImageNet, as in Imagenette, on a model with 1000 classes."""
    info = ImageNetInfo("imagenet-1k")
    chosen = [info.label_names()[i] for i in (0, 217, 482, 999)]
    found = label_folders(chosen, None, 1000, WHERE)
    assert [found.label_of[name] for name in chosen] == [0, 217, 482, 999]
    assert found.names is not None
    assert found.names[0] == "tench, Tinca tinca"
    # Also if the model's class names are words.
    assert labels(chosen, info.label_descriptions(), 1000) == found.label_of  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no class of ImageNet's 1000: 'n00000001'"):
        labels([*chosen, "n00000001"], None, 1000)


def test_synsets_of_a_model_of_its_own() -> None:
    found = label_folders(["n02084071", "n01503061"], None, 2, WHERE)
    assert found.label_of == {"n01503061": 0, "n02084071": 1}
    assert found.names == ("n01503061", "n02084071")


def test_by_order() -> None:
    found = label_folders(["b", "a", "c"], None, 3, WHERE)
    assert found.label_of == {"a": 0, "b": 1, "c": 2}
    assert found.names == ("a", "b", "c")
    assert label_folders(["b", "a"], ["x", "y"], 2, WHERE).names is None  # the model has names already


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (["class1", "class10", "class2"], "class 1 is 'class10' by text, .*'class2' by its number"),
        (["Zebra", "apple"], "class 0 is 'Zebra' by text, .*'apple' by its number"),
        ([str(i) for i in range(1, 11)], "class 1 is '10' by text, .*'2' by its number"),
    ],
)
def test_an_order_that_trainers_disagree_on(folders: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says + ".*`classes=FILE`"):
        labels(folders, None, len(folders))
    names = sorted(folders, reverse=True)
    assert labels(folders, names, len(folders)) == {name: i for i, name in enumerate(names)}


def test_the_parts_of_a_data_set() -> None:
    with pytest.raises(DataError, match="parts of a data set: name val/test"):
        labels(["test", "train"], None, 5)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "a\nb c\nd\n"),
        ("names.txt", "\ufeffa\r\n b c \r\nd"),
        ("names.json", '["a", "b c", "d"]'),
        ("names.json", '{"2": "d", "0": "a", "1": "b c"}'),
        ("names.json", '{"a": 0, "d": 2, "b c": 1}'),
        ("config.json", '{"model_type": "vit", "id2label": {"0": "a", "1": "b c", "2": "d"}}'),
    ],
)
def test_files_of_names(tmp_path: Path, name: str, text: str) -> None:
    assert read_names(written(tmp_path / name, text)) == ["a", "b c", "d"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("names.txt", "a\n\nb\n", "name 2 of .*names.txt is empty"),
        ("names.txt", "", "name 1 .* is empty|holds no names"),
        ("names.json", "{", "cannot read"),
        ("names.json", '{"0": "a", "2": "b"}', "does not number its names from 0 to 1"),
        ("names.json", "3", "holds no list of names"),
        ("names.json", "[]", "holds no names"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(VpError, match=says) as caught:
        read_names(written(tmp_path / name, text))
    assert "\n" not in str(caught.value)


class Model:
    def __init__(self, **config: Any) -> None:
        self.pretrained_cfg = config


def test_names_of_a_models_configuration() -> None:
    model = Model(source="local-dir", label_names=["a", "b"], num_classes=2)
    assert known_names(model, 2, pretrained=False) == ("a", "b")
    assert known_names(model, 3, pretrained=False) is None  # another head
    described = {"n01440764": "tench", "n01443537": "goldfish"}
    synsets = Model(source="hf-hub", label_names=list(described), label_descriptions=described)
    assert known_names(synsets, 2, pretrained=True) == ("tench", "goldfish")


def test_timms_pretrained_models_are_of_imagenet() -> None:
    model = Model(num_classes=1000)
    names = known_names(model, 1000, pretrained=True)
    assert names is not None
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    assert known_names(model, 1000, pretrained=False) is None  # a user's own 1000 classes may be any
    assert known_names(Model(num_classes=768), 768, pretrained=True) is None


def test_json_names_may_hold_any_letters(tmp_path: Path) -> None:
    path = written(tmp_path / "names.json", json.dumps(["ä", "日本"]))
    assert read_names(path) == ["ä", "日本"]
