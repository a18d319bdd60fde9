"""Checkpoints of training frameworks, written by their own classes if installed, else reproduced."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor

from vp_exporter.errors import WeightsError
from vp_exporter.model.loading import LoadedModel, ModelRequest, load_model

NAME = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32}

State = dict[str, Tensor]


def make(seed: int = 0, name: str = NAME, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **{**ARGS, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def load(path: Path, name: str = NAME, args: dict[str, Any] | None = None, **request: Any) -> LoadedModel:
    return load_model(ModelRequest(name, {**ARGS, **(args or {})}, weights=path, **request))


def same(loaded: LoadedModel, model: nn.Module) -> bool:
    ours, theirs = loaded.vit.state_dict(), model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def trained() -> tuple[nn.Module, nn.Module]:
    """Weights of the last step, and their average."""
    return make(0), make(1)


class Trainer:
    """timm's CheckpointSaver with a model, its average and an optimizer, as in timm's train.py."""

    def __init__(self, model: nn.Module, folder: Path, average: nn.Module | None = None) -> None:
        optimiser = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        weights = copy.deepcopy(model.state_dict())
        optimiser.step()  # so that it has a state to save
        model.load_state_dict(weights)
        ema = None
        if average is not None:
            ema = ModelEmaV3(model)
            ema.module.load_state_dict(average.state_dict())
        args = argparse.Namespace(model=NAME, lr=0.1, betas=[0.9, 0.999], output=str(folder))
        self.saver = CheckpointSaver(model, optimiser, args=args, model_ema=ema, checkpoint_dir=str(folder))

    def save(self) -> Path:
        self.saver.save_checkpoint(3, metric=71.5)
        return Path(self.saver.checkpoint_dir) / "model_best.pth.tar"


def test_timms_own_trainer(tmp_path: Path, trained: tuple[nn.Module, nn.Module]) -> None:
    model, average = trained
    path = Trainer(model, tmp_path, average).save()
    assert type(torch.load(path, weights_only=False)["args"]) is argparse.Namespace
    loaded = load(path)
    assert same(loaded, average)  # averaged weights if present, as in timm
    assert any("'state_dict_ema.'" in note and "`use_ema=False` takes the other" in note for note in loaded.notes)
    assert same(load(path, use_ema=True), average)
    assert same(load(path, use_ema=False), model)


def test_averaged_weights_that_are_asked_for_must_be_there(
    tmp_path: Path, trained: tuple[nn.Module, nn.Module]
) -> None:
    path = Trainer(trained[0], tmp_path).save()
    assert same(load(path), trained[0])
    with pytest.raises(WeightsError, match=r"model_best\.pth\.tar holds no averaged weights.*leave out `use_ema=True`"):
        load(path, use_ema=True)
    only = saved(tmp_path / "ema.pth", {"model_ema": trained[1].state_dict()})
    with pytest.raises(WeightsError, match=r"averaged weights only; .*leave out `use_ema=False`"):
        load(only, use_ema=False)
    with pytest.raises(WeightsError, match="without `weights`"):
        load_model(ModelRequest(NAME, ARGS, random_init=True, use_ema=True))


class Wrapped(nn.Module):
    """A user's module with the model in an attribute of any name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)
        self.teacher_loss = nn.Linear(3, 3)


