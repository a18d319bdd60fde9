"""The GPU benchmark starts without our packages or pydantic installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import setup

BARE = """
import sys
sys.path.insert(0, {root!r})
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
for name in {blocked!r}:
    sys.modules[name] = None
import os
from benchmarks.gpu import setup
{before}
assert setup.bootstrap()
import vp_exporter, vp_exporter.rewrite.reduced_vit, vp_exporter.plan, vp_exporter.methods, vp_exporter.model.describe
from benchmarks.gpu import checks, dry, jobs, kernels, machine, models, report, tune
import vp_kernels.attention.op
assert jobs.plan_for("deit_tiny_patch16_224", "tome", 2.0).tokens()[-1].mlp < 197
print(os.environ["PYTHONPATH"].split(os.pathsep)[0])
print(os.path.realpath(vp_exporter.__path__[0]))
"""
BLOCKED = ["pydantic", "typer", "onnx", "onnxscript", "onnxruntime", "rich", "jinja2", "openvino", "tensorrt_rtx"]


def bare(environment: dict[str, str], before: str = "") -> list[str]:
    code = BARE.format(root=str(setup.ROOT), blocked=BLOCKED, before=before)
    environment.pop("PYTHONPATH", None)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


@pytest.mark.slow
def test_starts_without_pydantic_and_takes_no_other_trees_packages(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "vp_exporter").mkdir()
    (tmp_path / "vp_exporter" / "__init__.py").write_text("")
    place, package = bare(environment, f"sys.path.insert(0, {str(tmp_path)!r})")
    assert place == str(setup.ROOT / "exporter")
    assert package == str(setup.ROOT / "exporter" / "vp_exporter")


def test_the_criterion_is_the_tests_own() -> None:
    from tests.kernels import bounds, support

    assert setup.of_the_tests("support").__file__ == support.__file__
    assert setup.of_the_tests("bounds").__file__ == bounds.__file__


def test_fingerprint_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("1")
    first = setup.fingerprint("room", "absent.py")
    (tmp_path / "room" / "a.py").write_text("2")
    assert setup.fingerprint("room", "absent.py") != first


def test_a_missing_room_is_named() -> None:
    with pytest.raises(LookupError, match=r"kernels/vp_kernels/nothing/op\.py does not exist"):
        setup.part_of("nothing", "op", "nothing")
    with pytest.raises(LookupError, match=r"kernels/vp_kernels/select/op\.py has no nothing"):
        setup.part_of("select", "op", "nothing")
