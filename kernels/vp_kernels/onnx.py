"""The operators in ONNX: nodes of domain `vp`, each with a function body in standard operators.

One exported file serves every engine, in three steps:

1. While torch.onnx.export traces, each operator emits one node (`function_body.node`, called by its `..._node`).
2. `add_functions` adds the body of every operator used, which makes the model valid ONNX. An engine that supports
   functions (ONNX Runtime, TensorRT) runs it, or replaces the node by its own kernel.
3. `inline` returns a copy in standard operators, for engines that do not support functions (OpenVINO).

Variants that differ in inputs, outputs or structure have operator types of their own ("MatchMerge", "MatchMergeSize").
ONNX offers function overloads for this, but TensorRT looks functions up by name alone.

Importing this module imports neither onnx nor torch.
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

PLUGIN_VERSION = "1"  # kVersion in kernels/plugins/src/plugin.hpp; the plugin namespace is the domain
OLDEST_OPSET = 18  # the first opset in which every reduction takes its axes as an input
_ROOMS: tuple[ModuleType, ...] = tuple(
    import_module(f"vp_kernels.{file.parent.name}.function")
    for file in sorted(Path(__file__).parent.glob("*/function.py"))
)


def function_names() -> list[str]:
    """Operator types that have a function body, e.g. "MatchMergeSize".

    Examples:
        >>> from vp_kernels import function_names
        >>> "Select" in function_names()
        True
    """
    return list(_rooms())


def add_functions(model: onnx.ModelProto) -> list[str]:
    """Add the body of every `vp` operator type that a model uses, in place. Idempotent.

    Bodies use the model's own opset; below 23 they spell out attention.

    Returns:
        The operator types, sorted.

    Raises:
        KernelError: if a node of the domain has an unknown type, or the opset is below 18; the model is then unchanged.

    Examples:
        >>> from onnx import helper
        >>> from vp_kernels import add_functions
        >>> node = helper.make_node("Select", ["scores"], ["index"], domain="vp", k=2)
        >>> graph = helper.make_graph([node], "g", [], [])
        >>> add_functions(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
        ['Select']
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
    """Name the TensorRT plugin on every `vp` node, in place: TensorRT's parser ignores a node's domain."""
    from onnx import helper

    for each in model.graph.node:
        if each.domain == DOMAIN:
            for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", PLUGIN_VERSION)):
                each.attribute.append(helper.make_attribute(name, value))


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every `vp` node replaced by its body.

    Nodes and values that replace node X are called "X/TopK.0", so that profilers and viewers show where they belong.

    Raises:
        KernelError: as for `add_functions`.

    Examples:
        >>> from onnx import helper
        >>> from vp_kernels import add_functions, inline
        >>> node = helper.make_node("Select", ["scores"], ["index"], domain="vp", k=2)
        >>> graph = helper.make_graph([node], "g", [], [])
        >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
        >>> add_functions(model)
        ['Select']
        >>> "TopK" in {each.op_type for each in inline(model).graph.node}
        True
    """
    import onnx
    from onnx import inliner

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    # The inliner serialises the model: without weights this is fast, and stays below protobuf's 2 GiB.
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
        # One function per node, so that names inside can carry the node's name.
        function = _function(each.op_type, opset)
        function.name = each.op_type = f"{each.op_type}_{index}"
        _rename(function, scope if scopes[scope] == 1 else f"{scope}.{scopes[scope] - 1}")
        twin.functions.append(function)
    twin = inliner.inline_local_functions(twin)
    for each in twin.graph.node:  # drop the inliner's numbers; the scope already makes names unique
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
    """Operator type to the module that defines its body (in `TYPES` and `body`)."""
    return {op_type: room for room in _ROOMS for op_type in room.TYPES}


def _function(op_type: str, opset: int) -> onnx.FunctionProto:
    """Body of an operator type in an opset. Modules whose body needs opset 23 also have an `explicit_body`."""
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
    """Opset of the standard domain."""
    return max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=OPSET)


def _import(model: onnx.ModelProto, domain: str, version: int) -> None:
    for each in model.opset_import:
        if each.domain == domain:
            each.version = version
            return
    model.opset_import.add(domain=domain, version=version)


def _rename(function: onnx.FunctionProto, scope: str) -> None:
    """Prefix every name in a body with "scope/"; the inliner takes names of inputs and outputs from the node."""
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
