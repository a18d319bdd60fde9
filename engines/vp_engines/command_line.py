"""Translate messages for a command line: `max_batch` or `dense=False` become --max-batch and --no-dense.

The library names arguments in its messages. Only commands import this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_CALL = re.compile(r"`vp\.([a-z]+)(?:\(([a-z_]+)=\.\.\.\))?`")
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def in_options(text: str, names: Mapping[str, str] | None = None) -> str:
    """Replace what stands in backticks: `vp.export` by the command's name, an argument by its option.

    Args:
        text: a message of the library.
        names: options that are not named after their argument; "name=VALUE" as a key is for that value alone.

    Examples:
        >>> in_options("`max_batch` is 0; leave out `dense=False`, or give `engine='ort'`")
        '--max-batch is 0; leave out --no-dense, or give --engine ort'
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        special = dict(names or {})
        if value is not None and f"{name}={value}" in special:
            return special[f"{name}={value}"]
        flag = special.get(name, "--" + name.replace("_", "-"))
        if value is None or value == "True":
            return flag
        return flag.replace("--", "--no-", 1) if value == "False" else f"{flag} {value.strip(chr(39))}"

    def command(found: re.Match[str]) -> str:
        return f"vp-{found[1]}" + (f" `{found[2]}`" if found[2] else "")

    return _ARGUMENT.sub(option, _CALL.sub(command, text))
