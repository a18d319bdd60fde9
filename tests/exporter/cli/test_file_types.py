"""vp-inspect on other file types: real files of each, recognised by content."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from tests.exporter.cli.samples import Inputs, call, check_error
from vp_exporter.cli.inspect import app
from vp_exporter.plan.plan import FORMAT
from vp_exporter.utils import file_types


def _torch(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def _exported() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), buffer)
    return buffer.getvalue()


def _onnx() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    model = helper.make_model(graph, producer_name="somebody")
    assert isinstance(model, onnx.ModelProto)
    return bytes(model.SerializeToString())


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return buffer.getvalue()


def _npz(*names: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.zeros(2) for name in names})
    return buffer.getvalue()


STATE = {"blocks.0.norm1.weight": torch.ones(2), "head.weight": torch.ones(3, 2)}
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "w.pth": (lambda: _torch({"model": STATE, "args": argparse.Namespace(a=1)}), r"a PyTorch checkpoint; .*--weights"),
    "plan.json": (lambda: _torch(STATE), "a PyTorch checkpoint"),  # whatever its name
    "old.pt": (lambda: _torch(STATE, _use_new_zipfile_serialization=False), r"a pickle, .*--weights"),
    "p.pkl": (lambda: pickle.dumps({"a": 1}), "a pickle"),
    "s.pt": (_script, "a TorchScript model"),
    "e.pt2": (_exported, r"a \.pt2 package"),
    "m.onnx": (_onnx, r"an ONNX model; .*inspected in its bundle"),
    "cat.jpg": (lambda: _picture("JPEG"), r"a JPEG image; .*--data"),
    "cat.png": (lambda: _picture("PNG"), "a PNG image"),
    "cat.npy": (lambda: _picture("WEBP"), "a WebP image"),
    "b.zip": (lambda: _zip("x.vpe/manifest.json", "x.vpe/plan.json"), "a zipped bundle; .*unzip it"),
    "z.zip": (lambda: _zip("a.txt", "b.txt"), "a zip archive of 2 files"),
    "cut.zip": (lambda: _zip("a.txt")[:20], "a zip archive that is cut short"),
    "jax.npz": (lambda: _npz("Transformer/encoder_norm/bias", "cls"), "an archive of JAX weights"),
    "b.tar.gz": (lambda: b"\x1f\x8b\x08" + bytes(20), "a gzip archive; .*unpack it"),
    "e.plan": (lambda: b"ftrt" + bytes(20), "a TensorRT engine"),
    "m.xml": (lambda: b'<?xml version="1.0"?>\n<net name="x" version="11">', "an OpenVINO model"),
    "r.html": (lambda: b"<!DOCTYPE html><html>", "a web page"),
    "names.txt": (lambda: b"cat\ndog\n", "a text file; .*--classes"),
    "empty.json": (lambda: b"", "an empty file"),
    "unknown": (lambda: bytes(range(256)), "no file of a kind that is known here"),
    "manifest.json": (lambda: b'{"format": "vpe"}', "the manifest of a bundle; .*name the bundle's folder"),
    "report.json": (lambda: b'{"verdict": {}}', "a report of vp-validate"),
    "config.json": (lambda: b'{"architecture": "vit"}', "the configuration of a model; .*local-dir:"),
    "model.safetensors.index.json": (lambda: b'{"weight_map": {}}', "the index of weights in several files"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    make, says = FILES[name]
    (tmp_path / name).write_bytes(make())
    check_error(call(app, tmp_path / name), 2, rf"{name} is {says}")


def test_weights_are_no_mask(tmp_path: Path, inputs: Inputs) -> None:
    says = r"weights\.safetensors is the weights of a model \(\d+ tensors, .* M values\); .*--weights"
    check_error(call(app, inputs.weights), 2, says)
    save_file({"mask": np.ones((2, 16)), "other": np.ones(3)}, tmp_path / "mask.safetensors")
    check_error(call(app, tmp_path / "mask.safetensors"), 2, "is a bare mask; expected --model")


def test_folders(tmp_path: Path, inputs: Inputs, exported: Path) -> None:
    check_error(call(app, inputs.data), 2, "is a folder of images; .*--data")
    (tmp_path / "none").mkdir()
    check_error(call(app, tmp_path / "none"), 2, "is an empty folder")
    parent = tmp_path / "bundles"
    shutil.copytree(exported, parent / "tiny.vpe")
    check_error(call(app, parent), 2, rf"holds the bundle tiny\.vpe; .*name {parent}/tiny\.vpe")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    check_error(call(app, model), 2, rf"a folder of the timm model vit_tiny.*--model local-dir:{model} --pretrained")
    (model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    check_error(call(app, model), 2, "a folder of transformers' 'vit'; .*--weights")
    plans = tmp_path / "sweep"
    plans.mkdir()
    shutil.copy(inputs.plan, plans / "tome-0.5.json")
    check_error(call(app, plans), 2, "a folder of 1 plan; .*tome-0.5.json")
    (parent / "tiny.vpe" / "manifest.json").unlink()
    check_error(call(app, parent / "tiny.vpe"), 2, "manifest.json is missing")


def test_the_plans_format_is_known() -> None:
    assert file_types.PLAN_FORMAT == FORMAT
