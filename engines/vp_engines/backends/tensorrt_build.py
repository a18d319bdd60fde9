"""Build a TensorRT engine from an ONNX file, in a child process (see `tensorrt`)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vp_engines.backends.base import first_line
from vp_engines.errors import BuildError, EngineUnavailableError

MOST_SORTED = 3840  # largest k of TensorRT's TopK
_loaded: set[Path] = set()  # plugin libraries


def select(rtx: bool) -> None:
    """Select the flavour that Polygraphy uses. It reads this once, when its TensorRT backend is imported.

    Raises:
        EngineUnavailableError: if this process already uses the other flavour.
    """
    from polygraphy import config

    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        one, other = ("trt-rtx", "trt") if rtx else ("trt", "trt-rtx")
        raise EngineUnavailableError(
            f"this process already uses engine '{other}', and Polygraphy takes one of the two per process",
            fix=f"load the '{one}' bundle in another process",
        )
    config.USE_TENSORRT_RTX = rtx


def load_plugins(library: Path) -> None:
    """Register the plugins of a library with TensorRT in this process. Idempotent.

    Raises:
        EngineUnavailableError: if TensorRT cannot load the library.
    """
    from polygraphy.mod.trt_importer import lazy_import_trt

    registry = lazy_import_trt().get_plugin_registry()
    if library in _loaded:
        return
    # The registry returns (and owns) a handle, or None if the library does not load.
    if registry.load_library(str(library)) is None:
        raise EngineUnavailableError(
            f"TensorRT cannot load the plugins of {library.name}", fix="build the library for this machine"
        )
    _loaded.add(library)


def in_child(request: dict[str, Any]) -> dict[str, Any]:
    """Run `_build` on `request` in a child process and return its answer.

    Raises:
        BuildError: with the last error line of TensorRT.
    """
    with tempfile.TemporaryDirectory(prefix="vp-trt-") as folder:
        answer = Path(folder, "answer.json")
        # Let the child find our packages wherever this process found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"  # a build must never install packages
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-c",
                "import sys, vp_engines.backends.tensorrt_build as b; b._child(sys.argv[1])",
                str(answer),
            ],
            input=json.dumps(request),
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
        if done.returncode == 0 and answer.is_file():
            result: dict[str, Any] = json.loads(answer.read_text())
            if result["error"]:
                raise BuildError(result["error"])
            return result
    raise BuildError(f"{'TensorRT-RTX' if request['rtx'] else 'TensorRT'} cannot build: {cause(done.stdout)}")


def cause(output: str) -> str:
    """The last error of TensorRT ("[E]"), else of Polygraphy ("[!]"), else the last line of a traceback or crash."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in output.splitlines()]
    for mark in ("[E]", "[!]", ""):
        found = [line for line in lines if line.startswith(mark) and line]
        if found:
            return first_line(found[-1].removeprefix(mark), limit=600)
    return "the process died without a word"


def _child(answer: str) -> None:
    """Entry point of the child: reads a request from standard input, writes the answer to the file `answer`."""
    request = json.loads(sys.stdin.read())
    select(request["rtx"])
    from polygraphy.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        result = {"error": "", **_build(request)}
    except BuildError as error:
        result = {"error": str(error), "notes": []}
    Path(answer).write_text(json.dumps(result))


