"""Calls of every operator type at sizes built by `make plugins`, as nodes and through Python's launchers.

Does not need pytest: benchmarks/gpu runs them on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests.kernels.test_functions_cases import CASES, Case

SIZES: dict[str, dict[str, int]] = {
    "attention": {},
    "gather_norm": {"width": 192},
    "select": {"width": 192},
    "merge_rows": {"width": 192},
    "match_merge": {"width": 192, "head_dim": 64},
    "density_merge": {"width": 192},
}


@dataclass
class NodeCall:
    """The ONNX node of a call.

    Attributes:
        inputs: Contiguous, as an engine passes them.
        outputs: Dtype and shape of each.
    """

    op_type: str
    inputs: list[Tensor]
    outputs: list[tuple[torch.dtype, list[int]]]
    attributes: dict[str, float]


def calls() -> list[Case]:
    """All calls."""
    return [case for room, cases in CASES.items() for case in cases(**SIZES[room])]


def on(case: Case, device: str) -> Case:
    """The same call with its tensors on a device."""
    move = {name: {key: each.to(device) for key, each in getattr(case, name).items()} for name in ("tensors", "fixed")}
    return Case(case.op_type, case.node, case.operator, move["tensors"], case.settings, move["fixed"], case.note)


def node_of(case: Case) -> NodeCall:
    """The node that torch.onnx.export would write for a call."""
    found: list[NodeCall] = []

    def node(op_type: str, inputs: list[Tensor], outputs: list[Any], **attributes: float) -> list[Tensor]:
        shapes = [(dtype, list(shape)) for dtype, shape in outputs]
        found.append(NodeCall(op_type, [each.contiguous() for each in inputs], shapes, attributes))
        return [torch.empty(0)] * len(outputs)

    room = sys.modules[case.node.__module__]
    real = room.node  # type: ignore[attr-defined]
    room.node = node  # type: ignore[attr-defined]
    try:
        case.node(**case.tensors, **case.fixed, **case.settings)
    finally:
        room.node = real  # type: ignore[attr-defined]
    return found[0]


def launched(case: Case) -> list[Tensor]:
    """Results of Python's launcher of the same kernels."""
    name = case.operator.__name__
    room = "select" if name == "select_fuse" else name
    given = {**case.tensors, **case.fixed, **case.settings}
    if name in ("match_merge", "density_merge"):
        given.setdefault("size", None)
    given = {key: each.contiguous() if isinstance(each, Tensor) else each for key, each in given.items()}
    found = getattr(import_module(f"vp_kernels.{room}.kernel"), f"launch_{name}")(**given)
    return [each for each in ((found,) if isinstance(found, Tensor) else found) if each.numel()]
