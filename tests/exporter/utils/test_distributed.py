"""Two real processes (gloo) give bitwise the same results as one, and raise each other's errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.exporter.processes import in_threads, together
from vp_exporter.errors import DataError, VpError
from vp_exporter.utils.distributed import Workers, announced, from_environment, own_gpu, single

PROGRAM = """
import json, os, sys
import torch
from tests.exporter.searching.samples import calibrated
from tests.exporter.tiny import random_plan
from vp_exporter.errors import DataError, VpError
from vp_exporter.plan import PlanModel
from vp_exporter.searching.scoring import Scorer
from vp_exporter.utils.distributed import close, from_environment

workers = from_environment()
vit, description, calibration = calibrated(workers=workers)
scorer = Scorer(vit, description, calibration, workers)
losses = scorer.losses(random_plan(PlanModel.of(description)), calibration.search)
found = {"losses": losses.tolist(), "rank": workers.rank, "mine": sorted(calibration._images),
         "leader": workers.from_leader(lambda: f"made by {workers.rank}"),
         "gathered": workers.gather({"rank": workers.rank}), "agreed": workers.agree(lambda: workers.rank)}
errors = found["errors"] = []
def fail(item):
    if item == 1:
        raise DataError("item 1 is broken", fix="mend it")
    return torch.zeros(1)
def fail_oddly():
    if workers.rank == workers.world - 1:
        raise TypeError("a bug")
def refuse():
    raise VpError("the leader refuses")
def full():
    raise OSError(28, "No space left on device", "report.json")
def stumble():
    raise KeyError("odd")
for call in (lambda: workers.map(fail, range(4)), lambda: workers.agree(fail_oddly),
             lambda: workers.from_leader(refuse), lambda: workers.from_leader(full),
             lambda: workers.from_leader(stumble)):
    try:
        call()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
with open(f"{sys.argv[1]}/{workers.world}-{workers.rank}.json", "w") as file:
    file.write(json.dumps(found))
if workers.world > 1:
    try:
        if workers.rank == 1:
            os._exit(9)
        workers.gather("never answered")
    except VpError as error:
        print(error)
close(workers)
"""


def test_one_process_maps_in_order() -> None:
    assert [int(value) for value in single().map(lambda item: torch.tensor(item * item), [3, 1, 2])] == [9, 1, 4]
    assert single().from_leader(lambda: "x") == "x"
    assert single().gather("x") == ["x"]
    assert single().agree(lambda: "x") == "x"
    assert single().leader


def test_work_is_split_by_number() -> None:
    assert [[item for item in range(5) if Workers(rank, 2).owns(item)] for rank in (0, 1)] == [[0, 2, 4], [1, 3]]


def test_map_gives_all_results_in_order_to_all() -> None:
    found = in_threads(3, lambda workers: workers.map(lambda item: torch.tensor(item * item), [4, 3, 1, 2]))
    assert found == [[torch.tensor(value) for value in (16, 9, 1, 4)]] * 3


def test_all_raise_the_first_failure() -> None:
    def run(workers: Workers) -> int:
        def make() -> int:
            if workers.rank:
                raise DataError(f"broken on {workers.rank}", fix="mend it")
            return 0

        return workers.agree(make)

    found = in_threads(3, run)
    assert [type(error) for error in found] == [DataError] * 3
    assert [str(error) for error in found] == ["broken on 1; mend it"] * 3


def test_a_bug_names_its_process() -> None:
    def run(workers: Workers) -> float:
        return workers.agree(lambda: 1 / (1 - workers.rank))

    first, second = in_threads(2, run)
    assert isinstance(second, ZeroDivisionError)  # with its traceback
    assert isinstance(first, RuntimeError)
    assert str(first) == "process 1 of 2 failed: ZeroDivisionError: division by zero"


def test_no_group_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not announced()
    assert from_environment() == single()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not announced()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert announced()


def test_a_group_that_cannot_form_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VpError, match="cannot find each other"):
        from_environment()


@pytest.mark.parametrize(
    ("visible", "count", "local", "wanted"),
    [
        (None, 4, "0", "0"),
        (None, 4, "3", "3"),
        (None, 2, "3", "1"),
        (None, 4, None, "0"),
        (None, 0, "1", None),
        ("2,5", 8, "1", "5"),
        ("2, 5", 8, "2", "2"),
        ("GPU-1a,GPU-2b", 2, "1", "GPU-2b"),
        ("", 8, "1", ""),
    ],
)
def test_each_process_sees_its_own_gpu(
    visible: str | None, count: int, local: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", local)):
        if value is None:
            # set first, so that monkeypatch restores it
            monkeypatch.setenv(name, "x")
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    own_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == wanted


def test_importing_it_brings_no_torch() -> None:
    code = "import sys, vp_exporter.utils.distributed, vp_exporter.validation.accuracy; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for world, codes in ((1, [0]), (2, [0, 9])):
        done = together([str(tmp_path / "program.py"), str(tmp_path)], world)
        assert [each.returncode for each in done] == codes, done[0].stderr + done[-1].stderr
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first["losses"] == second["losses"] == alone["losses"]
    assert [each["mine"] for each in (alone, first, second)] == [[0, 1, 2, 3], [0, 2], [1, 3]]
    assert [each["leader"] for each in (first, second)] == ["made by 0"] * 2
    assert first["gathered"] == second["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert [each["agreed"] for each in (first, second)] == [0, 1]
    told = "RuntimeError: process {} of 2 failed: {}"
    bug, odd = "TypeError: a bug", "KeyError: 'odd'"
    for found, texts in (
        (alone, [bug, odd]),
        (first, [told.format(1, bug), odd]),
        (second, [bug, told.format(0, odd)]),
    ):
        assert found["errors"][:2] == ["DataError: item 1 is broken; mend it", texts[0]]
        assert found["errors"][2:4] == [
            "VpError: the leader refuses",
            "OSError: [Errno 28] No space left on device: 'report.json'",
        ]
        assert found["errors"][4] == texts[1]
    assert done[0].stdout.startswith("process 0 of 2 has lost the others: "), "the second of two ends on purpose"
