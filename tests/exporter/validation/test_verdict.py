import json
import math
from dataclasses import replace

import pytest

from vp_engines.errors import EXIT_BUDGET_MISSED, EXIT_OK, VpError
from vp_exporter.validation.accuracy import Accuracy, Parity
from vp_exporter.validation.baseline import Baseline
from vp_exporter.validation.intervals import Interval
from vp_exporter.validation.latency import LatencyRow, Timing
from vp_exporter.validation.verdict import Budget, Probe, judge, points


def accuracy(change=-0.4, low=-1.2, agreement=98.0, **changes):
    base = Accuracy(
        images=500,
        skipped=0,
        num_classes=5,
        dense_top1=94.0,
        reduced_top1=94.0 + change,
        dense_top5=None,
        reduced_top5=None,
        top1_difference=Interval(change, low, change + 0.8),
        only_dense_right=4,
        only_reduced_right=2,
        mcnemar_p=0.69,
        agreement=Interval(agreement, agreement - 1.5, agreement + 0.9),
        kl=Interval(0.03, 0.02, 0.04),
        nonfinite_dense=0,
        nonfinite_reduced=0,
    )
    return replace(base, **changes)


UNLABELLED = {"dense_top1": None, "reduced_top1": None, "top1_difference": None, "mcnemar_p": None}


def row(batch=1, speedup=1.5, low=1.45, noise=0.01):
    return LatencyRow(
        batch=batch,
        rounds=100,
        dense=Timing(15, 15, 16, 17, 66),
        reduced=Timing(10, 10, 11, 12, 100),
        speedup=Interval(speedup, low, speedup + 0.05),
        noise=noise,
        mac_ratio=1.6,
        efficiency=speedup / 1.6,
        claim=low > 1 + noise,
    )


def checks(verdict):
    return {check.name: check for check in verdict.checks}


def test_everything_holds():
    verdict = judge(accuracy(), [row(1), row(8, 1.6, 1.55)], Budget(max_drop=2, min_speedup=1.3, min_agreement=96))
    assert (verdict.status, verdict.passed, verdict.exit_code) == ("passed", True, EXIT_OK)
    assert [check.name for check in verdict.checks] == ["finite outputs", "max_drop", "min_agreement", "min_speedup"]
    assert all(check.passed for check in verdict.checks)
    assert all(check.holds_at_interval for check in verdict.checks[1:])
    assert verdict.headline == (
        "Within budget: 1.50× faster at batch 1 and 1.60× faster at batch 8, top-1 −0.40 points "
        "against the dense model on the same engine."
    )
    json.dumps(verdict.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "low", "limit", "passed", "holds"),
    [
        (-0.4, -1.2, 0.5, True, False),
        (-0.4, -1.2, 0.4, True, False),  # the limit is inclusive
        (-0.4, -1.2, 0.39, False, False),
        (-0.4, -1.2, 1.2, True, True),
        (+0.6, -0.2, 0, True, False),
        (+0.6, +0.1, 0, True, True),
        (100 * -1 / 200, -2, 0.5, True, False),
        (100 * (0.1 + 0.2 - 0.3) - 0.3, -2, 0.3, True, False),  # rounding in the last bit
    ],
)
def test_drop_is_judged_on_the_point_estimate(change, low, limit, passed, holds):
    verdict = judge(accuracy(change, low), None, Budget(max_drop=limit))
    check = checks(verdict)["max_drop"]
    assert (check.passed, check.holds_at_interval) == (passed, holds)
    assert check.measured == pytest.approx(-change)
    assert verdict.exit_code == (EXIT_OK if passed else EXIT_BUDGET_MISSED)
    assert ("lower end does not" in check.explanation) == (passed and not holds)
    assert ("lower end holds too" in check.explanation) == (passed and holds)


def test_agreement():
    assert judge(accuracy(), None, Budget(min_agreement=98)).passed
    check = checks(judge(accuracy(), None, Budget(min_agreement=98)))["min_agreement"]
    assert (check.measured, check.holds_at_interval) == (98, False)
    assert judge(accuracy(), None, Budget(min_agreement=98.1)).status == "failed"


