"""Check the TensorRT plugins on a GPU: call `enqueue` directly, and compare with Python's launchers and the operators.

Needs the libraries built by `make plugins` in build/plugins (possibly on another machine), but not TensorRT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import same_bits
from benchmarks.gpu.runs import Row
from benchmarks.gpu.setup import ROOT, fingerprint, first_line

FOLDER = ROOT / "build" / "plugins" / "kernels" / "plugins"
SECONDS = 20.0  # per operator: its kernels are also compiled for Python's launchers


def rows(folder: Path = FOLDER) -> list[Row]:
    """One row per operator."""
    known = fingerprint("kernels/vp_kernels", "tests/kernels/test_functions_cases.py", "tests/kernels/plugins/calls.py")
    from tests.kernels.plugins.calls import SIZES

    def row(room: str) -> Row:
        return Row("plugins", f"plugins {room}", known, SECONDS, lambda: check(room, folder), room)

    return [row(room) for room in SIZES]


def check(room: str, folder: Path) -> dict[str, Any]:
    """Run every call of an operator through its plugin.

    Raises:
        FileNotFoundError: if the libraries are missing.
    """
    from tests.kernels.plugins.calls import SIZES, launched, node_of, on
    from tests.kernels.test_functions_cases import CASES
    from vp_kernels.plugins.harness import PluginError, Plugins

    library = folder / "libvp_plugins.so"
    if not library.is_file():
        raise FileNotFoundError(f"no {library.name} in {folder.name}: run make plugins and carry build/plugins here")
    plugins, failures, done = Plugins(folder / "libvp_plugin_harness.so", library), [], 0
    for each in CASES[room](**SIZES[room]):
        case = on(each, "cuda")
        node = node_of(case)
        try:
            with plugins.create(node.op_type, node.attributes) as made:
                stream = torch.cuda.current_stream().cuda_stream
                found = made.run(*node.inputs, stream=stream)
                torch.cuda.synchronize()
            # The same kernels compiled twice: Python's from source on this machine, the library's ahead of time.
            if not all(same_bits(one, other) for one, other in zip(found, launched(case), strict=True)):
                raise AssertionError("other bits than Python's launcher")
            for one, other in zip(found, case.expected(), strict=True):
                torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4, equal_nan=True, check_dtype=False)
        except (PluginError, AssertionError, RuntimeError) as error:
            failures.append({"call": case.name, "what": first_line(error)})
        done += 1
    return {
        "compared": done, "failed": len(failures), "failures": failures[:10],
        "say": f"{done} nodes, " + (f"FAILED {len(failures)}: {failures[0]}" if failures else "good"),
    }  # fmt: skip
