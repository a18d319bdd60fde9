"""vp-serve: files, output and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.engines.serving.triton.samples import write_linear
from tests.exporter.cli.samples import call
from tests.ports import free_ports
from vp_engines.serving.ray.options import Listen, RayOptions
from vp_exporter.cli.serve import app


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_linear(tmp_path / "linear.vpe")


def test_a_repository_and_its_versions(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    first = call(app, "triton", str(bundle), "--out", str(out))
    assert first.exit_code == 0, first.output
    assert str(out / "linear" / "1") in first.output
    assert f"tritonserver --model-repository {out}" in first.output
    assert "max_batch_size 64: what the engine was built for (--max-batch N changes it)" in first.output
    second = call(app, "triton", str(bundle), "--out", str(out), "--json", "--max-batch", "4", "--no-warmup")
    assert json.loads(second.output) == {
        "name": "linear", "version": 2, "backend": "onnxruntime", "server": None, "max_batch": 4,
        "folders": [str(out / "linear")],
    }  # fmt: skip
    config = (out / "linear" / "config.pbtxt").read_text()
    assert "max_batch_size: 4" in config
    assert "warmup" not in config


def test_every_option_is_heard(bundle: Path, tmp_path: Path) -> None:
    found = call(
        app, "triton", str(bundle), "-o", str(tmp_path), "--name", "a", "--backend", "python", "--preprocess", "model",
        "--variant", "dense", "--model-version", "5", "--delay", "70", "--instances", "2", "--threads", "3",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    text = (tmp_path / "a" / "config.pbtxt").read_text()
    assert (tmp_path / "a" / "5" / "model.py").is_file()
    for part in ("max_queue_delay_microseconds: 70", "count: 2", '"dense"', '"encoded"', '"3"'):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--name", "a/b"], "error: the model name 'a/b'; expected"),
        (["--backend", "tensorrt"], "error: the backend tensorrt does not run engines of 'ort'; expected"),
        (["--preprocess", "maybe"], "error: preprocess is 'maybe'; expected one of none, model, ensemble"),
        (["--max-batch", "1000"], "error: max_batch is 1000; expected at most 64"),
    ],
)
def test_bad_input_is_one_line(bundle: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    found = call(app, "triton", str(bundle), "--out", str(tmp_path / "models"), *arguments)
    assert found.exit_code == 2
    assert found.stderr.startswith(line)
    assert found.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["linear.vpe"]


def test_no_bundle_and_no_tritonclient(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = call(app, "triton", str(tmp_path / "none"), "--out", str(tmp_path / "models"))
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    found = call(app, "triton", str(bundle), "--out", str(tmp_path / "models"))
    assert found.exit_code == 3
    assert "install 'vp-export[serve]'" in found.stderr


def test_a_bundle_on_ray_is_told_every_option(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment itself is tested in tests/engines/serving/ray."""
    seen: list[Any] = []

    def serve(path: Path, options: RayOptions, listen: Listen, say: Callable[[str], None]) -> None:
        seen[:] = [path, options, listen]
        say("serving")

    monkeypatch.setattr("vp_engines.serving.ray.command.serve_bundle", serve)
    assert call(app, "ray", str(bundle)).exit_code == 0
    assert seen == [bundle, RayOptions(), Listen()]
    wanted = RayOptions("a", "dense", "cpu", 3, 1, 2, 0.5, 8, 4.0, 9, 1, 5.0, 1, 3.0, 7.0)
    where = Listen("auto", "0.0.0.0", 9000, "/a", "head", 60.0)
    given = []
    for chosen in (wanted, where):
        for name, value in asdict(chosen).items():
            given += [f"--{name.replace('_', '-')}", str(value)]
    found = call(app, "ray", str(bundle), *given)
    assert (found.exit_code, found.stdout) == (0, "serving\n"), found.output
    assert seen == [bundle, wanted, where]


def test_ray_refuses_in_one_line(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (port,) = map(str, free_ports())
    for arguments, code, line in (
        ([str(bundle), "--replicas", "0"], 2, "error: replicas is 0; expected a whole number from 1"),
        ([str(tmp_path / "none.vpe")], 2, "error: '"),
        ([str(bundle), "--replicas", "1", "--threads", "1", "--port", port], 3, "error: Ray Serve is not installed"),
    ):
        found = call(app, "ray", *arguments)
        assert (found.exit_code, found.stderr.count("\n"), found.stdout) == (code, 1, "")
        assert found.stderr.startswith(line)
    assert "; pip install 'vp-export[ray]'" in found.stderr
