"""The operators in ONNX: a node of the domain `vp` each, with a function body in standard operators beside it.

Three steps, so that one exported file serves every engine:

1. While torch.onnx.export traces, an operator leaves one node (`node`, called by the `..._node` of each room).
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
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vp_kernels.errors import KernelError

if TYPE_CHECKING:
    import onnx
    import torch

DOMAIN, VERSION = "vp", 1
PLUGIN_VERSION = "1"  # kVersion of kernels/plugins/src/plugin.hpp; the namespace there is the domain
OPSET = 23  # of the bodies: the first in which Attention is a standard operator
OLDEST_OPSET = 18  # of a model that gets bodies: the first with axes as inputs of every reduction
_ROOMS = ("attention", "gather_norm", "select", "merge_rows", "match_merge", "density_merge")


def node(
    op_type: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[tuple[torch.dtype, Sequence[Any]]],
    **attributes: float,
) -> list[torch.Tensor]:
    """One node of the domain, in a graph that torch.onnx.export traces; what its outputs hold means nothing.

    Args:
        outputs: dtype and shape of each; sizes may be symbolic.
    """
    import torch

    made = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op_type}",
        inputs,
        attributes,
        dtypes=[dtype for dtype, _ in outputs],
        shapes=[shape for _, shape in outputs],
        version=VERSION,
    )
    return list(made)


def variants(operator: str, *suffixes: str) -> list[str]:
    """The operator's name with every choice of the suffixes, in their order: "A", "AY", "AX", "AXY"."""
    return [operator + "".join(parts) for parts in product(*(("", suffix) for suffix in suffixes))]


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
    rooms = [import_module(f"vp_kernels.{room}.function") for room in _ROOMS]
    return {op_type: room for room in rooms for op_type in room.TYPES}


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


