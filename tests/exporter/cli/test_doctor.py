"""The vp-doctor command: its text at every width, its JSON, and that it does not need the console's packages."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from vp_exporter.cli import doctor as command
from vp_exporter.doctor import Diagnosis, Package, Works

FOUND = Diagnosis(
    version="0.1.0",
    system={
        "Python": "3.11.7, Linux x86_64, glibc 2.36",
        "CPU": "A CPU with a long name @ 2.0GHz, 2 of 64 cores",
    },
    gpus=["NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB, driver 580.65.06"],
    engines={
        "ort": (Works(True), Works(True)),
        "openvino": (Works(False, "openvino is not installed: pip install 'vp-export[openvino]'"),) * 2,
        "trt-rtx": (Works(True), Works(False, "no NVIDIA GPU with a driver is visible here")),
    },
    commands={
        "vp-export": Works(True),
        "vp-search --page": Works(False, "scipy, matplotlib are not installed: pip install 'vp-export[search]'"),
    },
    packages=[
        Package("torch", "2.11.0+cu130", "", "CUDA 13.0, a GPU"),
        Package("timm", "1.0.31", "does not import: OSError: [Errno 5] Input/output error"),
        Package("openvino", "", "not installed"),
        Package("tritonclient.grpc", "", "not installed"),
    ],
)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_text_fits_and_loses_nothing(width: int) -> None:
    lines = list(command.lines(FOUND, width))
    assert max(map(len, lines)) <= width
    assert sum(line.count("pip install 'vp-export[") for line in lines) == 2  # none is broken across lines
    text = " ".join(" ".join(lines).split())
    for part in (
        "driver 580.65.06", "ort yes yes", "openvino no no openvino is not installed: pip",
        "trt-rtx yes no run: no NVIDIA GPU with a driver is visible here", "vp-export works",
        "vp-search --page no: scipy, matplotlib are not installed: pip install 'vp-export[search]'",
        "torch 2.11.0+cu130 (CUDA 13.0, a GPU)", "timm 1.0.31: does not import: OSError: [Errno 5]",
        "not installed openvino, tritonclient",
    ):  # fmt: skip
        assert part in text


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "diagnose", lambda: FOUND)
    assert command.run(["--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found == json.loads(json.dumps(FOUND.to_dict()))
    assert found["engines"]["trt-rtx"] == {
        "build": {"ok": True, "why_not": ""},
        "run": {"ok": False, "why_not": "no NVIDIA GPU with a driver is visible here"},
    }
    assert told.err == ""


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.run(["--jsn"])
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*--jsn; --help lists the options\n", capsys.readouterr().err)


@pytest.mark.slow
def test_it_runs_where_the_console_is_broken() -> None:
    """With Python alone, every package is reported missing, in this process and in those that try it."""
    code = (
        "import sys\n"
        "from vp_engines.extras import EXTRAS\n"
        "for modules in EXTRAS.values():\n"
        "    sys.modules.update(dict.fromkeys({name.split('.')[0] for name in modules}))\n"
        "from vp_exporter.cli import vp_doctor\n"
        "sys.argv[1:] = ['--json']\n"
        "vp_doctor()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {package["problem"] for package in found["packages"]} == {"not installed"}
    assert not any(each["ok"] for each in found["commands"].values())
    assert not any(step["ok"] for engine in found["engines"].values() for step in engine.values())