def _parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)  # same names as DistributedDataParallel


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": _parallel,
    "compile": torch.compile,
    "compiled-ddp": lambda model: torch.compile(_parallel(model)),
    "ddp-of-compiled": lambda model: _parallel(torch.compile(model)),
    "averaged-model": torch.optim.swa_utils.AveragedModel,
    "ema-v3": ModelEmaV3,
    "net": lambda model: Wrapped(model, "net"),
    "compiled-net": lambda model: Wrapped(torch.compile(model), "net"),
    "own-name": lambda model: _parallel(Wrapped(Wrapped(model, "visual_tower"), "encoder")),
    "timm-wrapper": lambda model: Wrapped(model, "timm_model"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(tmp_path: Path, wrapper: str) -> None:
    model = make()
    state = WRAPPERS[wrapper](copy.deepcopy(model)).state_dict()
    assert set(state) != set(model.state_dict())
    for content in (state, {"state_dict": state, "epoch": 3}, {"model": state, "args": argparse.Namespace(lr=1)}):
        assert same(load(saved(tmp_path / "w.ckpt", content)), model)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    assert same(load(tmp_path / "w.safetensors"), model)


def test_blocks_that_are_wrapped_one_by_one(tmp_path: Path) -> None:
    """FSDP, activation checkpointing and torch.compile per block insert names in the middle."""
    model = make()
    state = {}
    for name, tensor in model.state_dict().items():
        inside = name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
        inside = inside.replace("blocks.1.", "blocks.1._orig_mod.").replace("proj.", "_fsdp_wrapped_module.proj.")
        state["_fsdp_wrapped_module." + inside] = tensor
    assert same(load(saved(tmp_path / "fsdp.pth", {"model": state})), model)


def prefixed(model: nn.Module, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def test_student_and_teacher(tmp_path: Path) -> None:
    """DINO and iBOT: the teacher is the student's average; heads are used in training only."""
    student, teacher = make(0, num_classes=0), make(1, num_classes=0)
    head = {"head.mlp.0.weight": torch.ones(4, 16), "head.last_layer.weight_g": torch.ones(4, 1)}
    path = saved(
        tmp_path / "checkpoint.pth",
        {
            "student": {**prefixed(student, "module.backbone."), **{f"module.{k}": v for k, v in head.items()}},
            "teacher": {**prefixed(teacher, "backbone."), **head},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 99,
            "args": argparse.Namespace(arch="vit_tiny"),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
    )
    loaded = load(path)
    assert same(loaded, teacher)
    assert loaded.description.num_classes == 0
    assert any("left out head.mlp.0.weight" in note for note in loaded.notes)
    assert same(load(path, use_ema=False), student)


def test_a_larger_teacher_is_not_taken(tmp_path: Path) -> None:
    """Distillation: `teacher` is another network, recognised by the model's width."""
    student, teacher = make(0), make(1, embed_dim=32)
    path = saved(
        tmp_path / "d.ckpt", {"state_dict": {**prefixed(student, "student."), **prefixed(teacher, "teacher.")}}
    )
    assert same(load(path), student)


def test_moco_v3(tmp_path: Path) -> None:
    """Its authors evaluate the base encoder rather than the momentum encoder, without the projection head."""
    base, momentum = make(0, num_classes=0), make(1, num_classes=0)
    heads = {f"module.{which}_encoder.head.0.weight": torch.ones(4, 16) for which in ("base", "momentum")}
    state = {**prefixed(momentum, "module.momentum_encoder."), **prefixed(base, "module.base_encoder."), **heads}
    path = saved(tmp_path / "vit-s-300ep.pth.tar", {"arch": "vit_small", "state_dict": state})
    assert same(load(path), base)
    assert same(load(path, use_ema=True), momentum)


def test_masked_autoencoder(tmp_path: Path) -> None:
    model = make(num_classes=0)
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 16)}
    decoder["decoder_blocks.0.norm1.weight"] = torch.ones(8)
    loaded = load(
        saved(tmp_path / "mae.pth", {"model": {**model.state_dict(), **decoder}, "args": argparse.Namespace()})
    )
    assert same(loaded, model)
    assert any("left out mask_token and 2 more" in note for note in loaded.notes)
    averaging = make(global_pool="avg")  # its fine-tuned models pool by average
    path = saved(tmp_path / "finetuned.pth", {"model": averaging.state_dict()})
    with pytest.raises(WeightsError, match=r"finetuned\.pth .*model argument `global_pool=avg`"):
        load(path)
    assert same(load(path, args={"global_pool": "avg"}), averaging)


def test_i_jepa_takes_the_target_encoder(tmp_path: Path) -> None:
    encoder, target = make(0, num_classes=0), make(1, num_classes=0)
    content = {"encoder": prefixed(encoder, "module."), "target_encoder": prefixed(target, "module.")}
    assert same(load(saved(tmp_path / "jepa.pth.tar", content)), target)


def test_lightnings_weight_averaging(tmp_path: Path, trained: tuple[nn.Module, nn.Module]) -> None:
    """Its callback stores the average in the usual place, with the current weights beside it."""
    model, average = trained
    content = {"state_dict": prefixed(average, "model."), "current_model_state": prefixed(model, "model.")}
    path = saved(tmp_path / "last.ckpt", {**content, "pytorch-lightning_version": "2.5.5"})
    assert same(load(path), average)
    assert same(load(path, use_ema=False), model)


def test_chunks_of_blocks(tmp_path: Path) -> None:
    """DINOv2's training code groups blocks in chunks: blocks.CHUNK.BLOCK, with consecutive block numbers."""
    model = make(num_classes=0, init_values=1e-5)
    state = {
        "backbone." + name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): tensor
        for name, tensor in model.state_dict().items()
    }
    state |= {"backbone.mask_token": torch.ones(1, 16), "dino_head.mlp.0.weight": torch.ones(4, 16)}
    loaded = load(saved(tmp_path / "teacher_checkpoint.pth", {"teacher": state}), args={"init_values": 1e-5})
    assert same(loaded, model)


