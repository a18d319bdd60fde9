"""vp-doctor: what works on this machine, and the line that installs what does not. What a bug report pastes.

Uses neither typer nor rich, so that it runs even if those are broken.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import NoReturn

from vp_engines.errors import VpError
from vp_exporter.doctor import Diagnosis, Works, diagnose

LABEL = 20  # width of the first column


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message}; --help lists the options\n")
        sys.exit(VpError.exit_code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit code is 0 even if something does not work on this machine."""
    import vp_engines

    parser = _Parser("vp-doctor", description=(__doc__ or "").partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="Print the result as JSON on stdout.")
    parser.add_argument("--version", action="version", version=f"vp-export {vp_engines.__version__}")
    args = parser.parse_args(arguments)
    if sys.stderr.isatty():
        sys.stderr.write("importing every package ...\n")
    found = diagnose()
    try:
        if args.json:
            print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        else:
            for line in lines(found, max(40, shutil.get_terminal_size((80, 24)).columns)):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # avoids a second error from the flush at exit
    return 0


def lines(found: Diagnosis, width: int) -> Iterator[str]:
    """Lines of text, wrapped to `width` columns between words."""
    yield f"vp-export {found.version}"
    for key, value in found.system.items():
        yield from _entry(key, value, width)
    for gpu in found.gpus or ["none that NVIDIA's driver shows"]:
        yield from _entry("GPU", gpu, width)
    yield ""
    yield f"{'engine':{LABEL}}build  run"
    for name, (build, run) in found.engines.items():
        marks = f"{_mark(build):7}{_mark(run):5}"
        reasons = list(dict.fromkeys(works.why_not for works in (build, run) if not works.ok))
        if not reasons:
            yield f"{name:{LABEL}}{marks}".rstrip()
            continue
        if len(reasons) == 2 or build.ok != run.ok:
            told = (("build", build), ("run", run))
            reasons = [f"{what}: {works.why_not}" for what, works in told if not works.ok]
        yield f"{name:{LABEL}}{marks}".rstrip()
        for reason in reasons:
            yield from _entry("", reason, width)
    yield ""
    yield "command"
    for name, works in found.commands.items():
        yield from _entry(name, "works" if works.ok else f"no: {works.why_not}", width)
    yield ""
    yield "package"
    for package in found.packages:
        if not package.version:
            continue
        text = package.version + (f" ({package.details})" if package.details else "")
        yield from _entry(package.module, text + (f": {package.problem}" if package.problem else ""), width)
    absent = [package.module.split(".")[0] for package in found.packages if not package.version]
    if absent:
        yield from _entry("not installed", ", ".join(absent), width)


def _mark(works: Works) -> str:
    return "yes" if works.ok else "no"


def _entry(label: str, text: str, width: int) -> list[str]:
    # Keep pip commands on one line, to be copied.
    whole = re.sub(r"pip install \S+", lambda found: found[0].replace(" ", "\0"), text)
    rows = textwrap.wrap(
        whole, width, initial_indent=f"{label:{LABEL}}", subsequent_indent=" " * LABEL, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [row.replace("\0", " ") for row in rows] or [label]


def main() -> None:
    """Run as a console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
