"""vp-search as a user runs it: a plan that vp-export accepts, despite interruptions, with any number of processes."""

from __future__ import annotations

import dataclasses
import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import vp_exporter as vp
from tests.exporter.cli.samples import NAME, Inputs, argv, call, create, export_options, model_args
from tests.exporter.processes import together
from tests.waiting import until
from tests.warm import start
from vp_exporter.cli.export import app as export
from vp_exporter.cli.search import app, join_sweep
from vp_exporter.model.describe import describe
from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.cost.measured_latency import measure_table


def options(inputs: Inputs, out: Path, **changes: Any) -> list[str]:
    """Options of a search that takes a few seconds; changes as in `export_options`."""
    given = {
        "--model": NAME, "--model-arg": model_args(), "--weights": inputs.weights, "--data": inputs.data, "--out": out,
        "--target-macs": 0.7, "--search-batch": 4, "--evaluations": 6, "--tune-steps": 2,
    }  # fmt: skip
    return argv({**given, **{"--" + key.replace("_", "-"): value for key, value in changes.items()}})


def refused(message: str, *words: str) -> None:
    result = call(app, *words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def searched(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vpruner plan with its report."""
    folder = tmp_path_factory.mktemp("searched")
    result = call(app, *options(inputs, folder / "plan.json", page=folder / "page"))
    assert result.exit_code == 0, result.output
    return folder


def test_the_plan_keeps_its_budget_and_says_how_it_was_found(searched: Path) -> None:
    plan = ReductionPlan.load(searched / "plan.json")
    rows = plan.provenance["search"]["stages"]
    assert [row["stage"] for row in rows] == ["fisher", "fisher prior", "rearrangement", "tuning"]
    kl = [row["kl"] for row in rows if "kl" in row]
    assert kl == sorted(kl, reverse=True), "no stage may raise held-out KL"
    assert all(0 < row["macs_share"] <= 0.7 for row in rows if "macs_share" in row)
    names = {row["stage"] for row in plan.provenance["search"]["baselines"]}
    assert names == {"center", "grid", *(f"random {seed}" for seed in range(5)), "fisher farthest-point"}
    starts = {row["start"] for row in next(row for row in rows if row["stage"] == "rearrangement")["rows"]}
    assert starts >= names | {"fisher prior", "spread 1.2", "spread 1.2 by importance"}
    assert plan.method == "vpruner"
    assert plan.budget["target_macs"] == 0.7
    assert len(plan.provenance["search"]["data_fingerprint"]) == 64
    assert not (searched / "plan.json.search").exists()


def test_python_finds_the_same_plan(searched: Path, inputs: Inputs) -> None:
    """From a module in memory, with the same weights."""
    vit = create()
    vit.load_state_dict(load_file(inputs.weights))
    found = vp.search(vit, inputs.data, target_macs=0.7, search_batch=4, evaluations=6, tune_steps=2)
    plan = ReductionPlan.load(searched / "plan.json")
    assert found.fingerprint() == plan.fingerprint()
    assert found.provenance["search"]["winner"] == plan.provenance["search"]["winner"]
    assert found.provenance["search"]["verdict"]["baseline"]


def test_its_page(searched: Path) -> None:
    assert {path.name for path in (searched / "page").iterdir()} >= {"search.html", "search.json"}
    shown = json.loads((searched / "page" / "search.json").read_text())
    assert len(shown["baselines"]) == 8
    assert len(shown["trace"]) > 0
    plan = ReductionPlan.load(searched / "plan.json")
    rows = {row["name"]: row for row in [*shown["stages"], *shown["baselines"]]}
    (winner,) = [row for row in shown["stages"] if row["winner"]]
    rivals = [row for row in [*shown["baselines"], rows["fisher prior"]] if row is not winner]
    verdict = shown["verdict"]
    assert verdict["baseline_kl"] == pytest.approx(min(row["kl"] for row in rivals))
    assert rows[verdict["baseline"]]["kl"] == pytest.approx(verdict["baseline_kl"])
    assert verdict["kl"] == pytest.approx(winner["kl"])
    assert verdict["images"] == plan.provenance["search"]["held_out_images"]
    assert verdict["difference"]["value"] == pytest.approx(verdict["kl"] - verdict["baseline_kl"])
    beaten, lost = verdict["difference"]["high"] < 0, verdict["difference"]["low"] > 0
    assert verdict["outcome"] == ("better" if beaten else "worse" if lost else "unproven")
    html = (searched / "page" / "search.html").read_text()
    assert html.index('aria-label="Verdict"') < html.index("<table>")
    assert html.count('class="winner"') == 1
    assert verdict["text"] in unescape(html)


@pytest.mark.slow
def test_vp_export_takes_the_plan(searched: Path, inputs: Inputs) -> None:
    given = export_options(inputs, searched / "m.vpe", masks=None, plan=searched / "plan.json", validate=None)
    result = call(export, *argv({**given, "--no-validate": True, "--no-dense": True}))
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_same_plan_by_two_processes(searched: Path, inputs: Inputs, tmp_path: Path) -> None:
    """A repeated run is tested by `test_a_killed_search_goes_on`."""
    out = tmp_path / "plan.json"
    for done in together(["-m", "vp_exporter.cli.search", *options(inputs, out)], 2):
        assert done.returncode == 0, done.stderr
    assert _decisive(out.read_text()) == _decisive((searched / "plan.json").read_text())


def _decisive(text: str) -> Any:
    """A plan without its timings."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: clean(entry) for key, entry in value.items() if key not in ("seconds", "evaluations", "images_run")
            }
        return [clean(entry) for entry in value] if isinstance(value, list) else value

    return clean(json.loads(text))


@pytest.mark.slow
def test_a_killed_search_goes_on(searched: Path, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = options(inputs, out)
    started = start(["-m", "vp_exporter.cli.search", *words])
    folder = tmp_path / "plan.json.search"
    until(lambda: list(folder.glob("*fisher*")) or started.ended())
    started.kill()
    started.communicate()
    assert folder.is_dir(), "killed before it had begun, or after its end"
    assert not out.exists()
    refused("the same search", *options(inputs, out, seed=1))
    result = call(app, *words)
    assert result.exit_code == 0, result.output
    assert _decisive(out.read_text()) == _decisive((searched / "plan.json").read_text())
    assert not folder.exists()


def test_a_schedule_and_a_sweep(inputs: Inputs, tmp_path: Path) -> None:
    result = call(app, *options(inputs, tmp_path / "plans", method="topk", target_macs=None, sweep="0.8 0.65"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == ["topk-0.65.json", "topk-0.8.json"]
    for path in (tmp_path / "plans").iterdir():
        rows = ReductionPlan.load(path).provenance["search"]
        assert rows["stages"][-1]["kl"] <= rows["baselines"][0]["kl"]


@pytest.mark.slow
def test_a_latency_budget_reads_its_table(inputs: Inputs, tmp_path: Path) -> None:
    vit = create()
    table = measure_table(vit, describe(vit, NAME), batch=2, counts=(4, 16), seconds=0.2)
    # Noise may make a block of 4 patches slower than one of 16; this tests reading the file, not the machine.
    steady = dataclasses.replace(table, milliseconds=(1.0, 2.0), overhead_ms=(0.5, 1.0))
    steady.save(tmp_path / "table.json")
    asked = {
        "target_macs": None, "target_latency": 0.8, "rearrange": "none", "tune": "none",
        "latency_table": tmp_path / "table.json", "min_tokens": 4,
    }  # fmt: skip
    words = options(inputs, tmp_path / "plan.json", **asked)
    result = call(app, *words)
    assert result.exit_code == 0, result.output
    plan = ReductionPlan.load(tmp_path / "plan.json")
    assert 0.6 < steady.predicted_ms([row.attention for row in plan.tokens()]) / steady.predicted_ms([17, 17]) <= 0.8
    assert plan.provenance["latency_table"] == steady.to_dict()
    refused("table.json is of batch 2; expected batch 4", *options(inputs, tmp_path / "other.json", batch=4, **asked))
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_macs": None}, "no budget is named"),
        ({"sweep": "0.8"}, "--sweep is given with another budget"),
        ({"target_macs": None, "sweep": "half"}, "--sweep is 'half'"),
        ({"target_macs": 0.01}, "0.01"),
        ({"search_batch": 16}, "24 calibration images"),
        ({"data": "nowhere"}, "no folder nowhere"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"rearrange": "luck"}, "--rearrange names 'luck'"),
        ({"method": "magic"}, "--method is 'magic'"),
    ],
)
def test_bad_input_is_one_line(inputs: Inputs, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(message, *options(inputs, tmp_path / "plan.json", **changes))
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_is_not_written_over(searched: Path, inputs: Inputs) -> None:
    refused("exists already", *options(inputs, searched / "plan.json"))
    refused("is a folder", *options(inputs, searched))
    refused("is not a folder", *options(inputs, searched / "plan.json" / "none" / "plan.json"))


def test_one_class_with_labels_asked_for(inputs: Inputs, tmp_path: Path) -> None:
    refused("has no labels", *options(inputs, tmp_path / "p.json", data=inputs.data / "a", targets="labels"))


def test_sweep_takes_the_numbers_behind_it() -> None:
    assert join_sweep(["--sweep", "0.8", "0.65", "--out", "p"]) == ["--sweep", "0.8 0.65", "--out", "p"]
    assert join_sweep(["--out", "p", "--sweep", "0.8,0.5"]) == ["--out", "p", "--sweep", "0.8,0.5"]
    assert join_sweep(["--out", "3"]) == ["--out", "3"]
    assert join_sweep(["--sweep"]) == ["--sweep"]
