"""Lower a ReducedViT to ONNX, through torch.export (dynamo)."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from pathlib import Path

import onnx
import torch

from vp_engines.errors import BuildError
from vp_exporter.lowering.program import dynamic_batch, example_images
from vp_exporter.lowering.signature import BATCH, INPUT, signature
from vp_exporter.rewrite.reduced_vit import ReducedViT

# protobuf is limited to 2 GiB; larger weights are written to a file beside the graph.
MAX_INLINE_BYTES = 1_800_000_000
PRODUCER = "vp-export"


def lower_onnx(
    model: ReducedViT, path: Path, *, opset: int = 23, functions: bool = True, plugins: bool = False
) -> Path:
    """Write a prepared model (`ReducedViT.for_export`) as ONNX.

    Args:
        path: File to write; weights of models above 1.8 GB go to `path` + ".data" beside it.
        opset: Opset of the standard domain, 18 or newer. The form "sdpa" is one Attention node from 23 on; function
            bodies of vp operators spell out attention below 23.
        functions: Keep nodes of domain `vp`, each with its function body; False inlines the bodies, for runtimes
            without function support.
        plugins: Keep the nodes, and name on each its TensorRT plugin (docs/plugins.md).

    Returns:
        `path`.

    Raises:
        BuildError: if the graph cannot be written in that opset, fails onnx.checker or shape inference, or lost its
            dynamic batch.
    """
    exported = _export(model, opset)
    _name_nodes(exported.model)
    _strip(exported.model)
    exported.model.producer_name = PRODUCER
    inline = sum(p.numel() * p.element_size() for p in model.parameters()) < MAX_INLINE_BYTES
    with _quiet():
        exported.save(str(path), external_data=not inline)
    if model.kernels == "vp":
        _finish_functions(path, keep=functions or plugins, plugins=plugins)
    check_onnx(path, model)
    return path


def _export(model: ReducedViT, opset: int) -> torch.onnx.ONNXProgram:
    with _quiet():
        # Export the module, not our exported program: otherwise the batch axis loses its name.
        exported = torch.onnx.export(
            model,
            (example_images(model),),
            dynamic_shapes=dynamic_batch(),
            opset_version=opset,
            dynamo=True,
            input_names=[INPUT],
            output_names=[model.output_name],
            optimize=True,
            verbose=False,
        )
    assert exported is not None
    found = exported.model.opset_imports.get("", 0)
    if found != opset:  # the exporter continues if its opset conversion fails
        raise BuildError(
            f"{model.description.name} cannot be written in opset {opset}: torch {torch.__version__} wrote {found}",
            fix="choose another `opset`",
        )
    return exported


def plugin_nodes(path: Path) -> int:
    """Number of nodes in a file that need a plugin."""
    from vp_kernels.onnx import DOMAIN

    return sum(node.domain == DOMAIN for node in onnx.load(str(path), load_external_data=False).graph.node)


def _finish_functions(path: Path, *, keep: bool, plugins: bool) -> None:
    """Add the function bodies of domain `vp`; inline them unless `keep`."""
    from vp_kernels.onnx import add_functions, inline, name_plugins

    model = onnx.load(str(path), load_external_data=False)  # external weights stay in their file
    add_functions(model)
    if plugins:
        name_plugins(model)
    onnx.save(model if keep else inline(model), str(path))


def check_onnx(path: Path, model: ReducedViT) -> None:
    """Check the file against the ONNX specification and the model's signature.

    Raises:
        BuildError: with the message of the checker or of shape inference, or if a batch axis is not dynamic.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)  # full_check includes strict shape inference
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"the ONNX file fails its check: {str(error).splitlines()[0]}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    specs = [spec for group in signature(model) for spec in group]
    for value, spec in zip([*graph.input, *graph.output], specs, strict=True):
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if value.name != spec.name or axes != list(spec.shape):
            raise BuildError(
                f"the ONNX file has {value.name} {axes}",
                expected=f"{spec.name} {list(spec.shape)}",
                fix=f"the axis {BATCH!r} must stay dynamic: report this",
            )


def _name_nodes(model: object) -> None:
    """Name every node after its part of the model: "blocks.3.reduce/TopK.1".

    Profilers and viewers show these names, which separates the cost of a reducer from that of its block.
    """
    counts: Counter[str] = Counter()
    for node in model.graph:  # type: ignore[attr-defined]
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = next((name for name in reversed(scopes[:-1]) if name), "model")  # the last scope is the operator's own
        stem = f"{scope}/{node.op_type}"
        node.name = f"{stem}.{counts[stem]}"
        counts[stem] += 1


def _strip(model: object) -> None:
    """Remove the exporter's debug metadata, which contains paths of this machine."""
    graph = model.graph  # type: ignore[attr-defined]
    model.metadata_props.clear()  # type: ignore[attr-defined]
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in graph.initializers.values():
        # Otherwise the shape of a weight is repeated as value_info. A quantizer stores another weight under that name,
        # and shape inference then fails.
        value.type = value.shape = None


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Silence output and warnings of the exporter that users cannot act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