def _build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse, check, build and save one engine (in the child).

    Raises:
        BuildError: if this version lacks the target, or the number of attentions differs from the model's.
        PolygraphyException: if TensorRT rejects the model; the reasons have been printed.
    """
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        Profile,
        SetDecomposableAttentions,
        network_from_onnx_path,
    )
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    config: dict[str, Any] = {"profiles": [Profile()]}
    for name, (smallest, best, largest) in request["profile"].items():
        config["profiles"][0].add(name, smallest, best, largest)
    if request["rtx"]:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as CreateConfig

        possible = sorted(re.findall(r"SM(\d+)(\d)\b", " ".join(vars(trt.ComputeCapability))), key=_numbers)
        wanted = tuple(request["compute_capability"].split("."))
        if wanted not in possible:
            raise BuildError(
                f"TensorRT-RTX {trt.__version__} cannot build for compute capability {'.'.join(wanted)}",
                expected=f"one of {', '.join('.'.join(pair) for pair in possible)}",
                fix="use another `engine` for this GPU",
            )
        config["compute_capabilities"] = [_numbers(wanted)]
    if request.get("plugins"):
        load_plugins(Path(request["plugins"]))
    network = network_from_onnx_path(request["onnx"], strongly_typed=True)
    _check_attentions(trt, network[1], request["attention_blocks"])
    _check_sorts(trt, network[1])
    _check_plugins(trt, network[1], request.get("plugin_nodes", 0))
    notes = []
    cache = request["timing_cache"]
    if cache:
        notes += _drop_bad_cache(network[0], Path(cache))
        config["load_timing_cache"] = cache
    if request["decomposable"]:
        network = SetDecomposableAttentions(network)()
    builder_config = CreateConfig(**config)(network[0], network[1])
    builder_config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    engine = EngineBytesFromNetwork(network, builder_config, save_timing_cache=cache)()
    Path(request["engine"]).write_bytes(engine)
    return {"version": str(trt.__version__), "notes": notes}


def _numbers(parts: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(part) for part in parts)


def _check_attentions(trt: Any, network: Any, expected: int) -> None:
    """Count the attentions that the parser recognised; each ends in an ATTENTION_OUTPUT layer.

    Raises:
        BuildError: if there are not `expected` (0: do not check).
    """
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)  # absent in TensorRT 10.13
    found = sum(network.get_layer(index).type == kind for index in range(network.num_layers)) if kind else 0
    if expected and found != expected:
        raise BuildError(
            f"TensorRT {trt.__version__} sees {found} attention operators",
            expected=f"{expected}, one for each block that computes it by an operator",
            fix="export with opset 23, which has the Attention operator",
        )


def _check_plugins(trt: Any, network: Any, expected: int) -> None:
    """Count the plugins: a node without a plugin silently becomes its function body.

    Raises:
        BuildError: if there are not `expected`.
    """
    kind = getattr(trt.LayerType, "PLUGIN_V3", None)
    found = sum(network.get_layer(index).type == kind for index in range(network.num_layers))
    if expected and found != expected:
        raise BuildError(
            f"TensorRT {trt.__version__} made plugins of {found} vp nodes",
            expected=str(expected),
            fix="use `kernels=portable`, and report this",
        )


def _check_sorts(trt: Any, network: Any) -> None:
    """Reject a TopK of more values than TensorRT supports, by the name of its node.

    Raises:
        BuildError: if there is one.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.TOPK:
            continue
        layer.__class__ = trt.ITopKLayer
        tokens = int(layer.get_output(0).shape[-1])  # every sort of ours is over the last axis
        if tokens > MOST_SORTED:
            raise BuildError(
                f"{layer.name} sorts {tokens} tokens",
                expected=f"at most {MOST_SORTED}: TensorRT's TopK takes no more",
                fix="drop patches with a static step first, or use another engine",
            )


def _drop_bad_cache(builder: Any, path: Path) -> list[str]:
    """Remove a timing cache that TensorRT cannot read, so that a new one is started; returns notes for the user."""
    from polygraphy import util
    from polygraphy.logger import G_LOGGER

    if not path.exists():
        return []
    config = builder.create_builder_config()
    said = io.StringIO()
    # Newer versions return an empty cache for a bad one; only their log tells.
    with util.LockFile(str(path)), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            try:
                cache = config.create_timing_cache(path.read_bytes())
                good = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
            except (RuntimeError, TypeError, ValueError):
                good = False
        if good and "timing cache" not in said.getvalue().lower():
            return []
        path.unlink()
    return [f"the timing cache {path} was corrupt or of another TensorRT or GPU; it was started afresh"]