@pytest.mark.parametrize(
    ("rows", "limit", "passed"),
    [
        ([row(1), row(8)], 1.5, True),
        ([row(1, 1.49), row(8, 1.9, 1.8)], 1.5, False),  # at every batch size
        ([row(1, 1.5, 1.005)], 1.2, False),  # within the noise
        ([row(1, 1.02, 1.005)], 1, False),
        ([row(1, 1.03, 1.02)], 1, True),
        ([row(1, 0.95, 0.93)], 0.9, True),  # "not slower than" needs no claim
        ([row(1, 0.85, 0.83)], 0.9, False),
    ],
)
def test_speedup(rows, limit, passed):
    verdict = judge(accuracy(), rows, Budget(min_speedup=limit))
    check = checks(verdict)["min_speedup"]
    assert check.passed is passed
    assert check.measured == min(r.speedup.value for r in rows)
    assert verdict.passed is passed


def test_a_failed_headline_names_what_failed():
    verdict = judge(accuracy(), [row(1, 1.02, 0.99)], Budget(max_drop=0.1, min_speedup=1.3))
    assert verdict.headline == (
        "Failed the accuracy budget and the speed budget: no speed difference beyond noise at batch 1, "
        "top-1 −0.40 points against the dense model on the same engine."
    )
    assert "no speed-up beyond noise at batch 1 (noise floor 1.0%)" in checks(verdict)["min_speedup"].explanation
    assert "slower at batch 1 (0.80×)" in judge(accuracy(), [row(1, 0.8, 0.78)], Budget()).headline


@pytest.mark.parametrize(
    ("accuracy_", "rows", "budget", "word"),
    [
        (None, [row()], Budget(max_drop=1), "no images were given"),
        (accuracy(**UNLABELLED), [row()], Budget(max_drop=1), "have no labels"),
        (None, [row()], Budget(min_agreement=90), "no images were given"),
        (accuracy(), None, Budget(min_speedup=1.1), "Latency was not measured"),
        (accuracy(), [], Budget(min_speedup=1.1), "Latency was not measured"),
    ],
)
def test_a_budget_without_its_data_fails(accuracy_, rows, budget, word):
    verdict = judge(accuracy_, rows, budget)
    assert (verdict.status, verdict.exit_code) == ("failed", EXIT_BUDGET_MISSED)
    (failed,) = [check for check in verdict.checks if not check.passed]
    assert failed.measured is None
    assert word in failed.explanation


def test_unvalidated_without_images():
    verdict = judge(None, [row()], Budget(min_speedup=1.2))
    assert (verdict.status, verdict.passed, verdict.exit_code) == ("unvalidated", False, EXIT_OK)
    assert verdict.headline.startswith("Accuracy not validated: 1.50× faster at batch 1")
    nothing = judge(None, None, Budget())
    assert (nothing.status, nothing.headline) == ("unvalidated", "Accuracy not validated: nothing was measured.")


def test_no_budget():
    verdict = judge(accuracy(), [row()], Budget())
    assert (verdict.status, verdict.budget_given, verdict.exit_code) == ("measured", False, EXIT_OK)
    assert not verdict.passed
    assert verdict.headline.startswith("Measured, with no budget to hold")
    unlabelled = judge(accuracy(**UNLABELLED), None, Budget())
    assert unlabelled.status == "measured"
    assert "accuracy itself is unknown" in unlabelled.headline


@pytest.mark.parametrize(
    "changes",
    [
        {"nonfinite_reduced": 1, "nonfinite_images": ("a.jpg",), "kl": None},
        {"nonfinite_dense": 2},
        {"parity": Parity(8, None, None, None, 7, 1)},
    ],
)
def test_nan_fails_with_and_without_a_budget(changes):
    for budget in (Budget(), Budget(max_drop=100, min_agreement=0)):
        verdict = judge(accuracy(**changes), [row()], budget)
        assert (verdict.status, verdict.exit_code) == ("failed", EXIT_BUDGET_MISSED)
        assert checks(verdict)["finite outputs"].measured > 0
        assert "NaN or infinite" in verdict.headline
        assert "faster" not in verdict.headline


SLOWER = replace(row(1, 0.75, 0.72), batch=1)


