"""`python -m vp_engines.serving.ray BUNDLE`: like `vp-serve ray`, without the exporter installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vp_engines.command_line import in_options
from vp_engines.errors import EXIT_OK, VpError
from vp_engines.serving.ray.options import PROXIES, Listen, RayOptions

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a usage error in one line."""
        self.exit(VpError.exit_code, f"error: {message}; --help lists the options\n")


def parser() -> argparse.ArgumentParser:
    """Argument parser; names and defaults are those of RayOptions and Listen."""
    found = _Parser(prog="python -m vp_engines.serving.ray", description="Serve a bundle on Ray Serve.")
    found.add_argument("bundle", type=Path, help="a bundle (NAME.vpe); every node must be able to read it there")
    deployment, listen = found.add_argument_group("deployment"), found.add_argument_group("cluster and address")
    for name, kind, text in (
        ("name", str, "of the model; by default the bundle's"),
        ("variant", str, "reduced or dense"),
        ("device", str, "cpu or cuda; by default what the bundle was built for"),
        ("replicas", int, "engines that run at a time"),
        ("per_node", int, "most of them on one node"),
        ("threads", int, "CPU cores of each; by default the cores shared out"),
        ("gpus", float, "GPUs of each on cuda; 0.5 puts two on one"),
        ("max_batch", int, "images of one run, and of one request"),
        ("wait_ms", float, "milliseconds that a request may wait for others"),
        ("max_queued", int, "requests that may wait for a replica"),
        ("retries", int, "other replicas that a request is given to when one dies"),
        ("timeout_s", float, "seconds that a request may take"),
        ("fronts", int, "processes that read requests"),
        ("health_s", float, "seconds between health checks"),
        ("drain_s", float, "seconds that requests under way get when it stops"),
    ):
        _add(deployment, name, kind, text, getattr(RayOptions, name))
    for name, kind, text in (
        ("address", str, "of a running cluster: auto, or HOST:PORT; by default one of its own"),
        ("host", str, "interface to listen on; 0.0.0.0 for other machines"),
        ("port", int, "to listen on"),
        ("route", str, "path before /v2"),
        ("proxies", str, f"HTTP servers: {' or '.join(PROXIES)}"),
        ("start_s", float, "seconds until all replicas must run"),
    ):
        _add(listen, name, kind, text, getattr(Listen, name))
    return found


def _add(group: argparse._ArgumentGroup, name: str, kind: type, text: str, default: object) -> None:
    said = text if default is None else f"{text} (default {default})"
    group.add_argument(
        f"--{name.replace('_', '-')}", type=kind, default=default, metavar=kind.__name__.upper(), help=said
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped; returns the exit code. Errors are one line on stderr."""
    given = vars(parser().parse_args(arguments))
    try:
        from vp_engines.serving.ray.command import serve_bundle

        options = RayOptions(**{name: given[name] for name in RayOptions.__dataclass_fields__})
        listen = Listen(**{name: given[name] for name in Listen.__dataclass_fields__})
        serve_bundle(given["bundle"], options, listen, lambda line: print(line, flush=True))
    except VpError as error:
        sys.stderr.write(f"error: {in_options(' '.join(str(error).split()))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
