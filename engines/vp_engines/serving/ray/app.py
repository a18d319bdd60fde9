"""Ray Serve deployments of a bundle: the engines, and the fronts that handle HTTP requests.

    client -> Serve's HTTP proxy of a node -> Front (parses the request, retries if a replica dies) -> Engines

Ray is only imported inside functions. Replicas load the bundle from its path, so every node must be able to read it;
its digest is checked against that of the deployment.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vp_engines.engine import Engine, load
from vp_engines.errors import BundleCorruptError, VpError
from vp_engines.manifest import Manifest
from vp_engines.serving.ray import protocol
from vp_engines.serving.ray.batching import Batcher
from vp_engines.serving.ray.options import RayOptions, engines_name
from vp_engines.serving.ray.protocol import Model, Refusal, Reply
from vp_engines.version import installed_version

if TYPE_CHECKING:
    import numpy as np

_BACKOFF_S = 0.05  # before the first retry, doubled for each further one
_PROBE_S = 5.0  # how long /v2/health/ready waits for an engine


def open_engine(bundle: str, options: RayOptions, digest: str) -> Engine:
    """Open the engine of a bundle and run it once.

    Raises:
        VpError: if it cannot be loaded or run, or the bundle is not the one that was deployed.
    """
    engine = load(bundle, variant=options.variant, device=options.device, threads=options.threads)
    try:
        if digest and engine.manifest.digest() != digest:
            raise BundleCorruptError(
                f"{bundle} on this node has digest {engine.manifest.digest()[:16]}...",
                expected=f"{digest[:16]}..., the bundle that is being served",
                fix="copy the same bundle to every node, and serve a new one by a new deployment",
            )
        engine.run(_blank(engine))
    except BaseException:
        engine.close()
        raise
    return engine


def _blank(engine: Engine) -> np.ndarray:
    """Smallest batch that the engine supports, all zeros."""
    import numpy as np

    sizes = engine.manifest.engine.batch
    return np.zeros((sizes.min if sizes else 1, *engine.inputs[0].shape[1:]), np.float32)  # type: ignore[arg-type]


class Engines:
    """Deployment of one engine, which batches waiting requests. Each replica is a process."""

    def __init__(self, bundle: str, options: dict[str, Any], digest: str) -> None:
        chosen = RayOptions(**options)
        self._engine = open_engine(bundle, chosen, digest)
        # One thread: runs of one engine share its cores, so concurrent runs gain nothing.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._batcher = Batcher(self._engine.run, chosen.max_batch, chosen.wait_ms / 1000, self._executor)

    async def infer(self, images: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Run float32 [b, 3, H, W]; returns outputs by name, and the size of the batch that ran."""
        return await self._batcher.submit(images)

    async def check_health(self) -> None:
        """Called periodically by Serve, which replaces a replica that raises or does not answer."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._engine.run, _blank(self._engine))

    async def alive(self) -> bool:
        """Returns once a request would be accepted."""
        return True

    def __del__(self) -> None:
        # Serve calls this after the requests in progress are answered.
        if hasattr(self, "_executor"):
            self._executor.shutdown(wait=True)
            self._engine.close()


class Front:
    """Deployment that parses HTTP requests, forwards them to the engines, and retries if a replica dies.

    Args:
        engines: A handle of Engines, or the name of the application that runs them.
    """

    def __init__(self, engines: Any, model: Model, preprocessing: dict[str, Any], options: dict[str, Any]) -> None:
        from vp_engines.manifest import Preprocessing

        self._engines, self._model = engines, model
        self._preprocessing = Preprocessing.model_validate(preprocessing)
        self._options = RayOptions(**options)
        self._images = self._pending = self._repeated = 0
        self._batches = 0.0
        self._retry, self._full = _failures()

    async def __call__(self, request: Any) -> Any:
        """Handle one HTTP request (starlette's Request and Response). Errors are one line of JSON."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        try:
            reply = await self._reply(request)
        except Refusal as error:
            reply = protocol.error_reply(error.status, str(error))
        except ClientDisconnect:  # the client is gone
            reply = protocol.error_reply(400, "the client went away before its request was complete")
        except VpError as error:
            reply = protocol.error_reply(400, _line(error))
        except Exception as error:
            reply = protocol.error_reply(500, f"unexpected {type(error).__name__}: {_line(error)}")
        return Response(reply.body, reply.status, dict(reply.headers))

    async def _reply(self, request: Any) -> Reply:
        model, path = self._model, request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        kind = protocol.route(request.method, path, model)
        if kind == "live":
            return protocol.json_reply({"live": True})
        if kind == "ready":
            return await self._ready()
        if kind == "server":
            return protocol.json_reply(
                {"name": "vp-export", "version": installed_version(), "extensions": ["binary_tensor_data"]}
            )
        if kind == "model":
            return protocol.json_reply(protocol.metadata(model))
        if kind == "stats":
            return protocol.json_reply(self._stats())
        headers = request.headers
        protocol.check_encoding(headers.get("content-encoding"))
        top = protocol.read_top(request.query_params.get("top"))
        body = await _body(request.stream(), headers.get("content-length"), model)
        self._pending += 1
        try:
            # In a thread, so that a large JSON document or photograph does not block other requests.
            if kind == "classify":
                images = await asyncio.to_thread(self._prepared, body)
                outputs, _ = await self._ask(images)
                return protocol.classify_reply(outputs[model.outputs[0].name][0], top, model)
            asked = await asyncio.to_thread(protocol.read_infer, body, headers.get(protocol.JSON_LENGTH), model)
            outputs, ran = await self._ask(asked.images)
            return protocol.infer_reply(asked, outputs, model, batch_size=ran)
        finally:
            self._pending -= 1

    def _prepared(self, body: bytes) -> np.ndarray:
        from vp_engines.preprocess import preprocess

        output = self._model.outputs[0]
        if not self._model.classes and len(output.shape) != 2:
            raise Refusal(400, f"the model gives {output.name!r} of shape {list(output.shape)}", expected="classes")
        if not body:
            raise Refusal(400, "the body is empty", expected="an image file")
        return preprocess([body], self._preprocessing)

    async def _ask(self, images: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Run images on a free replica.

        Raises:
            Refusal: 503, if the queue is full, replicas keep dying, or none answers in time.
        """
        try:
            async with asyncio.timeout(self._options.timeout_s):
                outputs, ran = await self._ask_again(images)
        except TimeoutError:
            raise Refusal(
                503, f"no engine answered within {self._options.timeout_s:g} s", fix="ask again, or serve more replicas"
            ) from None
        self._images += len(images)
        self._batches += len(images) / ran  # these images' share of a batch of `ran`
        return outputs, ran

    async def _ask_again(self, images: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        for attempt in range(self._options.retries + 1):
            if attempt:
                self._repeated += 1
                await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
            try:
                answer: tuple[dict[str, np.ndarray], int] = await self._handle().infer.remote(images)
                return answer
            except self._full:
                raise Refusal(
                    503, "too many requests wait already", expected=f"{self._options.max_queued}", fix="ask again later"
                ) from None
            except self._retry:
                continue
        raise Refusal(503, f"{self._options.retries + 1} replicas died over this request", fix="see Ray's logs")

    async def _ready(self) -> Reply:
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._handle().alive.remote()
        except Exception as error:
            return protocol.error_reply(503, f"no engine is ready: {_line(error) or type(error).__name__}")
        return protocol.json_reply({"ready": True})

    def _stats(self) -> dict[str, Any]:
        """Statistics of this front: images answered, batches that they ran in, requests in progress, retries."""
        return {
            "model_stats": [
                {
                    "name": self._model.name,
                    "version": protocol.VERSION,
                    "inference_count": self._images,
                    "execution_count": round(self._batches, 3),
                    "pending": self._pending,
                    "repeated": self._repeated,
                }
            ]
        }

    def _handle(self) -> Any:
        if isinstance(self._engines, str):
            from ray import serve

            self._engines = serve.get_app_handle(self._engines)
        return self._engines


async def _body(stream: AsyncIterator[bytes], told: str | None, model: Model) -> bytes:
    """Read a request body; raises Refusal before it exceeds the limit."""
    if told is not None and told.isdecimal():
        protocol.check_length(int(told[:20]), model)
    parts, length = [], 0
    async for part in stream:
        length += len(part)
        protocol.check_length(length, model)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _failures() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Ray's exceptions for a dead replica or node, and those for a full queue."""
    from ray import exceptions
    from ray.serve.exceptions import BackPressureError

    # ObjectLostError: the answer was stored on a node that died.
    return (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.WorkerCrashedError), (BackPressureError,)


def engines(bundle: str, options: RayOptions, digest: str = "") -> Any:
    """Application that runs the engines. `digest` of the bundle; "" accepts any."""
    from ray import serve

    cuda = options.device == "cuda"
    # Twice the batch: one running, one gathering. Fronts hold the rest, which therefore survives a dead replica.
    return (
        serve.deployment(Engines)
        .options(
            num_replicas=options.replicas,
            max_ongoing_requests=2 * options.max_batch,
            max_queued_requests=options.max_queued,
            max_replicas_per_node=options.per_node,
            health_check_period_s=options.health_s,
            health_check_timeout_s=max(30.0, 3 * options.health_s),
            graceful_shutdown_timeout_s=options.drain_s,
            graceful_shutdown_wait_loop_s=0.2,
            ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": options.gpus if cuda else 0},
        )
        .bind(bundle, {**options.mapping(), "threads": options.threads or 1}, digest)
    )


def front(answering: Any, manifest: Manifest, options: RayOptions) -> Any:
    """Application that handles HTTP requests; `answering` is `engines(...)`, or the name of its application."""
    from ray import serve

    name = options.checked(manifest)
    model = Model(
        name,
        f"{manifest.engine.name}_{manifest.engine.precision}",
        manifest.inputs[0].spec(),
        tuple(output.spec() for output in manifest.outputs),
        options.max_batch,
        tuple(manifest.classes) if manifest.classes else None,
    )
    return (
        serve.deployment(Front)
        .options(
            num_replicas=options.fronts,
            # Queueing is limited at the engines; this only protects a front from overload.
            max_ongoing_requests=options.max_queued + 2 * options.max_batch * options.replicas,
            graceful_shutdown_timeout_s=options.drain_s,
            graceful_shutdown_wait_loop_s=0.2,
            ray_actor_options={"num_cpus": 0},
        )
        .bind(answering, model, manifest.preprocessing.model_dump(), options.mapping())
    )


def build(args: dict[str, Any]) -> Any:
    """Both deployments as one application, for `serve run vp_engines.serving.ray.app:build` and config files.

    Args:
        args: `bundle`, its path, and any fields of RayOptions.

    Raises:
        VpError: if the bundle or an option cannot be served.
    """
    from vp_engines.bundle import verify_bundle

    given = dict(args)
    bundle = os.path.abspath(given.pop("bundle", ""))
    options = RayOptions.of(given)
    manifest = verify_bundle(bundle).manifest
    options.checked(manifest)
    options = with_device(options, manifest)
    return front(engines(bundle, options, manifest.digest()), manifest, options)


def with_device(options: RayOptions, manifest: Manifest) -> RayOptions:
    """Options with `device` resolved."""
    from dataclasses import replace

    # As in `load`: ONNX Runtime's files run on either device, by default on the CPU.
    built_for = "cpu" if manifest.engine.name == "ort" else manifest.engine.device
    return replace(options, device=options.device or built_for)


def applications(bundle: str, manifest: Manifest, options: RayOptions) -> list[tuple[str, Any]]:
    """(name, application) for the engines and for the front. Separate, so that the front can be drained first."""
    name = options.checked(manifest)
    return [
        (engines_name(name), engines(bundle, options, manifest.digest())),
        (name, front(engines_name(name), manifest, options)),
    ]


def _line(error: BaseException) -> str:
    """Message of an error; of an error from a replica, the message of its cause."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error)
    return " ".join(text.split())[:500]