def test_registers_as_dinov2_keeps_them(tmp_path: Path) -> None:
    """Its class token has a position, which timm's filter adds to the token; nothing is resampled."""
    name = "vit_small_patch14_reg4_dinov2"
    model = make(name=name, num_classes=0, img_size=28)
    state = dict(model.state_dict())
    position = torch.full((1, 1, 16), 0.5)
    state |= {"register_tokens": state.pop("reg_token"), "mask_token": torch.ones(1, 16)}
    state |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], 1)}
    loaded = load(saved(tmp_path / "dinov2.pth", state), name, {"img_size": 28})
    for key, tensor in model.state_dict().items():
        assert torch.allclose(loaded.vit.state_dict()[key], tensor, atol=1e-6)
    assert not any("resampled" in note for note in loaded.notes)


def test_open_clip(tmp_path: Path) -> None:
    """timm's tower below visual.trunk and the projection beside it, combined by timm's filter."""
    projection = torch.randn(512, 16)
    name = "vit_base_patch16_clip_224"
    tower = make(name=name, num_classes=0)
    state = {**prefixed(tower, "visual.trunk."), "visual.head.proj.weight": projection, "logit_scale": torch.ones(())}
    state["text.token_embedding.weight"] = torch.ones(5, 16)
    for content in (state, {"state_dict": {"module." + key: tensor for key, tensor in state.items()}}):
        loaded = load(saved(tmp_path / "open_clip.pt", content), name)
        assert loaded.description.num_classes == 512
        assert torch.equal(loaded.vit.head.weight, projection)  # type: ignore[union-attr]
        assert torch.equal(loaded.vit.pos_embed, tower.pos_embed)


def test_two_models_that_nothing_tells_apart(tmp_path: Path) -> None:
    first, second = make(0), make(1)
    state = {**prefixed(first, "left."), **prefixed(second, "right.")}
    with pytest.raises(WeightsError, match=r"several models of this width: 'left\.' and 'right\.'; expected one"):
        load(saved(tmp_path / "pair.pth", state))
    twice = {**prefixed(first, "left."), **prefixed(first, "right.")}  # registered under two names
    assert same(load(saved(tmp_path / "twice.pth", twice)), first)


