"""Invalid inputs: one line says what was found, what was expected and what to do, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.exporter.cli.samples import (
    NAME,
    PATCHES,
    Inputs,
    argv,
    call,
    check_error,
    create,
    export_options,
    flip_bit,
    mask,
    model_args,
    rewrite_manifest,
    snapshot,
)
from vp_exporter.cli import export, inspect, validate


class Work:
    """Folder of one test: an intact bundle `old.vpe`, and whatever a case creates."""

    def __init__(self, root: Path, inputs: Inputs, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.inputs, self.bundle, self.monkeypatch = root, inputs, bundle, monkeypatch
        self.out = root / "new.vpe"

    def mask(self, change: Callable[[np.ndarray], Any]) -> Path:
        """A mask file; `change` modifies the valid mask in place or returns another."""
        rows = mask()
        changed = change(rows)
        np.save(self.root / "bad.npy", rows if changed is None else changed)
        return self.root / "bad.npy"

    def plan(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        """A plan file; `change` modifies the valid plan in place."""
        plan = json.loads(self.inputs.plan.read_text())
        change(plan)
        return self.file("bad.json", json.dumps(plan))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        """A weights file; `change` modifies the valid weights in place."""
        state = load_file(self.inputs.weights)
        change(state)
        save_file(state, self.root / "bad.safetensors")
        return self.root / "bad.safetensors"

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def folder(self, *files: str) -> Path:
        """A folder with these files, none of which is an image."""
        top = self.root / "folder"
        top.mkdir()
        for name in files:
            (top / name).parent.mkdir(exist_ok=True)
            (top / name).write_bytes(b"this is no image")
        return top

    def without(self, *modules: str) -> bool:
        """Pretend that these packages are not installed."""
        for module in modules:
            self.monkeypatch.setitem(sys.modules, module, None)
        return False  # omits the option

    def without_gpu(self) -> str:
        """Pretend that there is no GPU; returns the device to request."""
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return "cuda"

    def images(self, *classes: str) -> Path:
        """A folder of valid images, one per class folder."""
        top = self.root / "pictures"
        for name in classes:
            (top / name).mkdir(parents=True)
            Image.new("RGB", (70, 70)).save(top / name / "0.png")
        return top


class Case(NamedTuple):
    """Options that differ from a valid export; functions are called with the Work to get the value."""

    id: str
    options: dict[str, Any]
    code: int
    message: str


class Ran:
    """Writes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def set_entry(rows: np.ndarray, value: float) -> None:
    rows[0, 5] = value


def code_checkpoint(work: Work) -> Path:
    torch.save({"state_dict": Ran(work.root / "code-ran")}, work.root / "code.pth")
    return work.root / "code.pth"


