"""Weights: read from untrusted files, checked against the model parameter by parameter, and fingerprinted."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from vp_engines.errors import EXIT_BAD_INPUT
from vp_exporter.errors import UnsupportedModelError, WeightsError
from vp_exporter.model.loading import ModelRequest, describe_by_name, load_model
from vp_exporter.model.weights import classes_of, fingerprint, load_into, read_weights

NAME = "vit_tiny_patch16_224"
ARGS = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32}

State = dict[str, Tensor]


def make(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(NAME, **{**ARGS, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in make().state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load(path: Path, **request: Any) -> Any:
    return load_model(ModelRequest(NAME, ARGS, weights=path, **request))


def test_safetensors(tmp_path: Path, state: State) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path, metadata={"classes": "a,b"})
    read, metadata = read_weights(path)
    assert same(read, state)
    assert metadata == {"classes": "a,b"}
    loaded = load(path)
    assert same(loaded.vit.state_dict(), state)
    assert loaded.weights_source == "weights.safetensors"  # no local folder
    assert loaded.description.num_classes == 5


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": {"lr": 0.1}},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "module-prefix": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "model-prefix": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
    "averaged-first": lambda state: {
        "state_dict": {name: tensor + 1 for name, tensor in state.items()},
        "state_dict_ema": state,
    },
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_checkpoints(tmp_path: Path, state: State, wrapper: str, suffix: str) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(WRAPPERS[wrapper](state), path)
    assert same(load(path).vit.state_dict(), state)


def test_old_torch_files(tmp_path: Path, state: State) -> None:
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert same(load(path).vit.state_dict(), state)


def test_half_precision_weights_become_fp32(tmp_path: Path, state: State) -> None:
    path = tmp_path / "half.safetensors"
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, path)
    loaded = load(path).vit.state_dict()
    assert same(loaded, {name: tensor.float() for name, tensor in half.items()})


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def changed(state: State, name: str, tensor: Tensor) -> State:
    return {**state, name: tensor}


def poisoned(state: State, value: float) -> State:
    tensor = state["blocks.0.mlp.fc1.weight"].clone()
    tensor[3, 4] = value
    return changed(state, "blocks.0.mlp.fc1.weight", tensor)


UNFIT: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda s: without(s, "norm.bias"), r"w\.st lacks norm\.bias; expected the 20 parameters"),
    "missing-two": (lambda s: without(s, "norm.bias", "pos_embed"), r"lacks norm\.bias and 1 more; .*name the model"),
    "extra": (lambda s: changed(s, "rope.freqs", torch.zeros(2)), r"w\.st has left over rope\.freqs; expected"),
    "wrong-width": (
        lambda s: changed(s, "norm.weight", torch.zeros(24)),
        r"norm\.weight in w\.st has shape \[24\]; expected \[16\], as the model has; name the model",
    ),
    "other-image-size": (
        lambda s: changed(s, "pos_embed", torch.zeros(1, 10, 16)),
        r"pos_embed in w\.st has shape \[1, 10, 16\]; .*or its image size with `img_size`",
    ),
    "other-classes": (
        lambda s: changed(s, "head.weight", torch.zeros(9, 16)),
        r"head\.weight .* \[9, 16\]; expected \[5, 16\].*`num_classes`",
    ),
    "nan": (lambda s: poisoned(s, float("nan")), r"blocks\.0\.mlp\.fc1\.weight in w\.st holds NaN or infinity"),
    "infinity": (lambda s: poisoned(s, float("inf")), r"blocks\.0\.mlp\.fc1\.weight in w\.st holds NaN or infinity"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit(case: str, state: State) -> None:
    change, says = UNFIT[case]
    model = make(seed=1)
    before = copy.deepcopy(model.state_dict())
    assert len(before) == 20
    with pytest.raises(WeightsError, match=says):
        load_into(model, change(state), "w.st")
    assert same(model.state_dict(), before)  # never partly applied


class Payload:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, state: State, writer: str, suffix: str) -> None:
    path, ran = tmp_path / f"evil{suffix}", tmp_path / "ran"
    content = {**state, "zz": Payload(ran)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(
        WeightsError, match="holds pickled objects that could run code; expected tensors only"
    ) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    if writer == "torch":
        torch.load(path, weights_only=False)  # the payload works, so it was not run before
        assert ran.exists()


def test_quantised_weights_are_refused() -> None:
    """int8 weights of the right shape would load, but be meaningless."""
    model = make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["head.weight"] = (state["head.weight"] * 100).to(torch.int8)
    with pytest.raises(WeightsError, match=r"head.weight in q.safetensors has dtype int8; expected floating-point"):
        load_into(model, state, "q.safetensors")


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"pickled objects.*save the state dict alone"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle-2", "pickle-5"])
def test_a_checkpoint_named_safetensors(tmp_path: Path, state: State, kind: str) -> None:
    path, ran = tmp_path / "weights.safetensors", tmp_path / "ran"
    content = {**state, "zz": Payload(ran)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError, match=r"not safetensors: it looks like a pickle or zip checkpoint.*name it \.pth"):
        read_weights(path)
    assert not ran.exists()


@pytest.mark.parametrize("size", [0, 4, 200, -1, -1000])
def test_truncated_safetensors(tmp_path: Path, state: State, size: int) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"weights\.safetensors is damaged: .*; expected a safetensors file"):
        read_weights(path)


def test_safetensors_with_an_endless_header(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(WeightsError, match="is damaged"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all\n", b"PK\x03\x04cut", b"\x80\x02cut", b"\x00" * 64])
def test_damaged_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"weights\.pth.*; expected (a file that torch\.save|tensors only)"
    ) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_truncated_checkpoint(tmp_path: Path, state: State) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match=r"cannot read .*weights\.pth: .*copy or download it again") as caught:
        read_weights(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [[], {}, {"epoch": 3}, [torch.zeros(2)], {"state_dict": {}}, torch.zeros(3)])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="holds no state dict; expected a mapping of parameter names"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=rf"there is no weights file .*{name}; expected") as caught:
        read_weights(tmp_path / name)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    with pytest.raises(WeightsError, match="there is no weights file"):
        read_weights(tmp_path)  # a folder


@pytest.mark.parametrize("name", ["weights.onnx", "weights", "weights.pkl"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"ends in '.*'; expected \.safetensors or \.pth, \.pt"):
        read_weights(tmp_path / name)


def test_classes_of(state: State) -> None:
    assert classes_of(state) == 5
    assert classes_of({f"module.{name}": tensor for name, tensor in state.items()}) == 5
    assert classes_of(make(num_classes=0).state_dict()) == 0
    assert classes_of({"weight": torch.zeros(3, 4)}) is None
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **ARGS, num_classes=9)
    assert classes_of(distilled.state_dict()) == 9


def test_fingerprint_by_hand() -> None:
    """sha256 over name, dtype and shape as JSON, then the bytes, sorted by name."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    content = b'["bias", "torch.float32", [1]]' + struct.pack("<f", 0.5)
    content += b'["weight", "torch.float32", [1, 2]]' + struct.pack("<2f", 1.0, -2.0)
    assert fingerprint(layer) == hashlib.sha256(content).hexdigest()


