"""Options of a deployment, checked before anything starts. Does not need Ray."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vp_engines.errors import EngineUnavailableError, InputError, VpError
from vp_engines.extras import install_hint
from vp_engines.manifest import VARIANT_FOLDERS, Manifest

_WORDS = ("name", "variant", "device")  # text options
PROXIES = ("every", "head")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_ROUTE = re.compile(r"/|(?:/[A-Za-z0-9_.-]+)+")
_ENGINES = "--engines"  # suffix of a model's name: the application that runs its engines


class ServingError(VpError):
    """The cluster cannot serve: a port in use, too few cores, an application that did not start."""


@dataclass(frozen=True)
class RayOptions:
    """Options of a deployed bundle.

    Attributes:
        name: Name of the model in URLs; None for the bundle's.
        variant: "reduced" or "dense".
        device: "cpu" or "cuda"; None for what the bundle was built for.
        replicas: Number of engines, each in a process of its own.
        per_node: Maximum replicas per node; None for as many as fit.
        threads: CPU cores reserved for each replica, and threads that its engine uses; None divides the cores evenly.
        gpus: GPUs reserved for each replica on cuda; may be fractional.
        max_batch: Largest number of images in one run, and in one request.
        wait_ms: Milliseconds that a request may wait for others to form a batch.
        max_queued: Requests that may wait at a front for a replica; further ones are answered with 503.
        retries: Number of times that a request is retried on another replica after its replica died.
        timeout_s: Time limit of a request in seconds.
        fronts: Number of processes that parse requests and forward them to the engines.
        health_s: Seconds between health checks of a replica, which run one image through its engine.
        drain_s: Seconds that requests in progress get at shutdown.

    Raises:
        InputError: if a value is invalid.
    """

    name: str | None = None
    variant: Literal["reduced", "dense"] = "reduced"
    device: Literal["cpu", "cuda"] | None = None
    replicas: int = 2
    per_node: int | None = None
    threads: int | None = None
    gpus: float = 1.0
    max_batch: int = 16
    wait_ms: float = 2.0
    max_queued: int = 256
    retries: int = 3
    timeout_s: float = 60.0
    fronts: int = 2
    health_s: float = 10.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        _one_of("variant", self.variant, tuple(VARIANT_FOLDERS))
        if self.device is not None:
            _one_of("device", self.device, ("cpu", "cuda"))
        for name in ("replicas", "per_node", "threads", "max_batch", "max_queued", "fronts"):
            number = getattr(self, name)
            if number is not None and (type(number) is not int or number < 1):
                raise InputError(f"{name} is {number!r}", expected="a whole number from 1")
        if type(self.retries) is not int or self.retries < 0:
            raise InputError(f"retries is {self.retries!r}", expected="a whole number from 0")
        for name, least in (("wait_ms", 0.0), ("gpus", 1e-3), ("timeout_s", 1e-3), ("health_s", 1e-3), ("drain_s", 0)):
            number = getattr(self, name)
            good = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not good or not least <= number < 1e6:
                raise InputError(f"{name} is {number!r}", expected=f"a number from {least:g}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise InputError(f"gpus is {self.gpus}", expected="a part of one GPU, or a whole number")

    @classmethod
    def of(cls, given: dict[str, Any]) -> RayOptions:
        """Create options from a mapping, as in a Serve config file; `serve run` passes numbers as text.

        Raises:
            InputError: if an option is unknown or a value is invalid.
        """
        if unknown := sorted(set(given) - set(cls.__dataclass_fields__)):
            raise InputError(f"the option {unknown[0]!r}", expected=f"one of {', '.join(cls.__dataclass_fields__)}")
        return cls(**{name: _number(value) if name not in _WORDS else value for name, value in given.items()})

    def mapping(self) -> dict[str, Any]:
        """Convert to plain values that can be sent to other machines."""
        return asdict(self)

    def checked(self, manifest: Manifest) -> str:
        """Check the options against a bundle; returns the model's name.

        Raises:
            InputError: if the name is not valid in a URL, or the engine was not built for the batch size.
        """
        name = self.name if self.name is not None else manifest.name
        if not _NAME.fullmatch(name) or name.endswith(_ENGINES):
            raise InputError(
                f"the model name {name!r}",
                expected="letters, digits and _ . - (at most 100)",
                fix="give another with `name`",
            )
        built = manifest.engine.batch
        if built is not None and not built.min <= self.max_batch <= built.max:
            raise InputError(
                f"max_batch is {self.max_batch}", expected=f"{built.min} to {built.max}, what the engine was built for"
            )
        return name


@dataclass(frozen=True)
class Listen:
    """The cluster, and the address that clients use.

    Attributes:
        address: Address of a running cluster ("auto", "host:6379"); None starts one on this machine and stops it at the
            end.
        host: Interface that the HTTP servers listen on.
        port: Port of the HTTP servers.
        route: Path before /v2; must differ between bundles on one cluster.
        proxies: "every": an HTTP server on every node with a replica; "head": on the head node only.
        start_s: Seconds to wait for all replicas to run.

    Raises:
        InputError: if a value is invalid.
    """

    address: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    route: str = "/"
    proxies: str = "every"
    start_s: float = 600.0

    def __post_init__(self) -> None:
        _one_of("proxies", self.proxies, PROXIES)
        if type(self.port) is not int or not 1 <= self.port <= 65535:
            raise InputError(f"the port is {self.port!r}", expected="1 to 65535")
        if not _ROUTE.fullmatch(self.route):
            raise InputError(f"the route {self.route!r}", expected="a path such as /deit, or /")
        if self.address is not None and not self.address:
            raise InputError("the address is empty", expected="'auto', or HOST:PORT of a cluster's head")
        if not self.start_s > 0:
            raise InputError(f"start_s is {self.start_s}", expected="seconds, more than 0")


def engines_name(model: str) -> str:
    """Name of the application that runs a model's engines."""
    return model + _ENGINES


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on this address.

    Raises:
        ServingError: if the port is in use, or this machine does not have the address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server does: closed connections that linger on the port do not matter.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}",
            expected="a free port",
            fix="choose another with `port`, or another `host`",
        ) from None