def unreadable(work: Work) -> Path:
    """A folder that cannot be listed; the error is injected, since root could list it."""
    top, real = work.images("a", "b", "c"), os.scandir

    def scandir(path: Any) -> Any:
        if os.fspath(path) == os.fspath(top / "b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    work.monkeypatch.setattr(os, "scandir", scandir)
    return top


EXPORT = [
    # masks and plans
    Case("mask-of-wrong-shape", {"masks": lambda w: w.mask(lambda m: np.ones((3, PATCHES)))}, 2,
         r"mask has shape \[3, 16\]; expected \[2, 16\]: 2 blocks by 16 patches of vit_tiny.*; search the mask on"),
    Case("mask-with-prefix", {"masks": lambda w: w.mask(lambda m: np.ones((2, PATCHES + 1)))}, 2,
         r"shape \[2, 17\]; expected \[2, 16\].*; leave out the first 1 column"),
    Case("mask-transposed", {"masks": lambda w: w.mask(lambda m: m.T)}, 2, r"shape \[16, 2\]; expected .*; transpose"),
    Case("mask-that-revives", {"masks": lambda w: w.mask(lambda m: m[1].fill(1))}, 2,
         r"patch 0 comes back at block 1 .*\(and 3 more\); expected a patch that has left to stay away.*; keep it in"),
    Case("mask-with-nan", {"masks": lambda w: w.mask(lambda m: set_entry(m, np.nan))}, 2,
         r"mask holds nan at block 0, patch 5; expected finite numbers"),
    Case("mask-negative", {"masks": lambda w: w.mask(lambda m: set_entry(m, -1))}, 2,
         r"mask holds -1.0 at block 0, patch 5; expected 0 to drop, 1 to keep"),
    Case("mask-empty", {"masks": lambda w: w.mask(lambda m: m[1].fill(0))}, 2,
         r"row 1 of the mask drops every patch; expected at least one patch kept"),
    Case("mask-missing", {"masks": lambda w: w.root / "no.npy"}, 2, r"there is no mask file .*no.npy; .*check --masks"),
    Case("mask-pickled", {"masks": lambda w: w.file("p.npy", pickle.dumps([1]))}, 2,
         r"cannot read the mask .*p.npy: .*; expected a .npy array of numbers without pickles"),
    Case("mask-suffix", {"masks": lambda w: w.file("m.txt", "1")}, 2,
         r"m.txt ends in '.txt'; expected .npy or .npz or .safetensors"),
    Case("plan-for-another-model",
         {"masks": None, "plan": lambda w: w.plan(lambda p: p["model"].update(name="deit_small_patch16_224"))}, 2,
         r"the plan is for deit_small_patch16_224; expected a plan for vit_tiny_patch16_224; search a plan on this"),
    Case("plan-for-other-weights",
         {"masks": None, "plan": lambda w: w.plan(lambda p: p["model"].update(weights_sha256="ab" * 32))}, 2,
         r"searched on weights abababababab; expected the weights at hand, [0-9a-f]{12}; search again"),
    Case("plan-for-another-size", {"masks": None, "plan": lambda w: w.inputs.plan,
                                   "weights": None, "random_init": True, "model_arg": model_args(img_size=96)}, 2,
         r"the plan has image_size \[64, 64\]; expected \[96, 96\], as vit_tiny.* has; positions do not carry over"),
    Case("plan-is-a-mask", {"masks": None, "plan": lambda w: w.inputs.mask}, 2,
         r"--plan .*mask.npy ends in '.npy'; expected a plan \(.json\); give masks to --masks"),
    Case("plan-is-a-bundle", {"masks": None, "plan": lambda w: w.bundle}, 2,
         r"--plan .*vpe is a bundle; expected a plan; its plan is .*plan.json"),
    Case("plan-is-a-checkpoint", {"masks": None, "plan": code_checkpoint}, 2,
         r"--plan .*code.pth is a PyTorch checkpoint; expected a plan"),
    Case("plan-not-json", {"masks": None, "plan": lambda w: w.file("p.json", "{")}, 2,
         r"the plan is not JSON: .*; expected the JSON of a vp-plan"),
    Case("no-plan", {"masks": None}, 2, r"no plan is named; expected one of --plan FILE.json, --masks FILE.npy or --m"),
    Case("plan-and-mask", {"plan": lambda w: w.inputs.plan}, 2, r"--plan and --masks are given together; expected one"),
    # models and weights
    Case("unknown-model", {"model": "vit_tinny_patch16_224"}, 2,
         r"no model 'vit_tinny_patch16_224'; expected a timm model name; did you mean vit_tiny_patch16_224"),
    Case("unsupported-vit", {"model": "vit_base_patch16_rpn_224", "weights": None, "random_init": True}, 2,
         r"vit_base_patch16_rpn_224 cannot be reduced: its .* is not .*; expected a plain ViT; docs/models.md"),
    Case("unsupported-resnet", {"model": "resnet18", "model_arg": None, "weights": None, "random_init": True}, 2,
         r"resnet18 cannot be reduced: its class ResNet is not a plain ViT; expected a plain ViT"),
    Case("no-weights", {"weights": None}, 2,
         r"no source of weights is named; expected one of --weights FILE, --pretrained .* or --random-init"),
    Case("two-sources", {"random_init": True}, 2, r"more than one source of weights is named; expected one of"),
    Case("weights-missing", {"weights": lambda w: w.root / "no.safetensors"}, 2,
         r"there is no weights file .*no.safetensors; expected a .safetensors or .pth file"),
    Case("weights-without-a-key", {"weights": lambda w: w.weights(lambda s: s.pop("blocks.1.norm1.bias"))}, 2,
         r"bad.safetensors lacks blocks.1.norm1.bias; expected the \d+ parameters of the model; name the model"),
    Case("weights-of-another-width", {"model_arg": model_args(embed_dim=32)}, 2,
         r"cls_token in weights.safetensors has shape \[1, 1, 64\]; expected \[1, 1, 32\], as the model has; name the"),
    Case("weights-with-nan", {"weights": lambda w: w.weights(lambda s: s["norm.bias"].fill_(torch.nan))}, 2,
         r"norm.bias in bad.safetensors holds NaN or infinity; expected finite weights"),
    Case("wrong-num-classes", {"num_classes": 5}, 2,
         r"head.weight in .* has shape \[3, 64\]; expected \[5, 64\].* or its classes with --num-classes"),
    Case("pickle-named-safetensors", {"weights": lambda w: w.file("p.safetensors", pickle.dumps({"a": 1}))}, 2,
         r"p.safetensors is not safetensors: it looks like a pickle or zip checkpoint; .*; convert it with"),
    Case("truncated-safetensors",
         {"weights": lambda w: w.file("t.safetensors", w.inputs.weights.read_bytes()[:5000])}, 2,
         r"t.safetensors is damaged: .*; expected a safetensors file"),
    Case("checkpoint-with-code", {"weights": code_checkpoint}, 2,
         r"code.pth holds pickled objects that could run code; expected tensors only; save the state dict alone"),
    Case("checkpoint-of-a-model", {"weights": lambda w: (torch.save(create(), w.root / "whole.pth"),
                                                         w.root / "whole.pth")[1]}, 2,
         r"whole.pth holds pickled objects that could run code; expected tensors only"),
    Case("weights-suffix", {"weights": lambda w: w.file("w.onnx", "x")}, 2,
         r"w.onnx ends in '.onnx'; expected .safetensors or .pth"),
    Case("model-arg-without-value", {"model_arg": ["img_size"]}, 2,
         r"--model-arg is 'img_size'; expected KEY=VALUE, such as img_size=384"),
    Case("model-arg-twice", {"model_arg": ["depth=2", "depth=3"]}, 2, r"--model-arg gives depth twice; expected one"),
    Case("model-arg-unknown", {"model_arg": model_args(dept=2)}, 2,
         r"timm cannot create vit_tiny.* with .*'dept'.*; check --model-arg"),
    # engine and preprocessing
    Case("bad-precision", {"precision": "int8"}, 2, r"--precision is 'int8'; expected fp32, fp16 or bf16"),
    Case("bad-kernels", {"kernels": "fast"}, 2, r"--kernels is 'fast'; expected portable, vp or auto"),
    Case("heads-that-kernels-do-not-take",
         {"kernels": "vp", "weights": None, "random_init": True, "model_arg": model_args(num_heads=4)}, 2,
         r"has heads of 16 channels; expected 32, 64, 80, 96, 128 for the vp kernels; use --kernels portable"),
    Case("bf16-on-ort", {"precision": "bf16"}, 2, r"'ort' has no bf16; expected one of fp32, fp16; choose another"),
    Case("bad-device", {"device": "tpu"}, 2, r"--device is 'tpu'; expected cpu or cuda"),
    Case("no-gpu", {"engine": "aoti", "device": lambda w: w.without_gpu()}, 3,
         r"no CUDA device that torch can use; build on the GPU, or --device cpu"),
    Case("bad-batches", {"min_batch": 9}, 2, r"--min-batch 9, --opt-batch 8, --max-batch 64; expected ascending"),
    Case("unknown-engine", {"engine": "tflite"}, 2, r"unknown engine 'tflite'; expected one of ort, openvino"),
    Case("no-tensorrt", {"engine": "trt", "device": lambda w: w.without("tensorrt")}, 3,
         r"engine 'trt' cannot build here: tensorrt is not installed: pip install 'vp-export\[trt\]'"),
    Case("no-onnxruntime", {"device": lambda w: w.without("onnxruntime")}, 3,
         r"engine 'ort' cannot build here: onnxruntime is not installed: pip install 'vp-export\[cpu\]'"),
    Case("no-openvino", {"engine": "openvino", "device": lambda w: w.without("openvino")}, 3,
         r"engine 'openvino' cannot build here: openvino is not installed: pip install 'vp-export\[openvino\]'"),
    Case("bad-mean", {"mean": "0.5,0.5"}, 2, r"--mean is '0.5,0.5'; expected three numbers, such as 0.485,0.456,0.406"),
    Case("bad-std", {"std": "0.5,0,0.5"}, 2, r"--std is \[0.5, 0.0, 0.5\]; expected finite numbers, above 0"),
    Case("crop-pct-0", {"crop_pct": 0}, 2, r"--crop-pct is 0.0; expected above 0 and at most 1"),
    Case("bad-interpolation", {"interpolation": "cubic"}, 2, r"--interpolation is 'cubic'; expected one of bicubic,"),
    Case("classes-missing", {"classes": lambda w: w.root / "no.txt"}, 2,
         r"cannot read .*no.txt: No such file.*; expected a class name a line; check --classes"),
    Case("classes-binary", {"classes": lambda w: w.file("c.txt", b"\xff\xfe")}, 2,
         r"cannot read .*c.txt: it is not UTF-8 text; expected a class name a line"),
    Case("classes-too-few", {"classes": lambda w: w.file("c.txt", "cat\ndog\n")}, 2,
         r"2 class names are given; expected 3, one per class"),
    # images and budgets
    Case("data-empty", {"data": lambda w: w.folder()}, 2, r"no image in .*folder or its folders; expected files"),
    Case("data-missing", {"data": lambda w: w.root / "nowhere"}, 2, r"no folder .*nowhere; check the path"),
    Case("data-a-file", {"data": lambda w: w.inputs.mask}, 2, r"mask.npy is a file; expected a folder of images"),
    Case("data-unreadable", {"data": unreadable}, 2, r"cannot read folder .*b: Permission denied; check its"),
    Case("data-of-four-classes", {"data": lambda w: w.images("a", "b", "c", "d")}, 2,
         r"4 class folders in .* \('a', 'b', 'c', ...\); expected exactly 3 folders, one per class; point to a folder"),
    Case("data-limit-0", {"data": lambda w: w.inputs.data, "limit": 0}, 2,
         r"an image limit of 0; expected 1 or more; leave it out"),
    Case("data-without-classes", {"data": lambda w: w.inputs.data, "weights": None, "random_init": True,
                                  "num_classes": 0}, 2,
         r"--data needs a classifier, and this model has no classes; .*; leave out --data"),
    Case("max-drop-without-data", {"max_drop": 1}, 2, r"--max-drop and --min-agreement need images; expected --data"),
    Case("no-validate-with-budget", {"no_validate": True, "min_speedup": 1.1}, 2,
         r"--no-validate is given with --data or a budget; expected one or the other"),
    Case("no-dense-with-budget", {"no_dense": True, "min_speedup": 1.1}, 2,
         r"--no-dense leaves nothing to compare with .*; expected one or the other"),
    Case("no-dense-with-data", {"no_dense": True, "data": lambda w: w.inputs.data}, 2, r"--no-dense leaves nothing"),
    Case("negative-budget", {"max_drop": -1, "data": lambda w: w.inputs.data}, 2,
         r"--max-drop is -1.0; expected percentage points from 0 to 100"),
    Case("nan-budget", {"min_speedup": "nan"}, 2, r"--min-speedup is nan; expected a ratio above 0"),
    # the target
    Case("out-exists", {"out": lambda w: w.bundle}, 2,
         r"old.vpe is already there; choose another name, or pass --force to replace it"),
    Case("out-under-a-file", {"out": lambda w: w.inputs.weights / "no" / "new.vpe"}, 2,
         r"weights.safetensors is not a folder; expected a folder for new.vpe"),
    Case("force-on-a-folder", {"out": lambda w: w.folder("precious.txt"), "force": True}, 2,
         r"folder is not a bundle; remove it yourself or choose another name"),
    Case("force-with-bad-mask", {"out": lambda w: w.bundle, "force": True,
                                 "masks": lambda w: w.mask(lambda m: set_entry(m, np.nan))}, 2, r"mask holds nan"),
    # found only when the images are read, after both engines are built
    Case("data-all-corrupt", {"data": lambda w: w.folder("a/0.png", "b/0.png", "c/0.png")}, 2,
         r"none of the 3 images in .*folder can be decoded, the first \(a/0.png\) because: .*; point to a folder"),
    Case("one-corrupt-strict", {"data": lambda w: (w.images("a", "b", "c"), w.file("pictures/a/bad.jpg", "x"))[0],
                                "strict": True}, 2,
         r"a/bad.jpg in .*pictures cannot be decoded: .*; repair or remove it, or leave out --strict"),
]  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, inputs: Inputs, exported: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))  # files left in /tmp count as left behind
    return Work(tmp_path, inputs, Path(shutil.copytree(exported, tmp_path / "old.vpe")), monkeypatch)


