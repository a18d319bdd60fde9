"""Argument checks on the host, before any launch: device, dtype, shape, stride, index range.

They read shapes, never a tensor's data (except `index_range` outside tracing), so they do not synchronise and leave no
trace in an exported graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vp_kernels.errors import KernelError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Check:
    """Checks the arguments of one operator.

    Args:
        operator: Name of the operator, for error messages.
        first: Tensor whose device all others must share.
    """

    def __init__(self, operator: str, first: Tensor) -> None:
        self.operator, self.device = operator, first.device
        if first.device.type not in ("cpu", "cuda"):
            self.fail("device", str(first.device), "cpu or cuda")

    def fail(self, argument: str, found: str, expected: str) -> None:
        """Raise the KernelError."""
        raise KernelError(self.operator, argument, found, expected)

    def true(self, condition: object, argument: str, found: str, expected: str) -> None:
        """Check any other condition."""
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
        """Check a tensor's device, dtype, shape and strides.

        Args:
            shape: One entry per axis: its size, a tuple of allowed sizes, or a letter for any size.
            contiguous: Require a contiguous tensor; if False, only the last axis must have stride 1.
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
        """Check that an integer lies in low .. high, inclusive."""
        if not low <= value <= high:
            self.fail(name, str(value), f"{low} to {high}" + (f" ({why})" if why else ""))

    def index_range(self, name: str, index: Tensor, size: int) -> None:
        """Check that every index is in 0 .. size - 1.

        Reads the tensor, which synchronises on a GPU. Skipped while tracing, compiling or capturing a CUDA graph; there
        the kernels do their own bounds checks.
        """
        if index.numel() == 0 or torch.compiler.is_compiling() or _symbolic(index):
            return
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        low, high = (int(each) for each in torch.aminmax(index))
        if low < 0 or high >= size:
            self.fail(name, f"{low if low < 0 else high} (in it)", f"0 to {size - 1}")


def _symbolic(value: Tensor) -> bool:
    """Whether a tensor has no data: traced, or on the meta device."""
    return type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _axis(axis: int | str | tuple[int, ...] | None) -> str:
    return " or ".join(map(str, axis)) if isinstance(axis, tuple) else str(axis)