class Value:
    """A tensor inside a body. Arithmetic with numbers and other values makes nodes."""

    def __init__(self, body: Body, name: str) -> None:
        self.body, self.name = body, name

    def __add__(self, other: Value | float) -> Value:
        return self.body.Add(self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.body.Sub(self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self.body.Mul(self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self.body.Div(self, other)

    def __rsub__(self, other: float) -> Value:
        return self.body.Sub(other, self)

    def __mod__(self, other: Value | float) -> Value:
        return self.body.Mod(self, other)


class Body:
    """Writes the body of one operator type: `body.TopK(x, [3], axis=-1)` makes a node and returns its (first) output.

    Arguments that are numbers become constants: 2 an int64 [1], [2, 3] an int64 [2], 2.0 a float32 scalar, [2.0] a
    float32 [1]. Counts and positions are int64 [1]. They come from attributes alone, so that every engine computes them
    before it runs: a static size that a body needs is an attribute of the node (`tokens`). ONNX Runtime leaves a Shape
    for the run where the batch is dynamic.

    Args:
        op_type: of the operator.
        inputs: their names.
        attributes: names and types (int or float).
    """

    def __init__(self, op_type: str, inputs: Sequence[str], attributes: Mapping[str, type] | None = None) -> None:
        self.op_type, self.input_names, self.attributes = op_type, list(inputs), dict(attributes or {})
        self.nodes: list[onnx.NodeProto] = []
        self.results: list[tuple[str, Value]] = []
        self._counts: Counter[str] = Counter()
        self._constants: dict[str, Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.nodes_of(op_type, inputs, 1, attributes)[0]

    def nodes_of(self, op_type: str, inputs: Sequence[Any], outputs: int, attributes: Mapping[str, Any]) -> list[Value]:
        """One node; attributes whose value is a `Ref` come from the operator's own."""
        from onnx import helper

        names = [self._value(each).name for each in inputs]
        name = f"{op_type}.{self._counts[op_type]}"
        self._counts[op_type] += 1
        made = [name if index == 0 else f"{name}:{index}" for index in range(outputs)]
        plain = {key: value for key, value in attributes.items() if not isinstance(value, Ref)}
        self.nodes.append(helper.make_node(op_type, names, made, name=name, **plain))
        for key, value in attributes.items():
            if isinstance(value, Ref):
                kind = "FLOAT" if self.attributes[value.attribute] is float else "INT"
                self.nodes[-1].attribute.add(name=key, type=kind, ref_attr_name=value.attribute)
        return [Value(self, each) for each in made]

    def inputs(self) -> list[Value]:
        """The operator's inputs."""
        return [Value(self, name) for name in self.input_names]

    def outputs(self, **results: Value) -> Body:
        """Say what the operator returns, by name."""
        self.results = list(results.items())
        return self

    def function(self, opset: int = OPSET) -> onnx.FunctionProto:
        """The body as ONNX holds it, without nodes that nothing uses: helpers may compute more than a variant needs."""
        from onnx import helper

        used = {value.name for _, value in self.results}
        for index in reversed(range(len(self.nodes))):
            if used.isdisjoint(self.nodes[index].output):
                del self.nodes[index]
            else:
                used.update(self.nodes[index].input)
        for name, value in self.results:  # an Identity for each would stay in the inlined twin
            for each in self.nodes:
                each.input[:] = [name if old == value.name else old for old in each.input]
                each.output[:] = [name if old == value.name else old for old in each.output]
        return helper.make_function(
            DOMAIN,
            self.op_type,
            self.input_names,
            [name for name, _ in self.results],
            self.nodes,
            [helper.make_opsetid("", opset)],
            list(self.attributes),
        )

    def _value(self, given: Any) -> Value:
        """A number as a constant, None as an input left out."""
        if isinstance(given, Value):
            return given
        if given is None:
            return Value(self, "")
        key = repr(given)
        if key not in self._constants:
            many = given if isinstance(given, list) else [given]
            kind = "ints" if isinstance(many[0], int) else "floats" if many is given else "float"
            self._constants[key] = self.Constant(**{f"value_{kind}": many if kind != "float" else given})
        return self._constants[key]

    def _scalar(self, given: Value | int) -> Value:
        """A count as Range wants it."""
        if isinstance(given, Value):
            return self.Squeeze(given)
        key = f"scalar {given}"
        if key not in self._constants:
            self._constants[key] = self.Constant(value_int=given)
        return self._constants[key]

    # What every body needs.

    def attribute(self, name: str) -> Value:
        """An attribute as a tensor: int64 [1], or a float32 scalar."""
        key = f"@{name}"
        if key not in self._constants:
            if self.attributes[name] is float:
                self._constants[key] = self.Constant(value_float=Ref(name))
            else:
                self._constants[key] = self.Reshape(self.Constant(value_int=Ref(name)), 1)
        return self._constants[key]

    def range(self, start: Value | int, stop: Value | int, step: int = 1) -> Value:
        """int64 [n], of static bounds."""
        return self.Range(*(self._scalar(each) for each in (start, stop, step)))

    def slice(self, x: Value, axis: int, start: Value | int, stop: Value | int, step: int = 1) -> Value:
        """x[start:stop:step] along an axis."""
        return self.Slice(x, start, stop, axis, step)

    def float(self, x: Value) -> Value:
        """float32."""
        return self.Cast(x, to=1)

    def rows(self, x: Value, index: Value) -> Value:
        """x [B, N, D] at index [B, K] -> [B, K, D]: one axis of the batch, whole rows."""
        return self.GatherND(x, self.Unsqueeze(index, -1), batch_dims=1)

    def take(self, values: Value, index: Value) -> Value:
        """values [B, N] at index [B, K] -> [B, K]."""
        return self.GatherElements(values, index, axis=1)

    def top(self, values: Value, k: Value) -> tuple[Value, Value]:
        """The k highest of the last axis and where they are, in descending order; ties to the lowest index.

        NaN becomes infinity first: ONNX leaves its rank open, and engines sort by comparisons that it makes void.
        """
        values = self.Where(self.IsNaN(values), float("inf"), values)
        found = self.nodes_of("TopK", (values, k), 2, {"axis": -1, "largest": 1, "sorted": 1})
        return found[0], found[1]

    def ascending(self, index: Value, k: Value) -> Value:
        """The k lowest of [B, n], ascending."""
        return self.nodes_of("TopK", (index, k), 2, {"axis": -1, "largest": 0, "sorted": 1})[0]

    def sum(self, x: Value, axis: int, keep: bool = False) -> Value:
        """Sum along an axis, counted from the front: ONNX Runtime sums an empty axis -1 to something empty."""
        return self.ReduceSum(x, axis, keepdims=int(keep))


class Ref:
    """An attribute of a node inside a body that takes its value from the operator's own attribute."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
