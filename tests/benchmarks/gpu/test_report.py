"""The results page: states what was not measured, and gives a verdict for every bar that was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import COMMANDS, bars, render

HERE = {"date": "2026-01-01T00:00:00+00:00", "sources": "s", "seconds": 1.0}
TIMING = {"median": 1e-5, "low": 0.9e-5, "high": 1.1e-5, "rounds": 25}


def entry(part: str, key: str, **values: Any) -> dict[str, Any]:
    return {"part": part, "key": key, "group": values.pop("group", ""), **HERE, **values}


def synthetic() -> dict[str, dict[str, Any]]:
    rows = [
        entry("run", "run 1", command="python -m benchmarks.gpu --quick"),
        entry("machine", "machine", device="MADE-UP GPU", copy_bytes_per_s=4.3e12, smi={"driver_version": "1.2"},
              gemm_flops={"bf16": 7.9e14, "fp16": 8e14}, python="3.12", torch="2.11", cuda="13.0", triton="3.6",
              timm="1.0", clocks_before={"sm": 345.0, "mem": 3201.0, "reasons": ["idle"]}, clocks_after={}),
        entry("kernels-check", "select N=17", group="select", compared=80, failed=1, excused=0, images=0, device="cuda",
              failures=[{"call": "B=1 n=17 | k=3", "what": "output 0: 1 of 1 images have other indices"}]),
        entry("kernels-check", "attention N=1024", group="attention", error="its process died (SIGSEGV)"),
        entry("plugins", "plugins select", group="select", compared=27, failed=1,
              say="27 nodes, FAILED 1: other bits than Python's launcher"),
        entry("kernels-time", "attention N=197", operator="attention",
              shape={"N": 197, "B": 256, "H": 6, "dtype": "bf16", "d": 64},
              times={"vp": TIMING, "sdpa cudnn": {**TIMING, "median": 1.2e-5}}, refused={"sdpa flash bias": "no mask"},
              judged={"vp": {"rival": "sdpa cudnn", "ratio": 1.2, "share": 0.5, "met": [True, False]}}),
        entry("kernels-time", "select n=196", operator="select", shape={"n": 196}, refused={},
              times={"vp": TIMING, "torch topk + sort": {**TIMING, "median": 5e-5}},
              judged={"vp": {"rival": "torch topk + sort", "ratio": 5.0, "share": None, "met": [True]}}),
        entry("models", "deit dense", model="deit", dtype="bf16", batch=256, times={"timm compile": TIMING},
              best="timm compile", best_of_engine={"compile": "timm compile"}, refused={"timm aoti": "no compiler"}),
        entry("models", "deit tome", model="deit", dtype="bf16", batch=256, engine="compile", form="vp", reducer="tome",
              ratio=1.5, macs=1.5, speedup=1.3, same_speedup=1.3, efficiency=0.867, met=False, finite=True,
              times={"dense": TIMING, "reduced": TIMING}),
        entry("models", "deit static", model="deit", dtype="bf16", batch=256, engine="compile", form="vp",
              reducer="static", ratio=1.5, macs=1.5, speedup=1.5, same_speedup=1.5, efficiency=1.0, met=True,
              finite=True, times={"dense": TIMING, "reduced": TIMING}),
        entry("models", "deit gtp", error="RuntimeError: no kernel"),
    ]  # fmt: skip
    return {f"{row['part']}: {row['key']}": row for row in rows}


def test_without_measurements_every_table_says_so() -> None:
    page = render({}, note="not measured: no GPU could be reached")
    assert page.count("no GPU could be reached") >= 6 + 8  # six tables, eight bars
    assert not any(f"| {digit}" in page for digit in range(10))
    assert all(command in page for command in COMMANDS)
    assert "NOT MET" not in page


def test_a_made_up_page_says_that_it_is() -> None:
    page = render(synthetic(), synthetic=True)
    assert "SYNTHETIC" in page.splitlines()[2]
    assert "SYNTHETIC" not in render(synthetic())


def test_figures_verdicts_and_failures_are_shown() -> None:
    page = render(synthetic(), synthetic=True)
    assert (
        "| 197 | 256 | 6 | bf16 | vp | 10.0 (9.0-11.0) | sdpa cudnn | 12.0 (9.0-11.0) | 1.20 | 50% | met, **NOT MET** |"
        in page
    )
    assert (
        "**attention: at least 60% of the copy bandwidth**: NOT MET (0 of 1 rows). Missed by: attention N=197 vp 50%"
        in page
    )
    assert "**select: at least 4x the best torch form**: met (1 of 1 rows)" in page
    assert "**gather_norm: at least 80% of the copy bandwidth**: not measured" in page
    assert (
        "**reducers: efficiency at least 0.90 at batch 256**: NOT MET (0 of 1 rows). Missed by: deit tome 0.867" in page
    )
    assert "**static plan: efficiency at least 0.95 at batch 256**: met (1 of 1 rows)" in page
    assert "| select N=17 | B=1 n=17 / k=3 | output 0: 1 of 1 images have other indices |" in page
    assert "its process died (SIGSEGV)" in page
    assert "sdpa flash bias: no mask" in page
    assert "deit gtp: RuntimeError: no kernel" in page
    assert "MADE-UP GPU, driver 1.2" in page
    assert "python -m benchmarks.gpu --quick" in page


def test_every_bar_is_listed_even_where_nothing_was_measured() -> None:
    titles = [title for title, _, _ in bars({})]
    assert len(titles) == 8
    assert all(not good and not bad for _, good, bad in bars({}))


def test_checks_of_a_cpu_are_not_passed_off_as_a_gpus() -> None:
    row = entry("kernels-check", "select", group="select", compared=1, failed=0, device="cpu")
    assert "interpreter on a CPU, not on a GPU" in render({"a": row})


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(synthetic()))
    assert render(json.loads(path.read_text())) == render(synthetic())


def test_the_page_in_the_repository_claims_nothing_that_was_not_measured() -> None:
    """Without measurements from a GPU it says so; with them it names the machine."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "results" / "gpu.md").read_text()
    assert "SYNTHETIC" not in page
    assert ("not measured" in page.lower()) or ("driver" in page)


def test_plugins_have_a_table() -> None:
    assert "| select | 27 | 27 nodes, FAILED 1: other bits than Python's launcher |" in render(synthetic())