def test_lora_adapters_say_what_they_are(tmp_path: Path) -> None:
    state = prefixed(make(), "base_model.model.")
    state["base_model.model.blocks.0.attn.qkv.lora_A.default.weight"] = torch.ones(2, 16)
    with pytest.raises(WeightsError, match="LoRA adapters: merge them"):
        load(saved(tmp_path / "adapter.bin", state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make()
    half = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load(saved(tmp_path / "half.pth", {"state_dict": half})).vit.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in half.items())


class Foreign:
    """A class of a training framework."""


@pytest.mark.parametrize("legacy", [False, True])
def test_any_other_class_is_refused_by_name(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    content = {"model": make().state_dict(), "args": argparse.Namespace(), "meta": Foreign()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"could run code; .*it names [\w.]*test_state_dicts\.Foreign\)") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_namespace_is_allowed_for_us_only(tmp_path: Path) -> None:
    load(saved(tmp_path / "w.pth", {"model": make().state_dict(), "args": argparse.Namespace()}))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_num_classes_0_drops_the_head(tmp_path: Path) -> None:
    model = make()
    loaded = load(saved(tmp_path / "w.pth", model.state_dict()), num_classes=0)
    assert loaded.description.num_classes == 0
    assert any("the head of 5 classes is left out" in note for note in loaded.notes)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        assert torch.equal(loaded.vit(images), expected)


def test_num_classes_0_drops_both_heads_of_a_distilled_model(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    path = saved(tmp_path / "deit.pth", {"model": make(name=name).state_dict()})
    assert load(path, name, num_classes=0).description.num_classes == 0
    with pytest.raises(WeightsError, match=r"deit\.pth is of a distilled model.*deit_\*_distilled"):
        load(path)


def test_classes_of_the_file_are_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", make(num_classes=7).state_dict())
    loaded = load(path)
    assert loaded.description.num_classes == 7
    assert any(f"w.pth has 7 classes, where {NAME} has 1000: taken from the file" in note for note in loaded.notes)
    with pytest.raises(WeightsError, match=r"head\.\w+ in w\.pth .*`num_classes`"):
        load(path, num_classes=5)
    headless = saved(tmp_path / "h.pth", make(num_classes=0).state_dict())
    assert any("no classes (features come out)" in note for note in load(headless).notes)


def by_timm(state: State, name: str, **args: Any) -> State:
    """timm's own conversion of a pretrained state dict."""
    overlay = {"state_dict": dict(state), "num_classes": 5, "custom_load": False}
    torch.manual_seed(3)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**ARGS, "num_classes": 5, **args}
    )
    found: State = model.state_dict()
    return found


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        (NAME, {"img_size": 64}, {"img_size": 32}),
        (NAME, {"img_size": 32}, {"img_size": 96}),
        (NAME, {"img_size": 32}, {"img_size": (64, 32)}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, {"img_size": 32}),
        ("deit3_small_patch16_224", {"img_size": 64}, {"img_size": 32}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, {"img_size": 28}),
        ("flexivit_small", {"img_size": 64}, {"img_size": 32}),
        ("eva02_tiny_patch14_224", {"img_size": 56, "use_rot_pos_emb": False}, {"img_size": 28}),
        (NAME, {"patch_size": 8}, {"patch_size": 16}),
    ],
)
def test_other_sizes_are_resampled_as_timm_does(
    tmp_path: Path, name: str, was: dict[str, Any], now: dict[str, Any]
) -> None:
    state = make(name=name, **was).state_dict()
    now = {**was, **now}
    loaded = load(saved(tmp_path / "w.pth", state), name, now)
    expected = by_timm(state, name, **now)
    ours = loaded.vit.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert any("resampled from" in note for note in loaded.notes)


def test_the_resampling_says_how_to_keep_the_positions(tmp_path: Path) -> None:
    path = saved(tmp_path / "big.pth", make(img_size=64).state_dict())
    note = next(note for note in load(path).notes if "resampled" in note)
    assert note == (
        "weights: position embeddings of big.pth resampled from 4 x 4 to 2 x 2 patches, as timm does; `img_size=64` "
        "keeps them"
    )
    kept = load_model(
        ModelRequest(NAME, {k: v for k, v in ARGS.items() if k != "img_size"}, weights=path, img_size=(64, 64))
    )
    assert not any("resampled" in note for note in kept.notes)
    assert kept.description.image_size == (64, 64)
    assert kept.description.grid == (4, 4)


def test_positions_of_no_grid(tmp_path: Path) -> None:
    state = make().state_dict()
    state["pos_embed"] = torch.zeros(1, 8, 16)  # 7 patches
    with pytest.raises(WeightsError, match=r"w\.pth has positions of 7 patches, .*`img_size`"):
        load(saved(tmp_path / "w.pth", state))


