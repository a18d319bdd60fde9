"""Mixed plans: a static drop and a schedule under one budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.exporter.tiny import tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.plan.macs import count_macs
from vp_exporter.reducers import StaticStep
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.schedule.mixed import search_mixed
from vp_exporter.searching.scoring import Scorer

VIT, DESCRIPTION = tiny_vit()
ORDER = np.random.default_rng(1).permutation(DESCRIPTION.patches)


def scorer() -> Scorer:
    images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    return Scorer(VIT, DESCRIPTION, Calibration.of_tensors(images, None, VIT, DESCRIPTION, batch_size=4))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["diffrate", "ppt", "tome+diffrate"])
@pytest.mark.parametrize("drops", [(0, 2, 4), (3,)])
def test_a_mixed_plan_keeps_the_joint_budget(method: str, drops: tuple[int, ...]) -> None:
    judge = scorer()
    found = search_mixed(judge, ORDER, method, 0.65, drops=drops, evaluations=20)
    dense = count_macs(DESCRIPTION).total
    assert count_macs(DESCRIPTION, found.plan).total <= 0.65 * dense
    assert found.plan.method == f"static+{method}"
    assert found.plan.budget == {"target_macs": 0.65, "searched": True}
    assert found.kl <= found.uniform_kl
    assert found.kl == pytest.approx(judge.loss(found.plan, judge.calibration.held))
    assert not any(isinstance(step, StaticStep) for step in found.uniform_plan.steps)
    static = [step for step in found.plan.steps if isinstance(step, StaticStep)]
    for step in static:  # the lowest-ranked patches were dropped
        dropped = DESCRIPTION.patches - len(step.keep)
        assert dropped in drops
        assert set(range(DESCRIPTION.patches)) - set(step.keep) == set(ORDER[-dropped:].tolist())


@pytest.mark.slow
def test_every_size_is_searched_and_the_best_goes_on() -> None:
    found = search_mixed(scorer(), ORDER, "diffrate", 0.65, drops=(0, 2, 4), evaluations=60)
    names = [row["stage"].split(":")[0] for row in found.rows]
    order = list(dict.fromkeys(names))
    assert order == ["diffrate", "static 14 + diffrate", "static 12 + diffrate"]
    last = {name: [row["best"] for row in found.rows if row["stage"].startswith(f"{name}:")][-1] for name in order}
    lowest = min(last, key=lambda name: last[name])
    kept = [len(step.keep) for step in found.plan.steps if isinstance(step, StaticStep)]
    if found.kl < found.uniform_kl:
        assert kept == ([] if lowest == "diffrate" else [int(lowest.split()[1])])


@pytest.mark.slow
def test_it_decides_the_same_twice() -> None:
    first, second = (search_mixed(scorer(), ORDER, "ppt", 0.7, drops=(0, 3), evaluations=32, seed=2) for _ in range(2))
    assert first.plan == second.plan
    assert first.rows == second.rows


def test_what_is_no_order_and_what_does_not_fit_is_said() -> None:
    with pytest.raises(SearchError, match="order"):
        search_mixed(scorer(), ORDER[:-1], "diffrate", 0.65)
    with pytest.raises(SearchError, match="no drop"):
        search_mixed(scorer(), ORDER, "diffrate", 0.9, drops=(8, 100))
    with pytest.raises(SearchError, match="out of reach"):
        search_mixed(scorer(), ORDER, "diffrate", 0.01)
