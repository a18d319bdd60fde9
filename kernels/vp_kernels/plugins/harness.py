"""Run TensorRT plugins without TensorRT: create nodes and run them on tensors, as an engine would.

Used by the tests with a fake driver, and by benchmarks/gpu on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Values of nvinfer1::DataType and PluginFieldType.
TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.bfloat16: 7, torch.int64: 8}
DTYPES = {number: dtype for dtype, number in TYPES.items()}
INT32, INT64, FLOAT32 = 5, 10, 1
LINEAR = 0


class PluginError(RuntimeError):
    """A plugin rejected its input."""


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    ]


class Plugins:
    """A plugin library, loaded as TensorRT does.

    Args:
        harness: Path of libvp_plugin_harness.so.
        library: Path of libvp_plugins.so.

    Raises:
        OSError: if the harness is missing or does not load.
        PluginError: if the library does not load.
    """

    def __init__(self, harness: Path, library: Path) -> None:
        self._c = ctypes.CDLL(str(harness))
        for name in ("Error", "Log", "Name", "Version", "Namespace", "Kind", "Field"):
            getattr(self._c, f"harness{name}").restype = ctypes.c_char_p
        for name in ("Create", "Clone", "Serialised"):
            getattr(self._c, f"harness{name}").restype = ctypes.c_void_p
        self._check(self._c.harnessOpen(str(library).encode()))

    def creators(self) -> list[dict[str, Any]]:
        """Name, version, namespace, interface and field names of every creator."""
        found = []
        for index in range(self._c.harnessCount()):
            fields = [self._c.harnessField(index, at).decode() for at in range(self._c.harnessFieldCount(index))]
            parts = {part: getattr(self._c, f"harness{part.capitalize()}")(index).decode() for part in _PARTS}
            found.append({**parts, "fields": fields})
        return found

    def log(self) -> str:
        """Messages logged by plugins since the last call."""
        return str(self._c.harnessLog().decode())

    def create(
        self, op_type: str, fields: dict[str, float], *, kinds: dict[str, int] | None = None, length: int = 1
    ) -> Node:
        """Create a plugin.

        Args:
            fields: Attributes of the ONNX node; integers are passed as int64, others as float32.
            kinds: PluginFieldType of some fields, overriding that.
            length: Number of values per field.

        Raises:
            PluginError: if the creator rejects the fields, with its message.
        """
        values, types = (ctypes.c_int64 * max(1, len(fields)))(), (ctypes.c_int32 * max(1, len(fields)))()
        for index, (name, value) in enumerate(fields.items()):
            types[index] = (kinds or {}).get(name, INT64 if isinstance(value, int) else FLOAT32)
            raw = ctypes.c_float(value) if types[index] == FLOAT32 else ctypes.c_int64(int(value))
            ctypes.memmove(ctypes.byref(values, 8 * index), ctypes.byref(raw), ctypes.sizeof(raw))
        names = (ctypes.c_char_p * max(1, len(fields)))(*(name.encode() for name in fields))
        made = self._c.harnessCreate(op_type.encode(), len(fields), names, types, values, length)
        if not made:
            raise PluginError(self.log().strip() or self._c.harnessError().decode())
        return Node(self, made)

    def _check(self, failed: int) -> None:
        if failed:
            raise PluginError(self.log().strip() or self._c.harnessError().decode())


_PARTS = ("name", "version", "namespace", "kind")


class Node:
    """One plugin instance. Use as a context manager: it is not garbage collected."""

    def __init__(self, plugins: Plugins, pointer: int) -> None:
        self._plugins, self._c, self._pointer = plugins, plugins._c, pointer
        self.memory: tuple[Tensor, ...] = ()  # arguments of the last run

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self._c.harnessDestroy(ctypes.c_void_p(self._pointer))

    def clone(self) -> Node:
        """Clone the plugin."""
        return Node(self._plugins, self._c.harnessClone(ctypes.c_void_p(self._pointer)))

    def serialised(self) -> Node:
        """Serialise and deserialise the plugin, as for a saved engine."""
        return Node(self._plugins, self._c.harnessSerialised(ctypes.c_void_p(self._pointer)))

    def supports(self, position: int, inputs: int, types: Sequence[torch.dtype], layout: int = LINEAR) -> bool:
        """Whether the tensor at a position (inputs, then outputs) may have its type, given those before it."""
        numbers = (ctypes.c_int32 * len(types))(*(TYPES[dtype] for dtype in types))
        made = self._c.harnessSupports(
            ctypes.c_void_p(self._pointer), position, inputs, len(types) - inputs, numbers, layout
        )
        return bool(made)

    def run(self, *inputs: Tensor, stream: int = 0) -> list[Tensor]:
        """Run once, on contiguous tensors of one device.

        Raises:
            PluginError: if the plugin rejects the shapes or fails to run, with its message.
        """
        given = _tensors(inputs)
        found, count = (_Tensor * 4)(), ctypes.c_int32()
        this, check = ctypes.c_void_p(self._pointer), self._plugins._check
        check(self._c.harnessOutputs(this, len(inputs), given, ctypes.byref(count), found))
        device, outputs = inputs[0].device, []
        for each in found[: count.value]:
            outputs.append(torch.empty(list(each.sizes[: each.rank]), dtype=DTYPES[each.type], device=device))
        results, size = _tensors(outputs), ctypes.c_int64()
        check(self._c.harnessConfigure(this, len(inputs), given, len(outputs), results, ctypes.byref(size)))
        workspace = torch.empty(max(size.value, 1), dtype=torch.uint8, device=device)
        self.memory = (*inputs, *outputs, workspace)
        check(
            self._c.harnessRun(
                this, len(inputs), given, len(outputs), results,
                ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(stream),
            )
        )  # fmt: skip
        return outputs


def _tensors(tensors: Sequence[Tensor]) -> Any:
    made = (_Tensor * max(1, len(tensors)))()
    for each, tensor in zip(made, tensors, strict=False):
        assert tensor.is_contiguous()
        each.type, each.rank, each.data = TYPES[tensor.dtype], tensor.ndim, tensor.data_ptr()
        each.sizes[: tensor.ndim] = list(tensor.shape)
    return made
