"""Two real processes (gloo) do what one does, bit for bit, and hear of each other's failures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vp_exporter.errors import SearchError
from vp_exporter.search.workers import Workers, from_environment, single

PROGRAM = """
import json, sys
import torch
from tests.exporter.search.samples import calibrated
from tests.exporter.tiny import random_plan
from vp_exporter.errors import SearchError
from vp_exporter.search.scoring import Scorer
from vp_exporter.search.workers import close, from_environment

workers = from_environment()
vit, description, calibration = calibrated(workers=workers)
scorer = Scorer(vit, description, calibration, workers)
losses = scorer.losses(random_plan(description.plan_model()), calibration.search)
found = {"losses": losses.tolist(), "rank": workers.rank, "mine": sorted(calibration._images),
         "leader": workers.from_leader(lambda: f"made by {workers.rank}")}
def fail(item):
    if item == 1:
        raise SearchError("item 1 is broken")
    return torch.zeros(1)
try:
    workers.map(fail, range(4))
except SearchError as error:
    found["error"] = str(error)
def refuse():
    raise SearchError("the leader refuses")
try:
    workers.from_leader(refuse)
except SearchError as error:
    found["refusal"] = str(error)
close(workers)
open(f"{sys.argv[1]}/{workers.rank}.json", "w").write(json.dumps(found))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(arguments: list[str], world: int, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` as `world` processes of one group, as torchrun would start them."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=timeout)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def test_one_process_maps_in_order() -> None:
    assert [int(value) for value in single().map(lambda item: torch.tensor(item * item), [3, 1, 2])] == [9, 1, 4]
    assert single().from_leader(lambda: "x") == "x"
    assert single().leader


def test_work_is_split_by_number() -> None:
    assert [[item for item in range(5) if Workers(rank, 2).owns(item)] for rank in (0, 1)] == [[0, 2, 4], [1, 3]]


def test_no_group_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert from_environment() == single()


def test_a_group_that_cannot_form_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SearchError, match="cannot find each other"):
        from_environment()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        for done in together([str(tmp_path / "program.py"), str(tmp_path / str(world))], world):
            assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "1" / "0.json").read_text())
    pair = [json.loads((tmp_path / "2" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert pair[0]["losses"] == pair[1]["losses"] == alone["losses"]
    assert [each["mine"] for each in pair] == [[0, 2], [1, 3]]
    assert [each["leader"] for each in pair] == ["made by 0"] * 2
    assert "item 1 is broken" in pair[1]["error"]
    assert pair[0]["error"].startswith("process 1 of 2 failed: item 1 is broken")
    assert [each["refusal"] for each in pair] == ["the leader refuses"] * 2
