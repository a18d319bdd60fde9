"""A folder of `python -m vp_kernels.aot` as C++: a table of its kernels, and their cubins beside it.

    python -m vp_kernels.plugins.embed build/kernels --out build/embedded

CMake runs this. The folder is checked against its index first, so that a library never holds half of a build.
Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vp_kernels.aot.check import check_index
from vp_kernels.aot.index import AotError

# Members of vp::Symbols (src/entry.hpp).
SYMBOLS = ("B", "N", "H", "d", "K", "E", "D", "n", "k", "R", "rows")
DTYPES = {"fp32": "kFp32", "fp16": "kFp16", "bf16": "kBf16"}
OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "/"}
FUNCTIONS = {"cdiv": "cdiv", "min": "std::min<std::int64_t>", "max": "std::max<std::int64_t>"}
KINDS = {"fp32": "kFloat", "i32": "kInt32"}
HEAD = """\
// Written by vp_kernels.plugins.embed. Do not edit.
#include "entry.hpp"

#include <algorithm>

namespace vp {
namespace {

std::int64_t cdiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename T, std::size_t n> constexpr Span<T> span(T const (&items)[n]) { return {items, n}; }

"""


def embed(folder: Path) -> tuple[str, str]:
    """Table (C++) and cubins (assembler) of a folder of compiled kernels.

    Raises:
        AotError: if the folder differs from its index, or holds something that the plugins do not support.
    """
    index = check_index(folder)
    source, rows, cubins = [HEAD], [], ['.section .rodata,"a",@progbits\n']
    for number, entry in enumerate(index["entries"]):
        name = f"e{number}"
        label = f"vp_cubin_{number}"
        cubin = (folder / entry["cubin"]["path"]).resolve()
        cubins.append(f'.balign 64\n.hidden {label}\n.global {label}\n{label}: .incbin "{cubin}"\n')
        source += _tables(name, entry)
        shared = entry["shared"]
        rows.append(
            f'    {{"{entry["operator"]}", "{entry["variant"]}", "{entry["kernel"]}", "{entry["entry"]}", '
            f"{entry['sm']}, "
            f"Dtype::{DTYPES[entry['dtype']]}, span({name}Constants), span({name}Shapes), span({name}Parameters), "
            f"{{{', '.join(f'{name}Grid{axis}' for axis in range(3))}}}, {entry['threads']}, {shared['dynamic']}, "
            f"{str(shared['raise_limit']).lower()}, {label}, {entry['cubin']['size']}}},"
        )
    # Assembler symbols must be declared outside namespaces.
    labels = "".join(f"extern unsigned char const vp_cubin_{number}[];\n" for number in range(len(rows)))
    text = "".join(source).replace("namespace vp {\n", f'extern "C" {{\n{labels}}}\n\nnamespace vp {{\n', 1)
    text += "Entry const all[] = {\n" + "\n".join(rows) + "\n};\n\n}  // namespace\n\n"
    text += "Span<Entry> entries() { return span(all); }\n\n}  // namespace vp\n"
    cubins.append('.section .note.GNU-stack,"",@progbits\n')
    return text, "".join(cubins)


def _tables(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Arrays that a table entry points to."""
    where = f"{entry['operator']}/{entry['variant']}"
    # Non-integer constants (a scale) are compiled in and do not distinguish variants.
    constants = {key: int(value) for key, value in entry["constants"].items() if isinstance(value, int)}
    yield _array("Constant", f"{name}Constants", [f'{{"{key}", {value}}}' for key, value in constants.items()])
    ranges = []
    for symbol, size in entry["shapes"].items():
        if symbol not in SYMBOLS:
            raise AotError(f"{where} has a size {symbol}; expected one of {', '.join(SYMBOLS)}")
        low, high = size if isinstance(size, list) else (size, size)
        ranges.append(f'{{&Symbols::{symbol}, "{symbol}", {low}, {high}}}')
    yield _array("Range", f"{name}Shapes", ranges)
    parameters = []
    for each in entry["parameters"]:
        dtype = each["dtype"]
        if each["hidden"]:
            kind = "kHidden"
        elif dtype.startswith("*"):
            kind = "kPointer"
        elif dtype in KINDS:
            kind = KINDS[dtype]
        else:
            raise AotError(f"{where} has a parameter of type {dtype}; expected a pointer or one of {', '.join(KINDS)}")
        parameters.append(f'{{"{each["name"]}", ParameterKind::{kind}, {each["divisible_by"]}}}')
    yield _array("Parameter", f"{name}Parameters", parameters)
    for axis, expression in enumerate(entry["grid"]):
        body = cpp(expression)
        given = "s" if "s." in body else ""
        yield f"std::int64_t {name}Grid{axis}(Symbols const&{' ' * bool(given)}{given}) {{ return {body}; }}\n"


def _array(kind: str, name: str, items: Sequence[str]) -> str:
    return f"{kind} const {name}[] = {{{', '.join(items)}}};\n"


def cpp(expression: str) -> str:
    """Translate a grid expression of the index (docs/aot.md) to C++, with sizes as members of `s`, all positive.

    Raises:
        AotError: if the expression is not one that the index allows.
    """

    def write(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int() as number):
                return str(number)
            case ast.Name(id=name) if name in SYMBOLS:
                return f"s.{name}"
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in OPERATIONS:
                return f"({write(left)} {OPERATIONS[type(operation)]} {write(right)})"
            case ast.Call(func=ast.Name(id=name), args=[one, other], keywords=[]) if name in FUNCTIONS:
                return f"{FUNCTIONS[name]}({write(one)}, {write(other)})"
        raise AotError(f"grid expression {expression!r}: {ast.unparse(node)!r} is not allowed")

    return write(ast.parse(expression, mode="eval").body)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vp_kernels.plugins.embed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="what python -m vp_kernels.aot --out wrote")
    parser.add_argument("--out", type=Path, required=True, help="where kernels.cpp and cubins.S go")
    arguments = parser.parse_args(argv)
    try:
        table, cubins = embed(arguments.folder)
    except AotError as error:
        print(f"vp_kernels.plugins.embed: {error}", file=sys.stderr)
        return error.exit_code
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kernels.cpp").write_text(table)
    (arguments.out / "cubins.S").write_text(cubins)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
