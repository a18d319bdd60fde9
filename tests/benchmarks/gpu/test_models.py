"""Rows of model timings: plans match the request, the most important rows come first, verdicts follow from times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import dry, jobs, models
from benchmarks.gpu.jobs import Job, Wanted
from benchmarks.gpu.runs import PostponedError, Results
from benchmarks.gpu.timing import Timing


def at(milliseconds: float) -> Timing:
    return Timing(milliseconds / 1e3, milliseconds / 1e3, milliseconds / 1e3, 20)


@pytest.mark.slow
@pytest.mark.parametrize("model", jobs.MODELS)
def test_every_plan_has_the_macs_that_were_asked(model: str) -> None:
    for reducer in jobs.REDUCERS:
        for ratio in jobs.RATIOS:
            assert dry.plan_right(model, reducer, ratio) == pytest.approx(ratio, rel=0.02)


def test_a_plan_with_other_macs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "mac_ratio", lambda model, plan: 1.6)
    with pytest.raises(AssertionError, match=r"the MAC ratio is 1\.600, asked 1\.5"):
        dry.plan_right("deit_small_patch16_224", "static", 1.5)


def test_what_matters_comes_first() -> None:
    groups = list(Wanted().groups())
    small, base = "deit_small_patch16_224", "deit_base_patch16_224"
    assert groups[:4] == [(small, "bf16", 256), (small, "bf16", 1), (base, "bf16", 256), (base, "bf16", 1)]
    assert len(groups) == len(set(groups)) == 6 * 2 * 4
    assert [dtype for _, dtype, _ in groups] == ["bf16"] * 24 + ["fp16"] * 24
    rows = Wanted().reduced(*groups[0])
    assert {(job.form, job.ratio) for job in rows[:9]} == {("vp", 1.5)}
    assert [job.form for job in rows] == sorted((job.form for job in rows), reverse=True)  # vp, then portable


def test_dense_has_every_engine_and_form() -> None:
    few = {job.name for job in Wanted(engines=("aoti",)).dense("deit_small_patch16_224", "bf16", 256)}
    assert few == {"timm eager", "timm compile", "timm compile-max", "timm aoti", "portable aoti", "vp aoti"}
    one = {job.name for job in Wanted().dense("deit_small_patch16_224", "bf16", 1)}
    assert {"timm eager", "timm compile", "timm aoti", "timm aoti-graph", "vp compile", "portable aoti"} <= one
    many = {job.name for job in Wanted().dense("deit_small_patch16_224", "bf16", 256)}
    assert not any("aoti-graph" in name for name in many)


def test_one_package_for_all_batches_and_ways_to_run_it() -> None:
    def package(**changes: object) -> str:
        return Job(**{"model": "m", "dtype": "bf16", "batch": 1, "engine": "aoti", "form": "vp", **changes}).package  # type: ignore[arg-type]

    assert package() == package(batch=256) == package(engine="aoti-graph")
    assert len({package(), package(dtype="fp16"), package(form="timm"), package(reducer="tome")}) == 4
    warm = models.warm_rows(Wanted(), ("deit_small_patch16_224", "bf16", 1), Path("work"))
    assert len({row.name for row in warm}) == len(warm)


@pytest.mark.parametrize(
    ("batch", "reducer", "dense", "same", "reduced", "met"),
    [
        (256, "static", 15.0, 15.0, 10.0, True),  # 1.5x at 1.5x the MACs
        (256, "static", 14.0, 14.0, 10.0, False),  # 0.933
        (256, "tome", 14.0, 14.0, 10.0, True),
        (256, "tome", 13.0, 16.0, 10.0, False),  # the best dense counts, not the same engine's
        (1, "tome", 1.0, 1.2, 1.0, True),
        (1, "tome", 1.2, 1.1, 1.0, False),  # at batch 1 the same engine's counts
        (64, "tome", 1.0, 1.0, 1.0, None),
    ],
)
def test_verdicts(batch: int, reducer: str, dense: float, same: float, reduced: float, met: bool | None) -> None:
    job = Job("m", "bf16", batch, "aoti", "vp", reducer, 1.5)
    times = {"dense": at(dense), "same": at(same), "reduced": at(reduced)}
    found = models.judge(job, times, 1.5, has_same=True)
    assert found["met"] is met
    assert found["speedup"] == pytest.approx(dense / reduced)
    assert found["efficiency"] == pytest.approx(dense / reduced / 1.5)
    assert ("NOT MET" in found["say"]) == (met is False)


def test_portable_rows_have_no_bar() -> None:
    job = Job("m", "bf16", 256, "aoti", "portable", "tome", 1.5)
    assert models.judge(job, {"dense": at(1), "reduced": at(1)}, 1.5, has_same=True)["met"] is None


def test_the_best_dense_is_the_fastest_of_all_and_of_each_engine() -> None:
    times = {"timm eager": at(3), "timm aoti": at(1.5), "vp aoti": at(1.4), "timm compile": at(1.2)}
    found = models.dense_result(times, 256)
    assert found["best"] == "timm compile"
    assert found["best_of_engine"] == {"compile": "timm compile", "aoti": "vp aoti", "eager": "timm eager"}


def test_a_failed_build_is_not_tried_again_and_dense_comes_first(tmp_path: Path) -> None:
    wanted, group = Wanted(reducers=("static",), engines=("aoti",)), ("deit_tiny_patch16_224", "bf16", 256)
    known, built = Results(None), Results(None)
    dense, *reduced = models.rows(wanted, group, tmp_path, known, built)
    with pytest.raises(PostponedError, match="no dense model"):
        reduced[0].measure()
    known.put(dense, {"best": "timm aoti", "best_of_engine": {"aoti": "timm aoti"}}, 0.0)
    for row in models.warm_rows(wanted, group, tmp_path):
        built.put(row, {"error": "no compiler"}, 0.0)
    with pytest.raises(RuntimeError, match="its build failed: no compiler"):
        reduced[0].measure()


@pytest.mark.parametrize("form", ["portable", "vp"])
def test_a_tiny_model_runs_in_each_form(form: str) -> None:
    dry._forward("tome", form)


def test_a_tree_without_the_kernels_says_so() -> None:
    from unittest.mock import patch

    class Old:
        def __init__(self, *args: object) -> None: ...

        def for_export(self, precision: str) -> Old:
            raise AssertionError

    job = Job("m", "bf16", 2, "eager", "vp", "tome", 2.0)
    with (
        patch("vp_exporter.rewrite.reduced_vit.ReducedViT", Old),
        pytest.raises(LookupError, match="takes no kernels="),
    ):
        models.module_of(job, None, None, None)  # type: ignore[arg-type]
