"""Class names on the command line: from a file, from --data, and added to a finished bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.exporter.cli.samples import FAST, Inputs, argv, call, check_error, export_options, snapshot
from vp_engines.bundle import read_manifest, verify_bundle
from vp_exporter.cli.export import app as export
from vp_exporter.cli.inspect import app as inspect
from vp_exporter.cli.validate import app as validate


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("red\ngreen\nblue\n")
    return path


def test_names_come_from_the_folders_of_data(exported: Path) -> None:
    assert read_manifest(exported).classes == ("a", "b", "c")


@pytest.mark.slow
@pytest.mark.usefixtures("ready_engines")
def test_where_the_names_come_from_is_said(inputs: Inputs, tmp_path: Path, names: Path) -> None:
    result = call(export, *argv(export_options(inputs, tmp_path / "a.vpe", data=inputs.data)))
    assert re.search(r"class names are taken from .*images: 'a', 'b', 'c'; --classes FILE names others", result.stderr)
    assert call(export, *argv(export_options(inputs, tmp_path / "b.vpe", classes=names))).exit_code == 0
    assert read_manifest(tmp_path / "b.vpe").classes == ("red", "green", "blue")
    # In another order than the folders: the names take precedence.
    names.write_text("c\nb\na\n")
    result = call(export, *argv(export_options(inputs, tmp_path / "c.vpe", classes=names, data=inputs.data)))
    assert read_manifest(tmp_path / "c.vpe").classes == ("c", "b", "a")
    assert "dense top-1" in result.output or "top-1" in result.output


def test_naming_a_finished_bundle(bundle: Path, names: Path) -> None:
    before = verify_bundle(bundle)
    result = call(inspect, bundle, "--classes", names, "--update")
    assert result.exit_code == 0, result.output
    after = verify_bundle(bundle)
    assert after.manifest.classes == ("red", "green", "blue")
    assert after.digest != before.digest
    assert f"its digest is now {after.digest}" in result.stdout
    assert before.digest in result.stdout
    assert after.manifest.files == before.manifest.files
    assert after.manifest.created == before.manifest.created


def test_naming_a_copy(exported: Path, names: Path, tmp_path: Path) -> None:
    before, out = snapshot(exported), tmp_path / "named.vpe"
    result = call(inspect, exported, "--classes", names, "--out", out, "--json")
    assert snapshot(exported) == before
    assert verify_bundle(out).digest == json.loads(result.stdout)["digest"]
    assert read_manifest(out).classes == ("red", "green", "blue")
    check_error(call(inspect, exported, "--classes", names, "--out", out), 2, "is already there")


def test_naming_that_will_not_do(bundle: Path, inputs: Inputs, names: Path) -> None:
    before = snapshot(bundle)
    check_error(call(inspect, bundle, "--classes", names), 2, "given alone; expected --update, .* or --out NEW")
    check_error(call(inspect, bundle, "--update"), 2, "--update is given without --classes")
    check_error(call(inspect, bundle, "--out", bundle), 2, "--out is given without --classes")
    check_error(call(inspect, inputs.plan, "--classes", names, "--update"), 2, "without a bundle")
    names.write_text("red\ngreen\n")
    says = "holds 2 class names; expected 3, one for each class of copy.vpe"
    check_error(call(inspect, bundle, "--classes", names, "--update"), 2, says)
    assert snapshot(bundle) == before


def test_validate_takes_names(exported: Path, inputs: Inputs, names: Path) -> None:
    """Folders a, b, c are classes 2, 1, 0 by this list, so only class 1 stays correct and top-1 falls."""
    names.write_text("c\nb\na\n")
    words = [exported, "--data", inputs.data, *FAST, "--json"]
    own = json.loads(call(validate, *words).stdout)["accuracy"]["dense_top1"]
    turned = json.loads(call(validate, *words, "--classes", names).stdout)["accuracy"]["dense_top1"]
    assert own == 100
    assert turned == pytest.approx(100 / 3)
    names.write_text("x\ny\n")
    check_error(call(validate, *words, "--classes", names), 2, "2 class names for a model of 3 classes")


@pytest.mark.usefixtures("ready_engines")
def test_img_size_on_the_command_line(inputs: Inputs, tmp_path: Path) -> None:
    for wrong in ("0", "big", "1,2,3", "-64"):
        words = argv(export_options(inputs, tmp_path / "x.vpe"))
        check_error(call(export, *words, f"--img-size={wrong}"), 2, f"--img-size is '{wrong}'; expected pixels")
    words = ["--method", "tome", "--r", "2", "--model", "vit_tiny_patch16_224"]
    result = call(inspect, *words, "--img-size", "96,64", "--json")
    assert json.loads(result.stdout)["plan"]["model"]["patches"] == 24