def resolve(work: Work, options: dict[str, Any]) -> dict[str, Any]:
    return {key: value(work) if callable(value) else value for key, value in options.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in EXPORT])
@pytest.mark.usefixtures("ready_engines")
def test_export_refuses(case: Case, work: Work) -> None:
    words = argv(export_options(work.inputs, **{"out": work.out, "quiet": True, **resolve(work, case.options)}))
    before = snapshot(work.root)
    result = call(export.app, *words)
    check_error(result, case.code, case.message)
    assert snapshot(work.root) == before


def damage(change: Callable[[Path], Any]) -> Callable[[Work], list[Path]]:
    """The modified bundle as the only argument."""

    def prepare(work: Work) -> list[Path]:
        change(work.bundle)
        return [work.bundle]

    return prepare


def point_outside(document: dict[str, Any]) -> None:
    entry = next(entry for entry in document["files"] if entry["path"] == "plan.json")
    entry["path"] = document["plan"]["path"] = "../plan.json"


class BadBundle(NamedTuple):
    """A modification of a bundle, for both commands that read one."""

    id: str
    arguments: Callable[[Work], list[Any]]
    message: str


AGAIN = r"; copy or export the bundle again"
BUNDLES = [
    BadBundle("bit-flipped", damage(lambda b: flip_bit(b / "engine/model.onnx")),
              r"'engine/model.onnx' has sha256 \w+...; expected \w+..." + AGAIN),
    BadBundle("truncated", damage(lambda b: os.truncate(b / "dense/model.onnx", 1000)),
              r"'dense/model.onnx' has 1000 bytes; expected \d+" + AGAIN),
    BadBundle("extra-file", damage(lambda b: (b / "engine/extra.bin").touch()),
              r"'engine/extra.bin' is not in the manifest; expected exactly the files that the manifest lists" + AGAIN),
    BadBundle("file-missing", damage(lambda b: (b / "plan.json").unlink()), r"'plan.json' is missing; .*" + AGAIN),
    BadBundle("manifest-points-outside", damage(lambda b: rewrite_manifest(b, point_outside)),
              r"manifest.json: .*\.\./plan.json.*" + AGAIN),
    BadBundle("manifest-edited", damage(lambda b: flip_bit(b / "manifest.json")), r"manifest.json: .*" + AGAIN),
    BadBundle("future-version", damage(lambda b: rewrite_manifest(b, lambda m: m.update(format_version="2.0"))),
              r"format.* 2.0.*; expected 1.*; upgrade"),
    BadBundle("plan-corrupted", damage(lambda b: flip_bit(b / "plan.json")), r"'plan.json' has sha256 .*" + AGAIN),
    BadBundle("unknown-engine", damage(lambda b: rewrite_manifest(b, lambda m: m["engine"].update(name="tflite"))),
              r"tflite.*; expected one of .*"),
    BadBundle("not-a-bundle", lambda w: [w.folder("notes.txt")], r"manifest.json.*|not a bundle"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in BUNDLES])
