"""vp-validate with several real processes: the same numbers as with one, and one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.exporter.cli.samples import FAST, Inputs, call
from tests.exporter.processes import together
from vp_engines.bundle import verify_bundle
from vp_engines.errors import VpError
from vp_exporter.cli import validate
from vp_exporter.utils import distributed

MODULE = "vp_exporter.cli.validate"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 27 random images, so that dense and reduced engine differ: three batches of 32."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for name in "abc":
        (root / name).mkdir()
        for i in range(27):
            pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((72, 80)).save(root / name / f"{i:02}.png")
    return root


def alone(*words: str | Path) -> dict[str, Any]:
    result = call(validate.app, *words, *FAST, "--threads", "1", "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def words(*given: str | Path) -> list[str]:
    return ["-m", MODULE, *map(str, given), *FAST, "--threads", "1"]


@pytest.mark.slow
def test_two_processes_find_what_one_does(exported: Path, pictures: Path, tmp_path: Path) -> None:
    """With a broken image in each share; see `test_one_batch_for_two_processes` for the case without."""
    data, bundle, report = tmp_path / "data", tmp_path / "copy.vpe", tmp_path / "report"
    shutil.copytree(pictures, data)
    shutil.copytree(exported, bundle)
    (data / "a" / "05x.png").write_bytes(b"no image")
    (data / "c" / "20x.png").write_bytes(b"no image")
    one = alone(exported, "--data", data)
    first, second = together(words(bundle, "--data", data, "--json", "--update", "--report", report), 2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    found = json.loads(first.stdout)
    assert found["accuracy"] == one["accuracy"]
    assert (found["accuracy"]["images"], found["accuracy"]["skipped"]) == (81, 2)
    assert 0 < found["accuracy"]["agreement"]["value"] < 100
    assert found["accuracy"]["kl"]["low"] < found["accuracy"]["kl"]["high"]
    assert (found["notes"], found["warnings"]) == (one["notes"], one["warnings"])
    assert [row["batch"] for row in found["latency"]] == [2]
    assert json.loads((report / "report.json").read_text()) == found
    assert json.loads((bundle / "report.json").read_text()) == found
    verify_bundle(bundle)
    assert second.stdout == ""
    # Each process warns about the files of its own share.
    for done, name in ((first, "a/05x.png"), (second, "c/20x.png")):
        warned = [line for line in done.stderr.splitlines() if line.startswith("warning: skipped")]
        assert [line.split(": ")[1] for line in warned] == [f"skipped {name}"]
    assert second.stderr.count("\n") == 1


@pytest.mark.slow
def test_one_batch_for_two_processes(exported: Path, inputs: Inputs) -> None:
    """A missed budget ends both with the same exit code as a single process."""
    first, second = together(words(exported, "--data", inputs.data, "--json", "--min-speedup", "100"), 2)
    assert (first.returncode, second.returncode) == (1, 1), first.stderr + second.stderr
    assert json.loads(first.stdout)["accuracy"] == alone(exported, "--data", inputs.data)["accuracy"]
    assert (second.stdout, second.stderr) == ("", "")


@pytest.mark.slow
def test_a_broken_image_stops_all_with_one_line(exported: Path, pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "c" / "20x.png").write_bytes(b"no image")
    report = tmp_path / "report"
    first, second = together(words(exported, "--data", data, "--strict", "--quiet", "--report", report), 2)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert first.stderr.startswith("error: c/20x.png in ")
    assert "cannot be decoded" in first.stderr
    assert first.stderr.count("\n") == 1
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
    assert not report.exists()


@pytest.mark.slow
def test_bad_input_and_a_full_disk_are_one_line_too(exported: Path, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for given, message in (
        ((tmp_path / "no.vpe",), "no.vpe' is not there"),
        # Found by the leader alone, after all measurements.
        ((exported, "--quiet", "--report", tmp_path / "file" / "report"), "Not a directory"),
    ):
        first, second = together(words(*given), 2)
        assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
        assert first.stderr.startswith("error: ")
        assert message in first.stderr
        assert first.stderr.count("\n") == 1
        assert (first.stdout, second.stdout, second.stderr) == ("", "", "")


@pytest.mark.parametrize(
    ("world", "device", "called"),
    [("2", None, True), ("2", "cuda", True), ("2", "cpu", False), ("1", "cuda", False)],
)
def test_a_process_takes_its_gpu_before_anything_else(
    world: str, device: str | None, called: bool, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def form() -> None:
        order.append("group")
        raise VpError("far enough")

    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(distributed, "own_gpu", lambda: order.append("gpu"))
    monkeypatch.setattr(distributed, "from_environment", form)
    result = call(validate.app, exported, *(["--device", device] if device else []))
    assert (result.exit_code, result.stderr) == (2, "error: far enough\n")
    assert order == (["gpu", "group"] if called else ["group"])
