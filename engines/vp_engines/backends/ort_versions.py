"""Minimum ONNX Runtime version for a graph, from the graph and from measurements.

`python benchmarks/onnxruntime_versions.py` measures the tables by installing one version after another: each operator
of our graphs by itself, with its types, on the CPU; and whole graphs, comparing logits. Last run on 2026-11-28, with
versions 1.17.1 to 1.32.0; "1.17.1" means that version or an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vp_engines.backends.base import version_tuple

# Required to open a bundle: up to 1.23, a graph given as bytes can name any file on the machine as its weights, and its
# content is read into the model, regardless of the folder we set.
OLDEST = "1.24.1"

# IR version or opset of the standard domain -> oldest version that supports it.
IR_VERSIONS: dict[int, str] = {
    8: "1.17.1",
    9: "1.17.1",
    10: "1.18.0",
    11: "1.23.0",
    12: "1.24.1",
    13: "1.24.1",
}
OPSETS: dict[int, str] = {
    18: "1.17.1",
    19: "1.17.1",
    20: "1.17.1",
    21: "1.18.0",
    22: "1.21.0",
    23: "1.23.0",
    24: "1.24.1",
    25: "1.24.1",
}
# (operator, opset that introduced its current form) -> oldest version with a kernel for it.
OPERATORS: dict[tuple[str, int], str] = {
    ("Abs", 13): "1.17.1",
    ("Add", 14): "1.17.1",
    ("And", 7): "1.17.1",
    ("ArgMax", 13): "1.17.1",
    ("ArgMin", 13): "1.17.1",
    ("Attention", 23): "1.23.0",
    ("Cast", 13): "1.17.1",
    ("Cast", 23): "1.23.0",
    ("CastLike", 15): "1.17.1",
    ("CastLike", 23): "1.23.0",
    ("Clip", 13): "1.17.1",
    ("Concat", 13): "1.17.1",
    ("Constant", 13): "1.17.1",
    ("Constant", 23): "1.23.0",
    ("Div", 14): "1.17.1",
    ("Equal", 13): "1.17.1",
    ("Equal", 19): "1.17.1",
    ("Erf", 13): "1.17.1",
    ("Exp", 13): "1.17.1",
    ("Expand", 13): "1.17.1",
    ("Gather", 13): "1.17.1",
    ("GatherElements", 13): "1.17.1",
    ("GatherND", 13): "1.17.1",
    ("Gelu", 20): "1.17.1",
    ("Gemm", 13): "1.17.1",
    ("Greater", 13): "1.17.1",
    ("GreaterOrEqual", 16): "1.17.1",
    ("IsNaN", 13): "1.17.1",
    ("IsNaN", 20): "1.17.1",
    ("LayerNormalization", 17): "1.17.1",
    ("Less", 13): "1.17.1",
    ("LessOrEqual", 16): "1.17.1",
    ("Log", 13): "1.17.1",
    ("LpNormalization", 22): "1.25.0",
    ("MatMul", 13): "1.17.1",
    ("Max", 13): "1.17.1",
    ("Mod", 13): "1.17.1",
    ("Mul", 14): "1.17.1",
    ("Neg", 13): "1.17.1",
    ("Not", 1): "1.17.1",
    ("OneHot", 11): "1.17.1",
    ("Or", 7): "1.17.1",
    ("Pad", 18): "1.17.1",
    ("Pad", 23): "1.23.0",
    ("Pow", 15): "1.17.1",
    ("Range", 11): "1.17.1",
    ("Reciprocal", 13): "1.17.1",
    ("ReduceMax", 18): "1.17.1",
    ("ReduceMax", 20): "1.17.1",
    ("ReduceMean", 18): "1.17.1",
    ("ReduceMin", 18): "1.17.1",
    ("ReduceMin", 20): "1.17.1",
    ("ReduceSum", 13): "1.17.1",
    ("Relu", 14): "1.17.1",
    ("Reshape", 14): "1.17.1",
    ("Reshape", 23): "1.23.0",
    ("Slice", 13): "1.17.1",
    ("Softmax", 13): "1.17.1",
    ("Split", 18): "1.17.1",
    ("Sqrt", 13): "1.17.1",
    ("Squeeze", 13): "1.17.1",
    ("Squeeze", 23): "1.23.0",
    ("Sub", 14): "1.17.1",
    ("TopK", 11): "1.17.1",
    ("Transpose", 13): "1.17.1",
    ("Transpose", 23): "1.23.0",
    ("Unsqueeze", 13): "1.17.1",
    ("Unsqueeze", 23): "1.23.0",
    ("Where", 16): "1.17.1",
    ("com.microsoft.MultiHeadAttention", 1): "1.17.1",
}


def opset_of(model: Any) -> int:
    """Opset of the standard domain of a ModelProto; 0 if it has none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def operators_of(onnx: Any, model: Any) -> set[tuple[str, int]]:
    """(operator, opset that introduced its form) of every node outside domain `vp`, in functions and subgraphs too.

    ONNX Runtime's own operators are ("com.microsoft.NAME", 1). Operators unknown to the installed onnx get the model's
    opset.
    """
    found = set()
    opsets = [opset_of(model), *(opset_of(function) for function in model.functions)]
    for opset, graph in zip(opsets, (model.graph, *model.functions), strict=True):
        for node in _nodes(graph):
            if node.domain in ("", "ai.onnx"):
                try:
                    since = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain="").since_version
                except onnx.defs.SchemaError:
                    since = opset
                found.add((node.op_type, since))
            elif node.domain != "vp":
                found.add((f"{node.domain}.{node.op_type}", 1))
    return found


def least_version(onnx: Any, model: Any, built_with: str) -> str:
    """Oldest ONNX Runtime known to run a model on the CPU, e.g. "1.23.0".

    Args:
        onnx: The onnx package.
        model: A ModelProto; its weights are not read.
        built_with: A version that has run it; returned if the model uses anything that was not measured.
    """
    newest_ir, newest_opset = max(IR_VERSIONS), max(OPSETS)
    known = [
        IR_VERSIONS[max(model.ir_version, min(IR_VERSIONS))] if model.ir_version <= newest_ir else built_with,
        OPSETS[max(opset_of(model), min(OPSETS))] if opset_of(model) <= newest_opset else built_with,
        *(OPERATORS.get(operator, built_with) for operator in operators_of(onnx, model)),
    ]
    return max(known, key=version_tuple)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)