@pytest.mark.parametrize(
    ("rows", "budget", "status"),
    [
        ([SLOWER], Budget(), "measured"),
        ([SLOWER], Budget(max_drop=2), "measured"),
        ([SLOWER], Budget(min_speedup=0.5, max_drop=2), "measured"),
        ([SLOWER, row(8, 2.0, 1.9)], Budget(max_drop=2), "measured"),  # at any batch size
        ([SLOWER], Budget(min_speedup=1.2), "failed"),
        ([row(1, 1.0, 0.98)], Budget(max_drop=2), "passed"),  # no difference is not a slow-down
        ([row(1)], Budget(max_drop=2), "passed"),
        ([row(1)], Budget(), "measured"),
        ([], Budget(max_drop=2), "passed"),
    ],
)
def test_a_slow_down_is_never_passed(rows, budget, status):
    verdict = judge(accuracy(), rows, budget)
    assert (verdict.status, verdict.passed) == (status, status == "passed")
    assert verdict.exit_code == (EXIT_BUDGET_MISSED if status == "failed" else EXIT_OK)
    assert ("slower at batch 1 (0.75×)" in verdict.headline) == (SLOWER in rows)
    if status == "measured" and not budget.empty:
        assert verdict.headline.startswith("Within budget, but a slow-down: ")


@pytest.mark.parametrize(
    ("dense", "reduced", "words"),
    [
        (0, 8, "from the reduced engine on 8 of 9 timed images, not from the dense engine"),
        (9, 9, "from the reduced engine on 9 of 9 timed images, dense too (9 of 9 timed images)"),
        (1, 0, "from the dense engine on 1 of 9 timed images, not from the reduced engine"),
    ],
)
def test_nan_on_the_clock_fails_without_any_image(dense, reduced, words):
    rows = [row(1), replace(row(8, 2.0, 1.9), nonfinite_dense=dense, nonfinite_reduced=reduced, claim=False)]
    assert [r.outcome for r in rows] == ["faster", "not finite"]
    for budget in (Budget(), Budget(min_speedup=1.1)):
        verdict = judge(None, rows, budget)
        assert (verdict.status, verdict.exit_code) == ("failed", EXIT_BUDGET_MISSED)
        check = checks(verdict)["finite outputs"]
        assert (check.passed, check.measured) == (False, dense + reduced)
        assert words in check.explanation
        assert words in verdict.headline
        assert "faster" not in verdict.headline


def test_an_engine_that_ran_alone_is_checked_too():
    good, bad = (judge(None, None, Budget(), probe=Probe(9, count)) for count in (0, 2))
    assert (good.status, good.exit_code) == ("unvalidated", EXIT_OK)
    assert checks(good)["finite outputs"].explanation == (
        "Every output of the reduced engine is a finite number, on all 9 timed images."
    )
    assert (bad.status, bad.exit_code) == ("failed", EXIT_BUDGET_MISSED)
    assert "from the reduced engine on 2 of 9 timed images." in bad.headline


OTHER = Baseline(kind="bundle", label="b.vpe", own="a.vpe", name="b.vpe", setting="(openvino fp16; a.vpe is ort fp16)")


@pytest.mark.parametrize("budget", [Budget(), Budget(max_drop=1, min_agreement=90), Budget(min_speedup=9)])
def test_another_bundle_is_named_and_dense_is_not(budget):
    verdict = judge(accuracy(), [row()], budget, baseline=OTHER)
    assert " against b.vpe (openvino fp16; a.vpe is ort fp16)." in verdict.headline
    broken = judge(accuracy(nonfinite_dense=1, nonfinite_reduced=2), [row()], budget, baseline=OTHER)
    assert "from a.vpe on 2 of 500 images, b.vpe too (1 of 500 images)" in broken.headline
    for each in (verdict, broken):
        assert "dense" not in json.dumps(each.to_dict())


@pytest.mark.parametrize("field", ["max_drop", "min_speedup", "min_agreement"])
@pytest.mark.parametrize("value", [-1, 1001, math.nan, math.inf, -math.inf, True, "1"])
def test_limits_out_of_range(field, value):
    with pytest.raises(VpError, match=f"`{field}` is .*expected"):
        Budget(**{field: value})


def test_limits_at_the_edge():
    assert Budget(max_drop=0, min_agreement=100, min_speedup=1).empty is False
    assert Budget().empty
    with pytest.raises(VpError, match="min_speedup` is 0"):
        Budget(min_speedup=0)


def test_points():
    assert [points(value) for value in (1.234, -0.5, 0.0, -0.001)] == ["+1.23", "−0.50", "0.00", "0.00"]
