"""`python -m vp_kernels.aot`: every kernel to PTX and cubin, for any compute capability, on a machine without a GPU.

    python -m vp_kernels.aot --sm 80 --sm 90 --out build/kernels     compile the default set
    python -m vp_kernels.aot --list                                  what there is
    python -m vp_kernels.aot --check build/kernels                   hold a folder to its index (needs no triton)

docs/aot.md says what the folder holds and how to launch from it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection, Container, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vp_kernels.aot.check import check_index
from vp_kernels.aot.index import AotError

if TYPE_CHECKING:
    from vp_kernels.aot.compile import Built
    from vp_kernels.launch import Variant

__all__ = ["check_index", "main"]

DEFAULT_DTYPES = ("fp16", "bf16")
# Head dims (d) and widths (D) of the default set: ViT-Ti, S and B. Applies to variants built for one d or D.
DEFAULT_SIZES = {"d": (64,), "D": (192, 384, 768)}
DTYPES = ("fp32", "fp16", "bf16")
EPILOG = f"""\
Without --match, --dtype and --all the default set is compiled: {" and ".join(DEFAULT_DTYPES)} (fp32 of a kernel
that has nothing else), and where a variant is for one head dimension or one width alone, head dimension 64 and
widths 192, 384 and 768. Any of the three replaces this rule, and then chooses from all. --list counts what each gives.

Exit codes: 0 good, 1 a variant does not compile, 2 bad input (or --check found a difference), 3 no triton here.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AotError(message)


def main(argv: Sequence[str] | None = None, *, rooms: Mapping[str, str] | None = None) -> int:
    """Entry point of `python -m vp_kernels.aot`.

    Args:
        argv: Command-line arguments; defaults to those of the process.
        rooms: Operator name to the module that defines its `variants()`; defaults to those of this package.

    Returns:
        The exit code.
    """
    try:
        return _run(_parser().parse_args(argv), rooms)
    except AotError as error:
        print(f"vp_kernels.aot: {error}".replace("`force=True`", "--force"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("vp_kernels.aot: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m vp_kernels.aot", description=__doc__, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--sm",
        action="append",
        default=[],
        metavar="N",
        help="compute capability, 90 for 9.0; may be repeated",
    )
    add("--operator", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    add(
        "--match",
        action="append",
        default=[],
        metavar="GLOB",
        help="of OPERATOR/VARIANT or VARIANT; may be repeated",
    )
    add("--dtype", action="append", default=[], choices=DTYPES, help="of the tokens; may be repeated")
    add("--all", action="store_true", help="every variant, not the default set")
    add("--out", type=Path, metavar="DIR", help="the folder to write; it must not exist")
    add("--force", action="store_true", help="replace --out, if it is such a folder")
    add("--jobs", type=int, default=0, metavar="N", help="processes that compile (default: one a core, at most 8)")
    add("--list", action="store_true", help="print the chosen variants, compile nothing")
    add("--check", type=Path, metavar="DIR", help="read a folder back and hold it to its index")
    return parser


def _run(arguments: argparse.Namespace, known: Mapping[str, str] | None) -> int:
    if arguments.check is not None:
        index = check_index(arguments.check)
        print(f"{arguments.check}: {len(index['entries'])} kernels, all as the index says")
        return 0
    from vp_kernels.aot.compile import Task, prepare_environment, rooms

    if not arguments.list:
        capabilities = _capabilities(arguments.sm)
        if arguments.out is None:
            raise AotError("--out is missing; expected the folder to write")
        from vp_kernels.aot.build import may_write

        may_write(arguments.out, arguments.force)
    if arguments.jobs < 0:
        raise AotError(f"--jobs is {arguments.jobs}; expected 1 or more")
    prepare_environment()
    chosen = _choose(arguments, rooms() if known is None else known)
    if arguments.list:
        return 0
    from vp_kernels.aot.build import build

    tasks = [Task(module, each.operator, each.name, sm) for module, each in chosen for sm in capabilities]
    jobs = arguments.jobs or min(8, len(os.sched_getaffinity(0)))
    start = time.monotonic()
    build(tasks, arguments.out, jobs=jobs, force=arguments.force, progress=lambda n, built: _say(n, len(tasks), built))
    print(f"{arguments.out}: {len(tasks)} kernels in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _capabilities(asked: Sequence[str]) -> list[int]:
    from vp_kernels.aot.compile import CAPABILITIES

    names = [str(each) for each in CAPABILITIES]
    if not asked:
        raise AotError(f"--sm is missing; expected one or more of {', '.join(names)}")
    for each in asked:
        if each not in names:
            raise AotError(f"--sm is {each!r}; expected one of {', '.join(names)}")
    return sorted({int(each) for each in asked})


def _choose(arguments: argparse.Namespace, known: Mapping[str, str]) -> list[tuple[str, Variant]]:
    """Select the variants that the arguments name, each with its module; reports the count on stderr."""
    from vp_kernels.aot.compile import variants_of

    for each in arguments.operator:
        if each not in known:
            raise AotError(
                f"--operator is {each!r}; expected one of {', '.join(sorted(known)) or 'none: no kernel here'}"
            )
    chosen: list[tuple[str, Variant]] = []
    for operator in sorted(set(arguments.operator) or known):
        variants = variants_of(known[operator], operator)
        ours = default_set(variants.values())
        found = [each for each in variants.values() if _wanted(each, arguments, ours)]
        if arguments.list:
            for each in found:
                print(f"{operator}/{each.name}")
            print(f"{operator}: {len(found)} chosen, {len(ours)} by default, {len(variants)} in all", file=sys.stderr)
        chosen += [(known[operator], each) for each in found]
    if not chosen:
        raise AotError("no variant matches; expected at least one (--list --all prints them all)")
    return chosen


def _wanted(variant: Variant, arguments: argparse.Namespace, ours: Container[str]) -> bool:
    names = (variant.name, f"{variant.operator}/{variant.name}")
    if arguments.match and not any(fnmatchcase(name, glob) for name in names for glob in arguments.match):
        return False
    if arguments.dtype and variant.dtype not in arguments.dtype:
        return False
    return bool(arguments.match or arguments.dtype or arguments.all) or variant.name in ours


def default_set(variants: Collection[Variant]) -> set[str]:
    """Names of the variants of one operator that are compiled by default (see EPILOG)."""
    half = {id(each.config.kernel) for each in variants if each.dtype in DEFAULT_DTYPES}
    chosen: set[str] = set()
    for each in variants:
        fixed = {name: size for name, size in each.shapes.items() if isinstance(size, int)}
        usual = all(fixed.get(name, sizes[0]) in sizes for name, sizes in DEFAULT_SIZES.items())
        if usual and (each.dtype in DEFAULT_DTYPES or id(each.config.kernel) not in half):
            chosen.add(each.name)
    return chosen


def _say(number: int, total: int, built: Built) -> None:
    entry = built.entry
    spills = f", {entry['spill_bytes']} bytes spilled" if entry["spill_bytes"] else ""
    shared = entry["shared"]["static"] + entry["shared"]["dynamic"]
    print(
        f"[{number}/{total}] {built.task}: {built.seconds:.1f} s, {entry['registers']} registers, "
        f"{shared} bytes shared{spills}",
        file=sys.stderr,
        flush=True,
    )