def test_torchvision(tmp_path: Path) -> None:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    theirs = vision.VisionTransformer(32, 16, 2, 2, 16, 64, num_classes=5).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    loaded = load(saved(tmp_path / "tv.pth", theirs.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(loaded.vit(images), theirs(images), atol=1e-5)
    assert any("the names of torchvision" in note for note in loaded.notes)


# timm's name -> the name in transformers, for one block; query, key and value are separate.
TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def as_transformers(state: State, prefix: str) -> State:
    """A state dict as saved by transformers' ViTForImageClassification."""
    out = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            out["classifier." + name.split(".")[1]] = tensor
        elif name.startswith("norm."):
            out[prefix + "layernorm." + name.split(".")[1]] = tensor
        elif name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            where, kind = f"{prefix}encoder.layer.{block}.", rest.rsplit(".", 1)[1]
            if rest.startswith("attn.qkv"):
                for word, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    out[f"{where}attention.attention.{word}.{kind}"] = part.clone()
            else:
                out[f"{where}{TRANSFORMERS[rest.rsplit('.', 1)[0]]}.{kind}"] = tensor
        elif name in TRANSFORMERS:
            out[prefix + TRANSFORMERS[name]] = tensor
        else:
            stem, kind = name.rsplit(".", 1)
            out[f"{prefix}{TRANSFORMERS[stem]}.{kind}"] = tensor
    return out


@pytest.mark.parametrize("prefix", ["vit.", "model.vit.", "module.deit."])
def test_transformers(tmp_path: Path, prefix: str) -> None:
    model = make()
    state = as_transformers(model.state_dict(), prefix)
    parent = "".join(part + "." for part in prefix.split(".")[:-2])
    state = {parent + name if name.startswith("classifier") else name: tensor for name, tensor in state.items()}
    loaded = load(saved(tmp_path / "pytorch_model.bin", state))
    assert same(loaded, model)
    assert any("the names of transformers" in note for note in loaded.notes)


def test_transformers_dinov2_gives_features(tmp_path: Path) -> None:
    """Its classifier takes the class token and the mean of the patches, which no timm model does."""
    model = make(num_classes=0, init_values=1e-5)
    apart = (".mlp.", ".norm", ".ls")
    common = {name: t for name, t in model.state_dict().items() if not any(part in name for part in apart)}
    state = as_transformers(common, "dinov2.")
    for name, tensor in model.state_dict().items():
        if ".mlp." in name or ".norm" in name:
            state["dinov2." + name.replace("blocks.", "encoder.layer.")] = tensor
        if ".ls" in name:
            _, block, scale, _ = name.split(".")
            state[f"dinov2.encoder.layer.{block}.layer_scale{scale[-1]}.lambda1"] = tensor
    state |= {"classifier.weight": torch.ones(5, 32), "classifier.bias": torch.ones(5)}
    state["dinov2.embeddings.mask_token"] = torch.ones(1, 16)
    loaded = load(saved(tmp_path / "m.bin", state), args={"init_values": 1e-5})
    assert same(loaded, model)
    with pytest.raises(WeightsError, match=r"m\.bin lacks head\."):
        load(tmp_path / "m.bin", args={"init_values": 1e-5}, num_classes=5)


def test_mmpretrain(tmp_path: Path) -> None:
    model = make()
    rules = (
        ("patch_embed.proj.", "patch_embed.projection."), ("norm1.", "ln1."), ("norm2.", "ln2."),
        ("blocks.", "layers."),        ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."),
    )  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        new = name.replace("head.", "head.layers.head.") if name.startswith("head.") else name
        new = new.replace("norm.", "ln1.") if new.startswith("norm.") else new
        for old, theirs in rules:
            new = new.replace(old, theirs)
        state[new if new.startswith("head.") else "backbone." + new] = tensor
    loaded = load(saved(tmp_path / "epoch_100.pth", {"meta": {"epoch": 100}, "state_dict": state}))
    assert same(loaded, model)
    assert any("the names of mmpretrain" in note for note in loaded.notes)


def test_a_head_of_the_users_own_is_left_out_and_said(tmp_path: Path) -> None:
    backbone = make(num_classes=0)
    state = {
        **prefixed(backbone, "backbone."),
        "classifier.weight": torch.ones(5, 16),
        "classifier.bias": torch.ones(5),
    }
    loaded = load(saved(tmp_path / "own.ckpt", {"state_dict": state}))
    assert same(loaded, backbone)
    assert any("left out classifier.weight of own.ckpt" in note for note in loaded.notes)


@pytest.mark.parametrize("inside", ["model.safetensors", "pytorch_model.bin", None])
def test_a_folder_names_the_file_in_it(tmp_path: Path, inside: str | None) -> None:
    if inside:
        (tmp_path / inside).touch()
    with pytest.raises(WeightsError, match=f"it is a folder; .*{inside}" if inside else "it is a folder"):
        load(tmp_path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    script = torch.jit.script(nn.Linear(2, 2))
    torch.jit.save(script, tmp_path / "script.pt")
    with pytest.raises(WeightsError, match=r"script\.pt is a TorchScript model; expected a state dict"):
        load(tmp_path / "script.pt")
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(9))
    with pytest.raises(WeightsError, match=r"ends in '\.onnx'; .*it is an ONNX model"):
        load(tmp_path / "m.onnx")
    with pytest.raises(WeightsError, match=r"there is no weights file .*download it first"):
        load(Path("https://example.org/w.pth"))


def test_a_checkpoint_without_a_suffix(tmp_path: Path) -> None:
    model = make()
    assert same(load(saved(tmp_path / "blob", model.state_dict())), model)
