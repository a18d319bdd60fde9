"""The operators in ONNX: a node of the domain `vp` each, with a function body in standard operators beside it.

Three steps, so that one exported file serves every engine:

1. While torch.onnx.export traces, an operator leaves one node (`function_body.node`, called by each room's `..._node`).
2. `add_functions` gives the finished model the body of every operator that it uses: now it is valid ONNX, and an engine
   that knows functions (ONNX Runtime, TensorRT) runs it, or puts its own kernel in the node's place.
3. `inline` makes the twin in standard operators, for engines that know no functions (OpenVINO).

Every variant that differs in inputs, outputs or structure is an operator type of its own ("MatchMerge",
"MatchMergeSize"): ONNX has overloads of functions for that, but TensorRT looks functions up by their name alone.

Importing this imports neither onnx nor torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vp_kernels.errors import KernelError
from vp_kernels.function_body import DOMAIN, OPSET, VERSION, Body

if TYPE_CHECKING:
    import onnx

PLUGIN_VERSION = "1"  # kVersion of kernels/plugins/src/plugin.hpp; the namespace there is the domain
OLDEST_OPSET = 18  # of a model that gets bodies: the first with axes as inputs of every reduction
_ROOMS: tuple[ModuleType, ...] = tuple(
    import_module(f"vp_kernels.{file.parent.name}.function")
    for file in sorted(Path(__file__).parent.glob("*/function.py"))
)


def function_names() -> list[str]:
    """The operator types that have a body, e.g. "MatchMergeSize"."""
    return list(_rooms())


def add_functions(model: onnx.ModelProto) -> list[str]:
    """Give a model the body of every `vp` operator type that it uses, in place. A second call changes nothing.

    The bodies are in the model's own opset; below 23, attention is written out in them.

    Returns:
        The operator types, sorted.

    Raises:
        KernelError: a node of the domain has a type that is none of ours, or the model's opset is older than 18; the
            model is then as it was.
    """
    used = sorted({each.op_type for each in model.graph.node if each.domain == DOMAIN})
    opset = _opset(model)
    functions = [_function(op_type, opset) for op_type in used]
    present = {function.name for function in model.functions if function.domain == DOMAIN}
    model.functions.extend(function for function in functions if function.name not in present)
    if used:
        _import(model, DOMAIN, VERSION)
    return used


def name_plugins(model: onnx.ModelProto) -> None:
    """Say on every `vp` node which TensorRT plugin it is, in place: its parser never looks at a node's domain."""
    from onnx import helper

    for each in model.graph.node:
        if each.domain == DOMAIN:
            for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", PLUGIN_VERSION)):
                each.attribute.append(helper.make_attribute(name, value))


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """The twin of a model with every `vp` node replaced by its body; the model itself stays as it is.

    What becomes of a node X is called "X/TopK.0", nodes and values alike: profilers and viewers show whose it is.

    Raises:
        KernelError: as for `add_functions`.
    """
    import onnx
    from onnx import inliner

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    # The inliner works on the serialised model: without the weights it is fast, and stays below protobuf's 2 GiB.
    for weight in twin.graph.initializer:
        weight.CopyFrom(onnx.TensorProto(name=weight.name, data_type=weight.data_type, dims=[0]))
    others = [function for function in model.functions if function.domain != DOMAIN]
    del twin.functions[:]
    twin.functions.extend(others)
    scopes: Counter[str] = Counter()
    opset = _opset(model)
    for index, each in enumerate(twin.graph.node):
        if each.domain != DOMAIN:
            continue
        scope = each.name or f"{each.op_type}.{index}"
        scopes[scope] += 1
        # One function a node: so what it holds can bear the node's name.
        function = _function(each.op_type, opset)
        function.name = each.op_type = f"{each.op_type}_{index}"
        _rename(function, scope if scopes[scope] == 1 else f"{scope}.{scopes[scope] - 1}")
        twin.functions.append(function)
    twin = inliner.inline_local_functions(twin)
    for each in twin.graph.node:  # the inliner numbers what it brings in; the scope has made it unique already
        if each.name:
            each.name = _unnumbered(each.name, scopes)
        for names in (each.input, each.output):
            names[:] = [_unnumbered(name, scopes) for name in names]
    for value in twin.graph.value_info:
        value.name = _unnumbered(value.name, scopes)
    del twin.graph.initializer[:]
    twin.graph.initializer.extend(model.graph.initializer)
    kept = [each for each in twin.opset_import if each.domain != DOMAIN]
    del twin.opset_import[:]
    twin.opset_import.extend(kept)
    return twin


def _rooms() -> dict[str, ModuleType]:
    """Every operator type and the module that writes its body (its `TYPES` and `body`)."""
    return {op_type: room for room in _ROOMS for op_type in room.TYPES}


def _function(op_type: str, opset: int) -> onnx.FunctionProto:
    """The body of a type in an opset. A room whose body needs operators of opset 23 has an `explicit_body` as well."""
    rooms = _rooms()
    if op_type not in rooms:
        raise KernelError(f"{DOMAIN}::{op_type}", "the operator type", repr(op_type), f"one of {', '.join(rooms)}")
    if opset < OLDEST_OPSET:
        raise KernelError(f"{DOMAIN}::{op_type}", "the opset", str(opset), f"at least {OLDEST_OPSET}")
    room = rooms[op_type]
    body = room.body if opset >= OPSET else getattr(room, "explicit_body", room.body)
    written: Body = body(op_type)
    return written.function(min(opset, OPSET))


def _opset(model: onnx.ModelProto) -> int:
    """Of the standard domain."""
    return max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=OPSET)


def _import(model: onnx.ModelProto, domain: str, version: int) -> None:
    for each in model.opset_import:
        if each.domain == domain:
            each.version = version
            return
    model.opset_import.add(domain=domain, version=version)


def _rename(function: onnx.FunctionProto, scope: str) -> None:
    """Put "scope/" in front of every name in a body; the inliner takes those of inputs and outputs from the node."""
    outer = {*function.input, *function.output, ""}
    for each in function.node:
        each.name = f"{scope}/{each.name}"
        for names in (each.input, each.output):
            names[:] = [name if name in outer else f"{scope}/{name}" for name in names]


def _unnumbered(name: str, scopes: Mapping[str, int]) -> str:
    found = re.fullmatch(r"(.*)/([^/]+)__\d+", name)
    if found is None:
        return name
    scope = found[1]
    return f"{scope}/{found[2]}" if scope in scopes or re.sub(r"\.\d+$", "", scope) in scopes else name
