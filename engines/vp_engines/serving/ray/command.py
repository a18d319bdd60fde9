"""Deploy a bundle and serve until stopped: `vp-serve ray` and `python -m vp_engines.serving.ray`."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vp_engines import errors
from vp_engines.bundle import verify_bundle
from vp_engines.errors import VpError
from vp_engines.manifest import Manifest
from vp_engines.serving.ray import app
from vp_engines.serving.ray.options import (
    Listen,
    RayOptions,
    ServingError,
    check_port,
    engines_name,
    require_ray,
    share_cores,
)

_POLL_S = 0.2
_MARGIN_S = 15.0
_NAMED = re.compile(r"vp_engines\.errors\.(\w+): ([^\n]+)")


def serve_bundle(bundle: Path, options: RayOptions, listen: Listen, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests in progress.

    Args:
        say: Called with one line when all replicas run, and one when it stops.

    Raises:
        VpError: if the bundle cannot be served, Ray is missing, the port is in use, there are too few cores, or
            replicas do not start.
    """
    path = os.path.abspath(bundle)
    manifest = verify_bundle(path).manifest  # report a bad bundle before starting anything
    name = options.checked(manifest)
    options = app.with_device(options, manifest)
    if listen.address is None:
        check_port(listen.host, listen.port)
        options = replace(options, threads=share_cores([os.cpu_count() or 1], options))
        app.open_engine(path, options, manifest.digest()).close()  # likewise an engine that cannot run
    stop = _Stop()
    ray = _connected(listen)
    try:
        stop.listen()  # after Ray, which installs its own SIGTERM handler
        if listen.address is not None:
            _check_free(name)
            options = replace(options, threads=share_cores(_node_cores(ray), options))
            _probe(ray, path, options, manifest.digest())
        _check_gpus(ray, options)
        where = _start(path, manifest, options, listen, stop)
        try:
            if not stop.is_set():
                say(
                    f"serving {name} at {where}/v2/models/{name} ({options.replicas} replicas, {options.threads} "
                    f"threads each, batches up to {options.max_batch}); Ctrl-C stops it"
                )
                stop.wait()
                say(f"stopping {name}: requests under way get up to {options.drain_s:g} s")
        finally:
            _stop_serving(name, alone=listen.address is None)
    finally:
        ray.shutdown()
        stop.forget()