@pytest.mark.parametrize("command", [inspect, validate], ids=["inspect", "validate"])
def test_bundle_is_refused(case: BadBundle, command: Any, work: Work) -> None:
    if case.id == "unknown-engine" and command is inspect:
        pytest.skip("a bundle for an engine of the future can be looked at")
    words = case.arguments(work)
    before = snapshot(work.root)
    result = call(command.app, *words)
    check_error(result, 2, case.message)
    assert snapshot(work.root) == before


class Words(NamedTuple):
    """Arguments of a command, and its error."""

    id: str
    arguments: Callable[[Work], list[Any]]
    code: int
    message: str


INSPECT = [
    Words("missing", lambda w: [w.root / "no.vpe"], 2, r"there is no .*no.vpe; expected a bundle folder, a plan or"),
    Words("mask-without-model", lambda w: [w.inputs.mask], 2,
          r"mask.npy is a bare mask; expected --model NAME; a mask does not say"),
    Words("mask-of-another-model", lambda w: [w.inputs.mask, "-m", NAME], 2, r"shape \[2, 16\]; expected \[12, 196\]"),
    Words("plan-of-another-model", lambda w: [w.inputs.plan, "-m", "deit_small_patch16_224"], 2,
          r"the plan is for vit_tiny_patch16_224; expected a plan for deit_small_patch16_224"),
    Words("plan-corrupted", lambda w: [w.plan(lambda p: p.update(steps=5))], 2, r"the plan is 5; expected a list"),
    Words("plan-of-the-future", lambda w: [w.plan(lambda p: p.update(version=9))], 2,
          r"the plan has version 9; expected 1; upgrade vp-export"),
    Words("no-plan-at-all", lambda w: [w.file("x.json", "[]")], 2, r"its format is 'list'; expected 'vp-plan'"),
    Words("unknown-model", lambda w: [w.inputs.plan, "-m", "nonsense"], 2, r"no model 'nonsense'; expected a timm"),
    Words("bad-model-arg", lambda w: [w.inputs.plan, "-m", NAME, "--model-arg", "x"], 2, r"--model-arg is 'x'; exp"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in INSPECT])
