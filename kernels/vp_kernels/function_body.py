"""Helpers to emit an operator's ONNX node while tracing, and to write its function body.

Importing this module imports neither onnx nor torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import torch

DOMAIN, VERSION = "vp", 1
OPSET = 23  # of the bodies: the first opset with Attention


def node(
    op_type: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[tuple[torch.dtype, Sequence[Any]]],
    **attributes: float,
) -> list[torch.Tensor]:
    """Emit one node of domain `vp` while torch.onnx.export traces; the values of its outputs are meaningless.

    Args:
        outputs: Dtype and shape of each; sizes may be symbolic.
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
    """The operator's name with every subset of the suffixes, in order: "A", "AY", "AX", "AXY"."""
    return [operator + "".join(parts) for parts in product(*(("", suffix) for suffix in suffixes))]


class Value:
    """Tensor inside a body. Arithmetic with numbers and other values adds nodes."""

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
    """Builds the function body of one operator type.

    `body.TopK(x, [3], axis=-1)` adds a node and returns its first output.

    Numbers become constants: 2 an int64 [1], [2, 3] an int64 [2], 2.0 a float32 scalar, [2.0] a float32 [1]. Counts and
    positions are int64 [1]. They come from attributes alone (a static size is an attribute of the node, e.g. `tokens`),
    so that every engine can fold them; ONNX Runtime does not fold a Shape if the batch is dynamic.

    Args:
        op_type: Operator type.
        inputs: Names of the inputs.
        attributes: Names and types (int or float).
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
        """Add one node; attributes given as `Ref` refer to attributes of the operator."""
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
        """Inputs of the operator."""
        return [Value(self, name) for name in self.input_names]

    def outputs(self, **results: Value) -> Body:
        """Set the outputs of the operator, by name."""
        self.results = list(results.items())
        return self

    def function(self, opset: int = OPSET) -> onnx.FunctionProto:
        """The body as a FunctionProto, without unused nodes: helpers may compute more than a variant needs."""
        from onnx import helper

        used = {value.name for _, value in self.results}
        for index in reversed(range(len(self.nodes))):
            if used.isdisjoint(self.nodes[index].output):
                del self.nodes[index]
            else:
                used.update(self.nodes[index].input)
        for name, value in self.results:  # avoids Identity nodes, which would remain in the inlined model
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
        """Convert numbers to constants, and None to an omitted input."""
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
        """Convert a count to the scalar that Range takes."""
        if isinstance(given, Value):
            return self.Squeeze(given)
        key = f"scalar {given}"
        if key not in self._constants:
            self._constants[key] = self.Constant(value_int=given)
        return self._constants[key]

    # Common helpers.

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
        """int64 [n] from static bounds."""
        return self.Range(*(self._scalar(each) for each in (start, stop, step)))

    def slice(self, x: Value, axis: int, start: Value | int, stop: Value | int, step: int = 1) -> Value:
        """x[start:stop:step] along an axis."""
        return self.Slice(x, start, stop, axis, step)

    def float(self, x: Value) -> Value:
        """Cast to float32."""
        return self.Cast(x, to=1)

    def rows(self, x: Value, index: Value) -> Value:
        """Gather rows of x [B, N, D] at index [B, K] per image: [B, K, D]."""
        return self.GatherND(x, self.Unsqueeze(index, -1), batch_dims=1)

    def take(self, values: Value, index: Value) -> Value:
        """Gather values [B, N] at index [B, K]: [B, K]."""
        return self.GatherElements(values, index, axis=1)

    def top(self, values: Value, k: Value) -> tuple[Value, Value]:
        """The k highest values of the last axis and their indices, in descending order; ties to the lowest index.

        NaN is replaced by infinity: ONNX does not define its rank, and comparisons with NaN break the engines' sorts.
        """
        values = self.Where(self.IsNaN(values), float("inf"), values)
        found = self.nodes_of("TopK", (values, k), 2, {"axis": -1, "largest": 1, "sorted": 1})
        return found[0], found[1]

    def ascending(self, index: Value, k: Value) -> Value:
        """The k lowest of [B, n], ascending."""
        return self.nodes_of("TopK", (index, k), 2, {"axis": -1, "largest": 0, "sorted": 1})[0]

    def sum(self, x: Value, axis: int, keep: bool = False) -> Value:
        """Sum along a non-negative axis (ONNX Runtime returns an empty tensor for an empty axis -1)."""
        return self.ReduceSum(x, axis, keepdims=int(keep))


class Ref:
    """Attribute of a node inside a body that refers to an attribute of the operator."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
