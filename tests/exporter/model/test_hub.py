"""Model names of timm, with folders written by timm itself, and without access to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models import save_for_hf

from vp_exporter.errors import UnsupportedModelError, WeightsError
from vp_exporter.model.hub import hub_at_hand, parse_name
from vp_exporter.model.loading import LoadedModel, ModelRequest, describe_by_name, load_model
from vp_exporter.model.preprocessing import preprocessing_of
from vp_exporter.plan import PlanModel

NAME = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32}
HUB_NAME = "someone/tiny"


def write(path: Path, *, safe: bool) -> Path:
    """A user's model, as written by push_to_hf_hub."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3, **ARGS)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.75}
    config = {"label_names": ["ant", "bee", "cat"]}
    save_for_hf(model, path, model_config=config, model_args=ARGS, safe_serialization=safe)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "tiny", safe=True)


def load(name: str, **request: Any) -> LoadedModel:
    return load_model(ModelRequest(name, **{"pretrained": True, **request}))


def check(loaded: LoadedModel, source: str) -> None:
    description = loaded.description
    assert (description.name, description.num_classes, description.image_size) == (NAME, 3, (32, 32))
    assert loaded.classes == ("ant", "bee", "cat")
    spec = preprocessing_of(loaded.vit, description)
    assert (spec.mean, spec.std, spec.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 42)
    assert loaded.weights_source == source
    torch.manual_seed(0)
    expected = timm.create_model(NAME, num_classes=3, **ARGS).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.vit.state_dict().items())


def test_a_local_folder(folder: Path, tmp_path: Path) -> None:
    check(load(f"local-dir:{folder}"), "tiny/model.safetensors")
    check(load(f"local-dir:{write(tmp_path / 'tiny', safe=False)}"), "tiny/pytorch_model.bin")
    description = describe_by_name(f"local-dir:{folder}", {})
    assert (description.name, description.num_classes) == (NAME, 3)


def test_a_local_folder_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(folder, other)
    (other / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"):
        load(f"local-dir:{other}")
    shutil.copy(folder / "model.safetensors", other / "other.safetensors")
    check(load(f"local-dir:{other}"), "tiny/other.safetensors")
    assert load(f"local-dir:{other}", num_classes=0).description.num_classes == 0
    named = load(f"local-dir:{other}", pretrained=False, weights=folder / "model.safetensors")
    check(named, "model.safetensors")


def test_another_size_of_a_local_folder(folder: Path) -> None:
    loaded = load(f"local-dir:{folder}", img_size=(64, 48))
    assert loaded.description.image_size == (64, 48)
    assert any("resampled from 2 x 2 to 4 x 3 patches" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "holds no config.json"),
        ("{", "cannot read"),
        ({"model_type": "vit"}, "names no timm architecture: it is of transformers' 'vit'; .*`weights="),
        ({"architecture": "resnet_of_my_own"}, "has no model 'resnet_of_my_own'"),
    ],
)
def test_folders_that_are_none(tmp_path: Path, config: Any, says: str) -> None:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        load(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="there is no folder"):
        load(f"local-dir:{tmp_path / 'none'}")


def test_names_without_their_prefix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match=f"for this folder give local-dir:{folder}"):
        load(str(folder))
    with pytest.raises(UnsupportedModelError, match="give hf-hub:google/vit-base for a model on the hub"):
        load("google/vit-base")
    with pytest.raises(UnsupportedModelError, match="names nothing; expected hf-hub:ORGANISATION/NAME"):
        load("hf-hub:")


def test_timms_own_names() -> None:
    assert parse_name("timm/vit_small_patch16_224.augreg_in1k").text == "vit_small_patch16_224.augreg_in1k"
    tagged = load_model(ModelRequest("timm/" + NAME + ".augreg_in21k_ft_in1k", ARGS, random_init=True))
    assert tagged.description.name == NAME + ".augreg_in21k_ft_in1k"
    assert PlanModel.of(tagged.description).architecture == NAME
    with pytest.raises(UnsupportedModelError, match=r"Invalid pretrained tag.*it has vit_tiny_patch16_224\.augreg"):
        load_model(ModelRequest(NAME + ".no_such_tag", ARGS, random_init=True))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no hub: its address is closed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", [NAME, f"hf-hub:{HUB_NAME}", f"hf_hub:{HUB_NAME}", f"timm/{NAME}"])
@pytest.mark.parametrize("offline", [False, True])
def test_out_of_reach_is_one_line(
    cache: Path, name: str, offline: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)  # the hub's client sleeps between retries
    with pytest.raises(WeightsError, match=r"timm cannot fetch the .*`weights`") as caught:
        load(name)
    assert not slept
    assert "\n" not in str(caught.value)
    assert "Retrying" not in capfd.readouterr().err
    assert offline == huggingface_hub.constants.HF_HUB_OFFLINE  # restored


def fill(cache: Path, folder: Path) -> None:
    """Fill the hub's cache as if `folder` had been downloaded from HUB_NAME."""
    commit = "0" * 40
    repository = cache / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "vit"}, "names no architecture; expected a repository that timm wrote; .*`weights=FILE`"),
        ({"architecture": "vit_of_another_timm"}, r"names another, Unknown model \(vit_of_another_timm\)"),
    ],
)
def test_a_repository_that_timm_did_not_write(cache: Path, tmp_path: Path, config: Any, says: str) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    fill(cache, tmp_path / "foreign")
    with pytest.raises(UnsupportedModelError, match=f"hf-hub:{HUB_NAME} is no model of timm .*{says}"):
        load(f"hf-hub:{HUB_NAME}")


def test_what_is_cached_needs_no_hub(cache: Path, folder: Path) -> None:
    fill(cache, folder)
    loaded = load(f"hf-hub:{HUB_NAME}")
    check(loaded, f"hf-hub:{HUB_NAME}")
    assert any("the hub does not answer: they are those of the cache" in note for note in loaded.notes)
    assert describe_by_name(f"hf-hub:{HUB_NAME}", {}).num_classes == 3
    with pytest.raises(WeightsError, match=r"`num_classes` is 5, and the pretrained weights of .* have 3"):
        load(f"hf-hub:{HUB_NAME}", num_classes=5)
    assert load(f"hf-hub:{HUB_NAME}", num_classes=0).description.num_classes == 0


def test_a_new_head_is_not_made_up(cache: Path) -> None:
    """For another number of classes, timm gives a pretrained model a random head."""
    with pytest.raises(WeightsError, match=r"`num_classes` is 10, and the pretrained weights of .* have 1000"):
        load(NAME, num_classes=10)


def test_a_hub_that_answers_is_asked() -> None:
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with hub_at_hand() as answers:
        assert (not answers) == huggingface_hub.constants.HF_HUB_OFFLINE
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_sizes_that_leave_a_part_of_a_patch() -> None:
    with pytest.raises(UnsupportedModelError, match=r"`img_size` 40x32 .*multiples of 16, .*give 32 or 48"):
        load_model(ModelRequest(NAME, {"depth": 1}, random_init=True, img_size=(40, 32)))
    with pytest.raises(UnsupportedModelError, match="`img_size` and model argument `img_size` are both given"):
        load_model(ModelRequest(NAME, ARGS, random_init=True, img_size=(64, 64)))