def test_inspect_refuses(case: Words, work: Work) -> None:
    words = case.arguments(work)
    check_error(call(inspect.app, *words), case.code, case.message)


VALIDATE = [
    Words("missing", lambda w: [w.root / "no.vpe"], 2, r"no.vpe' is not there; expected the folder of a bundle"),
    Words("a-file", lambda w: [w.inputs.plan], 2, r"plan.json' is not a folder; expected the folder of a bundle"),
    Words("against-missing", lambda w: [w.bundle, "--against", w.root / "no.vpe"], 2, r"no.vpe' is not there"),
    Words("data-missing", lambda w: [w.bundle, "--data", w.root / "no"], 2, r"no folder .*no; check the path"),
    Words("negative-budget", lambda w: [w.bundle, "--min-speedup", "-2"], 2, r"--min-speedup is -2.0; expected a"),
    Words("max-drop-without-data", lambda w: [w.bundle, "--max-drop", "1"], 2, r"need images; expected --data DIR"),
    Words("bad-device", lambda w: [w.bundle, "--device", "tpu"], 2, r"device.* 'tpu'; expected .*cpu.*cuda"),
    Words("report-on-a-file", lambda w: [w.bundle, "--report", w.inputs.plan], 2,
          r"--report .*plan.json is a file; expected a folder"),
    Words("no-onnxruntime", lambda w: [w.bundle, *argv({"": w.without("onnxruntime")})], 3,
          r"engine 'ort' cannot run here: onnxruntime is not installed: pip install 'vp-export\[cpu\]'"),
]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in VALIDATE])
def test_validate_refuses(case: Words, work: Work) -> None:
    words = case.arguments(work)
    before = snapshot(work.root)
    check_error(call(validate.app, "--quiet", *words), case.code, case.message)
    assert snapshot(work.root) == before


@pytest.mark.parametrize("extra", [["--min-speedup", "1.1"], ["--data"]], ids=["budget", "data"])
def test_validate_without_baseline(extra: list[str], without_dense: Path, inputs: Inputs) -> None:
    words = [*extra, str(inputs.data)] if extra == ["--data"] else extra
    check_error(
        call(validate.app, "--quiet", without_dense, *words), 2,
        r"holds no dense baseline to compare with; expected a baseline; export again without --no-dense, or name",
    )  # fmt: skip


def test_code_in_a_checkpoint_does_not_run(work: Work) -> None:
    words = argv(export_options(work.inputs, work.out, weights=code_checkpoint(work), quiet=True))
    assert call(export.app, *words).exit_code == 2
    assert not (work.root / "code-ran").exists()


def test_the_code_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Ran(tmp_path / "code-ran")))
    assert (tmp_path / "code-ran").exists()
