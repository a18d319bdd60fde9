"""Requests that are rejected before the model is known."""

from __future__ import annotations

from typing import Any

import pytest

from vp_engines.errors import VpError
from vp_exporter.methods import METHODS, MethodRequest

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "tomme", "r": 3}, r"unknown method 'tomme'; expected one of tome, ppt, evit, .*random, grid, center$"),
    ({"method": "tome"}, r"nothing says how much tome removes; expected exactly one of `r`, `target_macs`, `preset`"),
    ({"method": "tome", "r": 3, "target_macs": 0.5}, r"method tome is given `r` and `target_macs`; expected exactly"),
    ({"method": "tome", "r": 3, "preset": "tome-r13"}, r"tome is given `r` and `preset`; expected exactly one of"),
    ({"method": "bat", "keep_rate": 0.7, "args": {"tokens_out": [1]}},
     r"bat is given `keep_rate` and method argument `tokens_out`; expected exactly one"),
    ({"method": "tome", "keep_rate": 0.5}, r"method tome does not take `keep_rate`; expected only `r`, `schedule`,"),
    ({"method": "evit", "r": 5}, r"method evit does not take `r`; expected only `keep_rate`, `blocks`, `target_macs`, "
     r"`preset`, `proportional_attention`, method argument `tokens_out`, method argument `fuse`"),
    ({"method": "grid", "keep_rate": 0.5, "seed": 1}, r"method grid does not take `seed`"),
    ({"method": "random", "keep_rate": 0.5, "blocks": (3,)}, r"method random does not take `blocks`"),
    ({"method": "ppt", "r": 5, "tau": 0, "schedule": "decreasing"}, r"method ppt does not take `schedule`"),
    ({"method": "tome", "r": 5, "args": {"alpha": 1}}, r"tome does not take method argument `alpha`; expected only"),
    ({"method": "ppt", "r": 50}, r"`method=ppt` has no tau; expected `tau`, .*; tau belongs to a model and a token "
     r"count: preset ppt-deit-s uses 7e-5"),
    ({"method": "ppt", "target_macs": 0.7}, r"`method=ppt` has no tau"),
    ({"method": "ppt", "preset": "ppt-vit-g"}, r"unknown preset 'ppt-vit-g'; expected one of ppt-deit-s \(of every "
     r"method: ppt-deit-s, tome-r13, "),
    ({"method": "tome", "preset": "ppt-deit-s"}, r"preset ppt-deit-s is one of method ppt; expected one of tome-r13; "
     r"`method=ppt`"),
    ({"method": "grid", "preset": "tome-r13"}, r"is one of method tome; expected no preset: grid has none"),
    ({"method": "tome", "preset": "tome-r13", "blocks": (3,)}, r"preset tome-r13 is given with `blocks`; expected the"),
    ({"method": "bat", "preset": "bat-0.7", "args": {"pairs": 1}}, r"given with method argument `pairs`; expected"),
    ({"method": "tome", "r": 0}, r"`r` is 0; expected a whole number from 1, such as 13, or a list"),
    ({"method": "tome", "r": True}, r"`r` is True"),
    ({"method": "tome", "r": 2.5}, r"`r` is 2.5"),
    ({"method": "tome", "r": ()}, r"`r` is \(\)"),
    ({"method": "tome", "r": (3, -1)}, r"`r` is -1"),
    ({"method": "tome", "r": 10**400}, r"`r` is 1000"),
    ({"method": "tome", "r": (3, 4), "schedule": "decreasing"}, r"`schedule` is given with a list of r; expected one"),
    ({"method": "tome", "r": 4, "schedule": "up"}, r"`schedule` is 'up'; expected one of constant, decreasing, incr"),
    ({"method": "tome", "r": 4, "blocks": ()}, r"`blocks` is \[\]; expected ascending 0-based blocks, such as 3,6,9"),
    ({"method": "tome", "r": 4, "blocks": (6, 3)}, r"`blocks` is \[6, 3\]"),
    ({"method": "tome", "r": 4, "blocks": (3, 3)}, r"`blocks` is \[3, 3\]"),
    ({"method": "evit", "keep_rate": 1.0}, r"`keep_rate` is 1.0; expected the share of patch tokens that stay, abo"),
    ({"method": "evit", "keep_rate": float("nan")}, r"`keep_rate` is nan"),
    ({"method": "evit", "target_macs": 65}, r"`target_macs` is 65; expected a share of the dense MACs, above 0 and"),
    ({"method": "evit", "target_macs": 0.0}, r"`target_macs` is 0.0"),
    ({"method": "ppt", "r": 5, "tau": -1e-5}, r"`tau` is -1e-05; expected a finite number, at least 0"),
    ({"method": "ppt", "r": 5, "tau": float("inf")}, r"`tau` is inf"),
    ({"method": "random", "keep_rate": 0.5, "seed": -1}, r"`seed` is -1; expected a whole number, at least 0"),
    ({"method": "diffrate", "args": {"prune_to": [1]}}, r"method argument `merge_to` is missing; expected "
     r"method argument `prune_to` with method argument `merge_to`"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(VpError, match=message) as caught:
        MethodRequest(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_target(name: str) -> None:
    tau = {"tau": 0} if name == "ppt" else {}
    request = MethodRequest(name, target_macs=0.5, **tau)  # type: ignore[arg-type]
    assert request.asked() == {"target_macs": 0.5, **tau}


def test_what_was_asked_is_plain_json() -> None:
    request = MethodRequest("tome", r=(0, 6), blocks=(3, 4), proportional_attention=False)
    assert request.asked() == {"r": [0, 6], "blocks": [3, 4], "proportional_attention": False}
    assert MethodRequest("evit", keep_rate=0.5, args={"fuse": False}).asked() == {
        "keep_rate": 0.5,
        "args": {"fuse": False},
    }
