"""Assign an engine's operations to parts of the model.

Nodes of exported graphs are named after their module ("blocks.3.reduce/TopK.1"), and ONNX Runtime and OpenVINO keep the
names except for fused nodes. AOTInductor and TensorRT use names of their own, so the order decides: between two norms
there is an attention or an MLP, before the first one the patch embedding, after the last one the head; operations used
only by reducers (sorting, gathering) are recognised by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from vp_engines.backends.recording import Operation

EMBEDDING, ATTENTION, MLP, NORM = "patch embedding", "attention", "MLP", "norm"
REDUCTION, HEAD, RUNTIME = "token reduction", "head", "runtime"
# RUNTIME is the part of a run outside of any operation.
GROUPS = (EMBEDDING, ATTENTION, MLP, NORM, REDUCTION, HEAD, RUNTIME)

_SCOPE = re.compile(r"(?:^|[^\w.])((?:vit\.)?(?:blocks|embed|head|norm|fc_norm|norm_pre)\b[\w.]*)/")
_BLOCK = re.compile(r"\bblocks\.(\d+)")
_NORM = re.compile(r"layer_?norm|rms_?norm|\bMVN", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|softmax|flash|fmha|\bsdpa|mha", re.IGNORECASE)
_REDUCTION = re.compile(
    r"topk|sort|gather|scatter|one_?hot|arg_?max|arg_?min|index|select_rank|merge|match|\bvp::", re.IGNORECASE
)
_REDUCING = {"statistics", "reduce", "see"}  # "see": name of the statistics in early bundles
_PRODUCT = re.compile(r"FullyConnected|MatMul|Gemm", re.IGNORECASE)
_RESIDUAL = ("Add", "Mul", "Sum", "Subgraph", "Eltwise")


def assign(operations: Sequence[Operation]) -> list[tuple[str, int | None]]:
    """(group, block) of each operation of a run, in execution order; block is None outside the blocks."""
    named = [_of_name(operation) for operation in operations]
    known = sum(group is not None for group, _ in named)
    if known < len(operations) / 2:
        return _by_order(operations)
    found: list[tuple[str, int | None]] = []
    last: tuple[str, int | None] = (EMBEDDING, None)
    for operation, (group, block) in zip(operations, named, strict=True):
        if group is not None:
            last = group, block
        elif _PRODUCT.search(operation.kind) and last[0] in (NORM, REDUCTION):
            # A product named after the addition fused into it; after a norm it is the qkv.
            last = ATTENTION, last[1]
        # Otherwise unnamed, or a residual: counted with the operation before.
        found.append(last)
    return found


def _of_name(operation: Operation) -> tuple[str | None, int | None]:
    """By node name; (None, None) if it has none of ours, or belongs with the operation before."""
    scopes = {match[1].removeprefix("vit.") for match in _SCOPE.finditer(operation.name)}
    found = {_of_scope(scope, operation) for scope in scopes}
    groups = {group for group in found if group is not None}
    if len(groups) != 1:
        if _NORM.search(operation.name) or _NORM.search(operation.kind):
            return NORM, None
        return None, None
    block = _BLOCK.search(operation.name)
    return groups.pop(), int(block[1]) if block else None


def _of_scope(scope: str, operation: Operation) -> str | None:
    parts = scope.split(".")
    last = parts[-1]
    if _REDUCING & set(parts):
        return REDUCTION
    if "norm" in last:
        return NORM
    kind = operation.name.rpartition("/")[2].split(".")[0] or operation.kind
    if kind == "Gather" and parts[0] in ("embed", "blocks"):
        return REDUCTION  # a static step gathers the kept rows
    if parts[0] == "embed":
        return EMBEDDING
    if parts[0] == "head":
        return HEAD
    if "mlp" in parts:
        return MLP
    if "attn" in parts:
        return ATTENTION
    # The block's own nodes: attention, residuals, or sizes of merged tokens as a mask.
    if kind in ("Unsqueeze", "Expand"):
        return REDUCTION
    return None if kind in _RESIDUAL else ATTENTION


def _by_order(operations: Sequence[Operation]) -> list[tuple[str, int | None]]:
    """Without node names: by position between the norms."""
    text = [f"{operation.name} {operation.kind}" for operation in operations]
    norms = [i for i, each in enumerate(text) if _NORM.search(each)]
    found: list[tuple[str, int | None]] = [(EMBEDDING, None)] * len(operations)
    block, visible = -1, any(_ATTENTION.search(each) for each in text)
    for turn, (first, end) in enumerate(pairwise([*norms, len(operations)])):
        inside = range(first + 1, end)
        last = end == len(operations)
        # If the engine hides its attentions, attentions and MLPs alternate.
        attends = not last and (any(_ATTENTION.search(text[i]) for i in inside) if visible else turn % 2 == 0)
        block += attends
        place = None if last else max(block, 0)
        found[first] = NORM, place
        for i in inside:
            if last:
                found[i] = HEAD, None
            elif _REDUCTION.search(text[i]) and not _ATTENTION.search(text[i]):
                found[i] = REDUCTION, place
            else:
                found[i] = (ATTENTION if attends else MLP), place
    return found
