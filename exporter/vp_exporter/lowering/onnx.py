"""ReducedViT -> ONNX, through torch.export (dynamo)."""

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

# protobuf cannot hold more than 2 GiB; above this the weights go into a file beside the graph.
MAX_INLINE_BYTES = 1_800_000_000
PRODUCER = "vp-export"


def lower_onnx(
    model: ReducedViT, path: Path, *, opset: int = 23, functions: bool = True, plugins: bool = False
) -> Path:
    """Write a prepared model (`ReducedViT.for_export`) as ONNX.

    Args:
        path: the file to write; weights of models above 1.8 GB go to `path` + ".data" beside it.
        opset: of the standard domain, 18 or newer; the form "sdpa" is one Attention node from 23 on. Functions of the
            vp operators write attention out below 23.
        functions: keep the nodes of domain `vp` of a model over the vp operators, each with its function body; False
            writes the twin in standard operators alone, for runtimes that do not know functions.
        plugins: keep the nodes, and say on each which TensorRT plugin it is (docs/plugins.md).

    Returns:
        `path`.

    Raises:
        BuildError: the graph cannot be written in that opset; the result fails onnx.checker or shape inference, or lost
            its dynamic batch.
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
        # From the module and not from our exported program: only so does the batch axis keep its name.
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
    if found != opset:  # the exporter goes on where its conversion to another opset fails
        raise BuildError(
            f"{model.description.name} cannot be written in opset {opset}: torch {torch.__version__} wrote {found}",
            fix="choose another `opset`",
        )
    return exported


def plugin_nodes(path: Path) -> int:
    """How many nodes of a file are for plugins."""
    from vp_kernels.onnx import DOMAIN

    return sum(node.domain == DOMAIN for node in onnx.load(str(path), load_external_data=False).graph.node)


def _finish_functions(path: Path, *, keep: bool, plugins: bool) -> None:
    """Give the nodes of domain `vp` their bodies; without `keep`, put the bodies in their place."""
    from vp_kernels.onnx import add_functions, inline, name_plugins

    model = onnx.load(str(path), load_external_data=False)  # weights in a file beside it stay there
    add_functions(model)
    if plugins:
        name_plugins(model)
    onnx.save(model if keep else inline(model), str(path))


def check_onnx(path: Path, model: ReducedViT) -> None:
    """Hold the file to the ONNX specification and to the model's signature.

    Raises:
        BuildError: what the checker or the shape inference says, or a batch axis that is no longer dynamic.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)  # full: strict shape inference too
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
    """Name every node after the part of the model that it belongs to: "blocks.3.reduce/TopK.1".

    Profilers and viewers show these names: they tell what a reducer costs from what its block costs.
    """
    counts: Counter[str] = Counter()
    for node in model.graph:  # type: ignore[attr-defined]
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = next((name for name in reversed(scopes[:-1]) if name), "model")  # the last one is the operator's own
        stem = f"{scope}/{node.op_type}"
        node.name = f"{stem}.{counts[stem]}"
        counts[stem] += 1


def _strip(model: object) -> None:
    """Drop what the exporter notes for debugging: it holds paths of the exporting machine."""
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
        # Else the file states the shape of a weight a second time, as value_info. A quantizer puts another weight under
        # that name, and shape inference then refuses the model.
        value.type = value.shape = None


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The exporter prints and warns about things that a user of ours cannot act on."""
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
