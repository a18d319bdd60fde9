"""The command line: without a GPU, dry run, and resuming an interrupted run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import command
from tests import warm

ROOT = Path(__file__).resolve().parents[3]


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(["-m", "benchmarks.gpu", *arguments], env=environment, cwd=ROOT)


@pytest.mark.slow
def test_without_a_gpu_one_line_and_exit_code_3(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    found = run(environment, "--cache", str(tmp_path / "c.json"), "--out", str(out))
    assert found.returncode == 3
    assert len(found.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in found.stderr
    assert not out.exists()
    assert not (tmp_path / "c.json").exists()


@pytest.mark.slow
def test_dry_run_lists_rows_and_tries_them(environment: dict[str, str]) -> None:
    found = run(
        environment, "--dry-run", "--quick", "--workers", "12", "--parts", "machine", "kernels-check", "kernels-time",
        "models", "--operators", "select", "gather_norm", "--reducers", "evit",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    for text in ("select n=196", "deit_small_patch16_224 bf16 B=256 evit 1.5 vp compile", "kernels-check: good",
                 "kernels-time: good", "models: good", "all together about"):  # fmt: skip
        assert text in found.stdout


def test_report_only_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    arguments = ["--report-only", "--cache", str(tmp_path / "none.json"), "--out", str(out), "--note", "because"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    assert command.main() == 0
    assert "because" in out.read_text()


@pytest.mark.slow
def test_kernels_are_checked_in_child_processes_and_not_twice(environment: dict[str, str], tmp_path: Path) -> None:
    """In Triton's interpreter, at one size: from the command to the page."""
    cache, out = tmp_path / "c.json", tmp_path / "gpu.md"
    arguments = ["--device", "cpu", "--tiny", "--parts", "kernels-check", "--operators", "gather_norm",
                 "--cache", str(cache), "--work", str(tmp_path / "work"), "--out", str(out)]  # fmt: skip
    first = run({**environment, "TRITON_INTERPRET": "1"}, *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads(cache.read_text())["rows"]
    (checked,) = [row for row in rows.values() if row["part"] == "kernels-check"]
    assert (checked["failed"], checked["compared"]) == (0, 5)
    assert "interpreter on a CPU" in out.read_text()
    second = run({**environment, "TRITON_INTERPRET": "1"}, *arguments)
    assert "nothing left to do" in second.stdout
    again = [row for row in json.loads(cache.read_text())["rows"].values() if row["part"] == "kernels-check"]
    assert again == [checked]


def test_commands_are_kept_without_this_machines_paths() -> None:
    given = ["--parts", "models", "--cache", "/tmp/x.json", "--json", "/out/x", "--out", "/x/y.md", "--quick"]
    assert command.command_line(given) == "python -m benchmarks.gpu --parts models --quick"


def test_names_are_checked_before_anything_runs() -> None:
    with pytest.raises(SystemExit, match="--reducers tomme: expected one of static, tome"):
        command.wanted(command.parse(["--reducers", "tomme"]))
    with pytest.raises(SystemExit, match="--engines tensorrt"):
        command.wanted(command.parse(["--engines", "tensorrt"]))


def test_quick_and_filters() -> None:
    asked = command.wanted(command.parse(["--quick", "--models", "deit_base_patch16_224", "--batches", "1"]))
    assert list(asked.groups()) == [("deit_base_patch16_224", "bf16", 1)]
    assert asked.ratios == (1.5,)
