"""Launching a Triton kernel the same way from eager torch, torch.compile, AOTInductor and the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The one limit that all operators share: token counts of ViTs up to 448 x 448 at patch 14.
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Config:
    """The compile-time half of a launch: what just-in-time and ahead-of-time builds must agree on.

    Attributes:
        kernel: the @triton.jit function.
        constants: its constexpr arguments.
        num_warps, num_stages: of the compiler.
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
        name: of the variant, unique in its operator: letters, digits and underscores.
        config: as the launcher would choose it.
        signature: type of every argument that is no constexpr, in order: "*bf16", "*i64", "i32", "fp32", ...
        grid: three expressions in the names of `shapes`, e.g. ("B", "cdiv(N, 64)", "1").
        shapes: what the variant takes: a symbol and its allowed values, (low, high) or one number.
        dtype: "fp32", "fp16" or "bf16", of the tokens.
        aligned: arguments (pointers and integers) that the compiler may take to be divisible by 16.
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
        grid: of the launch; entries may be symbolic.
        arguments: of the kernel in order, its constexprs left out.
    """
    kernel = config.kernel
    if _is_jit(kernel):  # the interpreter's stand-in is none, and needs no wrapping
        from torch.library import wrap_triton

        kernel = wrap_triton(kernel)
    kernel[grid](*arguments, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages)


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a kernel is given for an optional tensor that is not there: one element that it never reads.

    Not simply one of the other arguments: Inductor computes a tensor that a kernel is given twice two times.
    """
    return like.new_empty(1, dtype=dtype)


def runs_kernel(x: Tensor) -> bool:
    """Whether an operator on this tensor launches its kernel; elsewhere it runs the torch form."""
    return x.is_cuda


def binary_parts(n: int, parts: int, smallest: int = 16) -> list[int]:
    """Split n into at most `parts` descending powers of two that cover it, each `smallest` or more.

    Triton's tiles are powers of two: 197 keys in one tile are 256 wide, in parts of 128 + 64 + 16 they are 208.
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
    """The least power of two that is at least n and `smallest`."""
    return max(smallest, 1 << max(0, n - 1).bit_length())


def triton_type(dtype: Any) -> str:
    """ "fp32", "fp16" or "bf16" of a torch dtype."""
    return {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(dtype)]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _is_jit(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)


def each_dtype() -> Iterator[str]:
    """The dtypes of every operator's tokens."""
    yield from ("fp32", "fp16", "bf16")