def test_fingerprint_is_stable_and_sensitive(state: State) -> None:
    model = make()
    first = fingerprint(model)
    assert fingerprint(make()) == fingerprint(copy.deepcopy(model)) == first
    assert fingerprint(make(seed=1)) != first
    with torch.no_grad():
        weight = model.blocks[0].attn.qkv.weight  # type: ignore[union-attr, index]
        weight.view(-1)[7] = torch.nextafter(weight.view(-1)[7], torch.tensor(9.0))  # type: ignore[operator, index]
    assert fingerprint(model) != first  # one bit of one weight differs
    load_into(model, state, "w.st")
    assert fingerprint(model) == first
    assert fingerprint(model.double()) != first


@pytest.mark.parametrize("classes", [0, 3, 1000])
def test_classes_come_from_the_weights(tmp_path: Path, classes: int) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(make(num_classes=classes).state_dict(), path)
    loaded = load(path)
    assert loaded.description.num_classes == classes
    with torch.no_grad():
        assert loaded.vit(torch.zeros(1, 3, 32, 32)).shape == (1, classes or 16)


def test_classes_that_are_named_win(tmp_path: Path, state: State) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"head\.\w+ .*expected \[7.*`num_classes`"):
        load(path, num_classes=7)


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({}, "no source of weights"),
        ({"pretrained": True, "random_init": True}, "more than one source of weights"),
        ({"weights": Path("w.pth"), "random_init": True}, "more than one source of weights"),
    ],
)
def test_exactly_one_source(sources: dict[str, Any], says: str) -> None:
    with pytest.raises(WeightsError, match=says) as caught:
        load_model(ModelRequest(NAME, ARGS, **sources))
    assert all(option in str(caught.value) for option in ("`weights=", "`pretrained=", "`random_init="))


def test_pretrained_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, pretrained: bool = False, **__: object) -> None:
        assert pretrained
        raise ConnectionError("Cannot reach the hub:\n  name resolution failed\n  (retried 5 times)")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError) as caught:
        load_model(ModelRequest(NAME, pretrained=True))
    assert str(caught.value) == (
        f"timm cannot fetch the pretrained weights of {NAME}: Cannot reach the hub:; expected a reachable hub or a "
        "filled cache; download them elsewhere and name them with `weights`"
    )


@pytest.mark.parametrize("name", ["vit_tiny_patch16_225", "vit_tiny_patch_224.augreg_in1k"])
def test_unknown_model_suggests_near_names(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"has no model '{name}'; .*did you mean .*vit_tiny_patch16_224"):
        load_model(ModelRequest(name, random_init=True))


def test_unknown_model_without_near_names() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no model 'qqqq'.*timm\.list_models\(\) lists them"):
        describe_by_name("qqqq", {})


def test_arguments_that_timm_refuses() -> None:
    with pytest.raises(UnsupportedModelError, match=r"timm cannot create .* with .*'depht': 2.*check `args`"):
        load_model(ModelRequest(NAME, {"depht": 2}, random_init=True))


def test_random_init_is_the_same_every_time() -> None:
    first = load_model(ModelRequest(NAME, ARGS, random_init=True))
    torch.manual_seed(12345)
    second = load_model(ModelRequest(NAME, ARGS, random_init=True))
    assert first.weights_sha256 == second.weights_sha256 == fingerprint(first.vit)
    assert first.weights_source == "random"
    assert not first.vit.training
    assert same(first.vit.state_dict(), second.vit.state_dict())


def test_describing_by_name_equals_describing_the_model() -> None:
    loaded = load_model(ModelRequest(NAME, ARGS, random_init=True))
    assert describe_by_name(NAME, ARGS) == loaded.description
    assert describe_by_name(NAME, ARGS, 3).num_classes == 3