def share_cores(cores: Sequence[float], options: RayOptions) -> int:
    """Number of threads of each replica.

    Args:
        cores: CPU cores of each node.

    Returns:
        `options.threads`, or as many as leave room for every replica.

    Raises:
        ServingError: if the nodes have too few cores.
    """
    most = options.per_node or options.replicas

    def fit(threads: int) -> int:
        return sum(min(int(node // threads), most) for node in cores)

    wanted = options.threads
    if wanted is None:
        wanted = max(1, *(int(node) for node in cores), 1)
        while wanted > 1 and fit(wanted) < options.replicas:
            wanted -= 1
    if (room := fit(wanted)) < options.replicas:
        nodes = " and ".join(f"{node:g}" for node in cores) or "no"
        raise ServingError(
            f"{options.replicas} replicas of {wanted} threads on nodes with {nodes} cores",
            expected=f"at most {room} of them",
            fix="take fewer `replicas` or `threads`, or add nodes",
        )
    return wanted


def require_ray() -> Any:
    """Import ray, with Serve.

    Raises:
        EngineUnavailableError: if it is not installed.
    """
    try:
        import ray
        from ray import serve  # noqa: F401
    except ImportError as error:
        missing = error.name or "ray"
        raise EngineUnavailableError(
            f"Ray Serve is not installed ({missing} is missing)", fix=install_hint("ray")
        ) from None
    return ray


def _number(value: Any) -> Any:
    """Convert text to a number if possible; other values are returned for validation to report."""
    for kind in (int, float):
        if isinstance(value, str):
            with suppress(ValueError):
                return kind(value)
    return value


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}", expected=f"one of {', '.join(known)}")