class _Stop(threading.Event):
    """Set by SIGINT and SIGTERM; a second signal interrupts the current call."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.set()


def _connected(listen: Listen) -> Any:
    """Start or join a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    ray = require_ray()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if listen.address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(listen.address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
        what = "start a cluster" if listen.address is None else f"join the cluster at {listen.address!r}"
        raise ServingError(
            f"cannot {what}: {_first_line(error)}",
            expected="the address of a running one's head" if listen.address else "",
            fix="start one with 'ray start --head', or leave `address` out" if listen.address else "see Ray's logs",
        ) from None
    return ray


def _node_cores(ray: Any) -> list[float]:
    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def _check_gpus(ray: Any, options: RayOptions) -> None:
    there, wanted = ray.cluster_resources().get("GPU", 0.0), options.replicas * options.gpus
    if options.device == "cuda" and there < wanted:
        raise ServingError(
            f"{options.replicas} replicas of {options.gpus:g} GPUs on a cluster with {there:g}",
            expected=f"{wanted:g}",
            fix="take fewer `replicas` or a part of a GPU each with `gpus`, or add nodes",
        )


def _check_free(name: str) -> None:
    from ray import serve

    there = serve.status().applications
    if name in there or engines_name(name) in there:
        raise ServingError(f"the cluster serves {name!r} already", fix="give another `name`, or stop that one first")


def _probe(ray: Any, path: str, options: RayOptions, digest: str) -> None:
    """Open and run the engine once in a worker, so that a failure is one line rather than a restart loop.

    Raises:
        VpError: as raised in the worker.
    """
    cuda = options.device == "cuda"
    task = ray.remote(_try).options(
        num_cpus=options.threads or 1, num_gpus=options.gpus if cuda else 0, max_retries=0
    )  # fmt: skip
    try:
        found = ray.get(task.remote(path, options.mapping(), digest), timeout=120)
    except ray.exceptions.GetTimeoutError:
        raise ServingError(
            "no node of the cluster had room for a replica within 120 s", fix="look at 'ray status'"
        ) from None
    except ray.exceptions.RayError as error:
        raise ServingError(f"a node of the cluster failed: {_first_line(error)}", fix="see Ray's logs") from None
    if found is not None:
        raise _named(*found)


def _try(path: str, options: dict[str, Any], digest: str) -> tuple[str, str] | None:
    """In a worker: (class, message) of the error when opening the bundle's engine, None if it runs."""
    try:
        app.open_engine(path, RayOptions(**options), digest).close()
    except VpError as error:
        return type(error).__name__, str(error)
    return None


def _named(kind: str, line: str) -> VpError:
    """Recreate an error of another process with its class, which determines the exit code."""
    found = getattr(errors, kind, VpError)
    error: VpError = found(line)
    return error


def _start(path: str, manifest: Manifest, options: RayOptions, listen: Listen, stop: _Stop) -> str:
    """Deploy and wait until everything runs; returns the URL up to /v2.

    Raises:
        ServingError: if replicas do not start.
        VpError: as raised by the engine.
    """
    from ray import serve

    name = options.checked(manifest)
    host, port = _http(listen)
    try:
        serve.start(
            proxy_location="HeadOnly" if listen.proxies == "head" else "EveryNode",
            # Longer than the front's own limit: only for requests whose front is lost.
            http_options={"host": host, "port": port, "request_timeout_s": options.timeout_s + _MARGIN_S},
        )
        targets = [
            serve.RunTarget(target, app_name, listen.route if app_name == name else None)
            for app_name, target in app.applications(path, manifest, options)
        ]
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait(name, listen, stop)
    except VpError:
        _stop_serving(name, alone=listen.address is None)
        raise
    except Exception as error:
        _stop_serving(name, alone=listen.address is None)
        raise ServingError(f"Ray Serve did not start: {_first_line(error)}", fix="see Ray's logs") from None
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{listen.route.rstrip('/')}"


def _http(listen: Listen) -> tuple[str, int]:
    """Host and port of the HTTP servers; in a cluster that already serves, these cannot be changed."""
    from ray.serve import context

    client = context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        if listen.address is not None:
            check_port(listen.host, listen.port)
        return listen.host, listen.port
    found = client.http_config
    return str(found.host or listen.host), int(found.port)


def _wait(name: str, listen: Listen, stop: _Stop) -> None:
    from ray import serve

    names, deadline = (engines_name(name), name), time.monotonic() + listen.start_s
    while not stop.is_set():
        status = serve.status()
        states = {each: found for each in names if (found := status.applications.get(each)) is not None}
        for state in states.values():
            if state.status == "DEPLOY_FAILED":
                text = "\n".join([state.message, *(row.message for row in state.deployments.values())])
                if said := _NAMED.search(text):
                    raise _named(said[1], said[2])
                raise ServingError(f"the replicas do not start: {' '.join(text.split())[-400:]}", fix="see Ray's logs")
        if len(states) == 2 and all(state.status == "RUNNING" for state in states.values()):
            proxies = list(status.proxies.values())
            if any(proxy == "HEALTHY" for proxy in proxies):
                return
        if time.monotonic() > deadline:
            waiting = ", ".join(f"{each} {state.status.value.lower()}" for each, state in states.items())
            raise ServingError(
                f"not every replica runs after {listen.start_s:g} s ({waiting})",
                fix="look at 'ray status' and 'serve status', or wait longer with `start_s`",
            )
        stop.wait(_POLL_S)


def _stop_serving(name: str, *, alone: bool) -> None:
    """Drain the front first: it still needs the engines for its pending requests."""
    from ray import serve

    there = serve.status().applications
    for each in (name, engines_name(name)):
        if each in there:
            serve.delete(each)
    if alone:
        serve.shutdown()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
