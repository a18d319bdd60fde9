"""Launch a Triton kernel in the same way from eager torch, torch.compile, AOTInductor and the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Limit of all operators: covers ViTs up to 448 x 448 at patch 14.
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Config:
    """Compile-time part of a launch, shared by just-in-time and ahead-of-time builds.

    Attributes:
        kernel: The @triton.jit function.
        constants: Its constexpr arguments.
        num_warps, num_stages: Compiler options.
    """

    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Variant:
    """One ahead-of-time build of a kernel (`vp_kernels.aot`).

    Attributes:
        operator: "attention", ...
        name: Name of the variant, unique in its operator: letters, digits and underscores.
        config: Same as the launcher would choose.
        signature: Type of each non-constexpr argument, in order: "*bf16", "*i64", "i32", "fp32", ...
        grid: Three expressions in the names of `shapes`, e.g. ("B", "cdiv(N, 64)", "1").
        shapes: Supported sizes: symbol to (low, high) or to one number.
        dtype: Of the tokens, "fp32", "fp16" or "bf16".
        aligned: Arguments (pointers and integers) that the compiler may assume divisible by 16.
    """

    operator: str
    name: str
    config: Config
    signature: dict[str, str]
    grid: tuple[str, str, str]
    shapes: dict[str, Any]
    dtype: str
    aligned: tuple[str, ...] = field(default=())


def launch(config: Config, grid: tuple[Any, ...], *arguments: Any) -> None:
    """Run a kernel.

    Args:
        grid: Grid of the launch; entries may be symbolic.
        arguments: Of the kernel in order, without constexprs.
    """
    kernel = config.kernel
    if _is_jit(kernel):  # false for the interpreter's function, which needs no wrapping
        from torch.library import wrap_triton

        kernel = wrap_triton(kernel)
    kernel[grid](*arguments, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages)


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Placeholder for an optional tensor: one element that the kernel never reads.

    A tensor of its own rather than another argument: Inductor computes an argument once for each time it is passed.
    """
    return like.new_empty(1, dtype=dtype)


def runs_kernel(x: Tensor) -> bool:
    """Whether an operator launches its kernel for this tensor; otherwise it runs the torch implementation."""
    return x.is_cuda


def binary_parts(n: int, parts: int, smallest: int = 16) -> list[int]:
    """Split n into at most `parts` descending powers of two, each at least `smallest`, that cover it.

    Triton's tiles are powers of two: 197 keys take 256 as one tile, but 208 as 128 + 64 + 16.
    """
    left = -(-n // smallest) * smallest
    found: list[int] = []
    while left > 0:
        last = len(found) == parts - 1
        part = 1 << (left.bit_length() - 1)
        if last and part < left:
            part *= 2
        found.append(part)
        left -= part
    return found


def next_power_of_two(n: int, smallest: int = 1) -> int:
    """Smallest power of two that is at least n and `smallest`."""
    return max(smallest, 1 << max(0, n - 1).bit_length())


def triton_type(dtype: Any) -> str:
    """ "fp32", "fp16" or "bf16" for a torch dtype."""
    return {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(dtype)]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _is_jit(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)


def each_dtype() -> Iterator[str]:
    """Dtypes that every operator supports for its tokens."""
    yield from ("fp32", "fp16", "bf16")
