"""Shared by the builder, the checker and readers of a build: index format, errors, grid expressions.

Standard library only, like `ptx` and `check`: a machine that launches the kernels may have neither torch nor triton.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

FORMAT, VERSION = "vp-kernels-aot", 1
INDEX = "index.json"
# Part of a file's name, with the compute capability.
VARIANT_NAME = re.compile(r"[A-Za-z0-9_]{1,200}")
# Shared memory per block, static and dynamic, that needs no cuFuncSetAttribute on any compute capability.
FREE_SHARED_BYTES = 48 * 1024
# Trailing parameters that Triton >= 3.4 adds to every kernel: global and profiler scratch memory.
HIDDEN = 2
# PTX type and size in bytes of scalar arguments; pointers are "*...".
SCALARS = {"i32": (".u32", 4), "i64": (".u64", 8), "fp32": (".f32", 4)}
POINTER = (".u64", 8)


class AotError(ValueError):
    """Invalid input to the builder or the checker. The message is one line: what was found, what was expected."""

    exit_code = 2


class CompileError(AotError):
    """A variant does not compile."""

    exit_code = 1


class UnavailableError(AotError):
    """Compilation is not possible here: triton is missing or has an unsupported version."""

    exit_code = 3


def canonical(index: Any) -> bytes:
    """Serialise an index; equal content gives equal bytes."""
    return (json.dumps(index, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def parameter_type(argument: str) -> tuple[str, int]:
    """PTX type and size in bytes of an argument type ("*bf16", "i32", ...).

    Raises:
        AotError: if the type is not supported by launchers outside Triton.
    """
    if argument.startswith("*"):
        return POINTER
    if argument not in SCALARS:
        raise AotError(f"an argument of type {argument!r}; expected a pointer or one of {', '.join(SCALARS)}")
    return SCALARS[argument]


def grid_size(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a grid expression of integers, names, + - * //, cdiv, min and max.

    Args:
        sizes: Value of every name in the expression.

    Raises:
        AotError: if the expression holds anything else, or a name without a value.
    """
    try:
        return _value(ast.parse(expression, mode="eval").body, sizes)
    except (SyntaxError, TypeError, ZeroDivisionError, RecursionError, MemoryError, ValueError) as error:
        why = str(error) if isinstance(error, AotError) else "it is no such expression"
        raise AotError(
            f"grid expression {expression!r}: {why}; expected whole numbers, names, + - * //, cdiv, min, max"
        ) from None


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.Name(id=name):
            raise AotError(f"{name} is no symbol of the variant's shapes ({', '.join(sorted(sizes))})")
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, sizes) + _value(right, sizes)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left, sizes) - _value(right, sizes)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, sizes) * _value(right, sizes)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return _value(left, sizes) // _value(right, sizes)
        case ast.Call(func=ast.Name(id="cdiv"), args=[one, other], keywords=[]):
            return -(-_value(one, sizes) // _value(other, sizes))
        case ast.Call(func=ast.Name(id="min"), args=[one, other], keywords=[]):
            return min(_value(one, sizes), _value(other, sizes))
        case ast.Call(func=ast.Name(id="max"), args=[one, other], keywords=[]):
            return max(_value(one, sizes), _value(other, sizes))
    raise AotError(f"{ast.unparse(node)!r} is not allowed")
