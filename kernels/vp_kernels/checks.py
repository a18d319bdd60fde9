"""Checks of an operator's arguments, all on the host and before any launch: device, dtype, shape, stride, index range.

They read shapes only (never a tensor's content, except `index_range` outside of tracing), so they cost no
synchronisation and vanish from a traced graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vp_kernels.errors import KernelError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Check:
    """The arguments of one operator, checked one after the other.

    Args:
        operator: its name, for the messages.
        first: the tensor whose device all others must share.
    """

    def __init__(self, operator: str, first: Tensor) -> None:
        self.operator, self.device = operator, first.device
        if first.device.type not in ("cpu", "cuda"):
            self.fail("device", str(first.device), "cpu or cuda")

    def fail(self, argument: str, found: str, expected: str) -> None:
        """Raise the error."""
        raise KernelError(self.operator, argument, found, expected)

    def true(self, condition: object, argument: str, found: str, expected: str) -> None:
        """Any other condition."""
        if not condition:
            self.fail(argument, found, expected)

    def tensor(
        self,
        name: str,
        value: Tensor,
        shape: tuple[int | str | tuple[int, ...] | None, ...],
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        *,
        contiguous: bool = True,
    ) -> None:
        """A tensor's device, dtype, shape and strides.

        Args:
            shape: one entry an axis: its size, several allowed sizes, or a letter for an axis of any size.
            contiguous: True for a contiguous tensor, False for one whose last axis alone has stride 1.
        """
        if value.device != self.device:
            self.fail(f"the device of {name}", str(value.device), f"{self.device}, as of the first tensor")
        if value.dtype not in dtypes:
            self.fail(f"the dtype of {name}", _short(value.dtype), " or ".join(_short(each) for each in dtypes))
        wanted = "[" + ", ".join(_axis(axis) for axis in shape) + "]"
        if value.ndim != len(shape):
            self.fail(f"the shape of {name}", str(list(value.shape)), wanted)
        for size, axis in zip(value.shape, shape, strict=True):
            allowed = axis if isinstance(axis, tuple) else (axis,) if isinstance(axis, int) else None
            if allowed is not None and not any(size == each for each in allowed):
                self.fail(f"the shape of {name}", str(list(value.shape)), wanted)
        if contiguous and not value.is_contiguous():
            self.fail(f"the stride of {name}", str(value.stride()), "a contiguous tensor (call .contiguous())")
        if not contiguous and value.ndim and value.shape[-1] > 1 and value.stride(-1) != 1:
            self.fail(f"the stride of {name}", str(value.stride()), "stride 1 in the last axis")

    def within(self, name: str, value: int, low: int, high: int, why: str = "") -> None:
        """A whole number's range, both ends included."""
        if not low <= value <= high:
            self.fail(name, str(value), f"{low} to {high}" + (f" ({why})" if why else ""))

    def index_range(self, name: str, index: Tensor, size: int) -> None:
        """Every index in 0 .. size - 1.

        Reads the tensor, so on a GPU it waits for it: skipped while tracing, compiling or capturing a CUDA graph, where
        kernels stay inside their tensors by themselves.
        """
        if index.numel() == 0 or torch.compiler.is_compiling() or _symbolic(index):
            return
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        low, high = (int(each) for each in torch.aminmax(index))
        if low < 0 or high >= size:
            self.fail(name, f"{low if low < 0 else high} (in it)", f"0 to {size - 1}")


def _symbolic(value: Tensor) -> bool:
    """Whether a tensor holds no data: traced, or on the meta device."""
    return type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _axis(axis: int | str | tuple[int, ...] | None) -> str:
    return " or ".join(map(str, axis)) if isinstance(axis, tuple) else str(axis)
