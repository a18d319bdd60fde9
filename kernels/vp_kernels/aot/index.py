"""What the ahead-of-time builder, its checker and their readers share: format, errors, JSON, grid expressions.

Standard library only, as `aot_ptx` and `aot_check`: a machine that launches the files has neither torch nor triton.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

FORMAT, VERSION = "vp-kernels-aot", 1
INDEX = "index.json"
# Of a variant; with its capability it is a file's name.
VARIANT_NAME = re.compile(r"[A-Za-z0-9_]{1,200}")
# Dynamic and static shared memory that a block may take without cuFuncSetAttribute, on every capability.
FREE_SHARED_BYTES = 48 * 1024
# The two trailing parameters that Triton >= 3.4 gives every entry: its global and its profiler's scratch memory.
HIDDEN = 2
# PTX type and size of each argument type; pointers are "*...".
SCALARS = {"i32": (".u32", 4), "i64": (".u64", 8), "fp32": (".f32", 4)}
POINTER = (".u64", 8)


class AotError(ValueError):
    """Input that the builder or the checker cannot take; one line that says what was found and what was expected."""

    exit_code = 2


class CompileError(AotError):
    """A variant that does not compile, by its name."""

    exit_code = 1


class UnavailableError(AotError):
    """This machine cannot compile: no triton, or not the one that we need."""

    exit_code = 3


def canonical(index: Any) -> bytes:
    """The one way to write an index: the same content is the same bytes."""
    return (json.dumps(index, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def parameter_type(argument: str) -> tuple[str, int]:
    """PTX type and bytes of an argument of a signature ("*bf16", "i32", ...).

    Raises:
        AotError: a type that no launcher outside of Triton should have to know.
    """
    if argument.startswith("*"):
        return POINTER
    if argument not in SCALARS:
        raise AotError(f"an argument of type {argument!r}; expected a pointer or one of {', '.join(SCALARS)}")
    return SCALARS[argument]


def grid_size(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a grid expression: whole numbers, names, + - * //, cdiv, min and max.

    Args:
        sizes: a number for every name in the expression.

    Raises:
        AotError: anything else in it, or a name that has no size.
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
