"""Settings that a search rejects before it reads anything."""

from __future__ import annotations

import pytest

from vp_exporter.errors import SearchError
from vp_exporter.searching.settings import EXCHANGES, METHODS, SCHEDULES, SearchSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no budget is named"),
        ({"target_macs": 0.5, "target_latency": 0.5}, "two budgets"),
        ({"target_macs": 1.0}, "`target_macs` is 1"),
        ({"target_macs": float("nan")}, "`target_macs` is nan"),
        ({"target_latency": 0.5, "method": "tome"}, "`target_latency` is given with `method=tome`"),
        ({"target_macs": 0.5, "method": "best"}, "`method` is 'best'"),
        ({"target_macs": 0.5, "min_tokens": 0}, "`min_tokens` is 0"),
        ({"target_macs": 0.5, "minutes": 0.0}, "`minutes` is 0"),
        ({"target_macs": 0.5, "temperature": float("inf")}, "`temperature` is inf"),
        ({"target_macs": 0.5, "targets": "loss"}, "`targets` is 'loss'"),
        ({"target_macs": 0.5, "strategies": ("genetic",)}, "`rearrange` names 'genetic'"),
        ({"target_macs": 0.5, "tuning": ("sgd",)}, "`tune` names 'sgd'"),
    ],
)
def test_refused(given: dict, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        SearchSettings(**given)


def test_asked_is_json_without_what_is_not_set() -> None:
    asked = SearchSettings(target_macs=0.65).asked()
    assert asked["target_macs"] == 0.65
    assert "target_latency" not in asked
    assert asked["strategies"] == ["greedy", "ppo"]


def test_evaluations_by_default_are_those_of_the_method() -> None:
    found = {method: SearchSettings(method=method, target_macs=0.5).evaluations for method in METHODS}
    assert found.pop("vpruner") == EXCHANGES
    assert set(found.values()) == {SCHEDULES}
    assert SearchSettings(target_macs=0.5, evaluations=7).asked()["evaluations"] == 7
