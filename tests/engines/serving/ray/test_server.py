"""A bundle on a real Ray cluster of two nodes: results, batching, killed replicas, invalid requests, shutdown."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client
from PIL import Image
from tritonclient.utils import InferenceServerException

import vp_engines
from tests.embedding import blocks, words
from tests.engines.serving.ray.server import PYTHON, Cluster, Server, cluster, command, serving
from tests.engines.serving.triton.samples import answers, write_linear
from tests.ports import free_ports
from tests.waiting import LONG, until

pytestmark = [pytest.mark.slow, pytest.mark.built]
CLIENTS = 32
ENGINES = "linear--engines"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def bundle(work: Path) -> Path:
    return write_linear(work / "linear.vpe")


@pytest.fixture(scope="module")
def nodes(work: Path) -> Iterator[Cluster]:
    with cluster(work) as found:
        yield found


@pytest.fixture(scope="module")
def server(bundle: Path, nodes: Cluster, work: Path) -> Iterator[Server]:
    (port,) = free_ports()
    # Waits 100 ms for further requests, so that requests are pending in a replica whenever it is killed.
    options = ("--per-node", "1", "--health-s", "2", "--wait-ms", "100")
    with serving(bundle, nodes, work, port, *options) as found:
        yield found


class Client:
    """The protocol's own client, unmodified."""

    def __init__(self, server: Server) -> None:
        self.client = http_client.InferenceServerClient(server.http, connection_timeout=LONG, network_timeout=LONG)

    def ask(
        self, array: np.ndarray, name: str = "images", model: str = "linear", binary: bool = True, **given: Any
    ) -> tuple[np.ndarray, int]:
        """Logits, and the number of images that ran together."""
        dtype = {"float32": "FP32", "float64": "FP64"}[str(array.dtype)]
        tensor = http_client.InferInput(name, list(array.shape), dtype)
        tensor.set_data_from_numpy(array, binary_data=binary)
        wanted = None if binary else [http_client.InferRequestedOutput("logits", binary_data=False)]
        found = self.client.infer(model, [tensor], outputs=wanted, **given)
        return found.as_numpy("logits"), found.get_response()["parameters"]["batch_size"]


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 4, 4)).astype(np.float32)


def plain(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON document of a request made without a client library."""
    request = urllib.request.Request(f"http://{server.http}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=LONG) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def stats(server: Server, model: str = "linear") -> dict[str, Any]:
    (row,) = plain(server, f"/v2/models/{model}/stats")[1]["model_stats"]
    return dict(row)


def check_still_answers(server: Server) -> None:
    images = some_images(2)
    np.testing.assert_allclose(Client(server).ask(images)[0], answers(images), rtol=1e-5, atol=1e-4)


def test_one_replica_a_node(server: Server, nodes: Cluster) -> None:
    assert len(set(nodes.replicas(ENGINES).values())) == 2


@pytest.mark.parametrize("binary", [True, False])
def test_same_answers_as_a_direct_run(server: Server, bundle: Path, binary: bool) -> None:
    images = some_images(3)
    with vp_engines.load(bundle) as engine:
        direct = engine.run(images)["logits"]
    np.testing.assert_allclose(Client(server).ask(images, binary=binary)[0], direct, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(direct, answers(images), rtol=1e-5, atol=1e-4)


def test_health_and_metadata(server: Server) -> None:
    client = Client(server).client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert not client.is_model_ready("other")
    found = client.get_model_metadata("linear")
    assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 4, 4]}]


def test_an_image_file_in_and_class_names_out(server: Server, bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    with vp_engines.load(bundle) as engine:
        (logits,) = engine.run(engine.preprocess([file.getvalue()]))["logits"]
    status, found = plain(server, "/v2/models/linear/classify?top=1", file.getvalue())
    assert status == 200
    (first,) = found["classes"]
    assert first["label"] == ["cat", "dog"][int(logits.argmax())]
    np.testing.assert_allclose(first["logit"], logits.max(), rtol=1e-6)
    status, found = plain(server, "/v2/models/linear/classify", file.getvalue()[:40])
    assert (status, list(found)) == (400, ["error"])
    assert "cannot be read" in found["error"]


def test_the_page_on_embedding(server: Server, tmp_path: Path) -> None:
    """The commands in docs/embedding.md: the server's equals this one except for its location; the client's is run."""
    start, ask = blocks("Ray Serve", "bash")
    assert command(Path("deit_s.vpe")) == words(start, {"python": str(PYTHON)})
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "cat.jpg")
    asked = words(ask, {"127.0.0.1:8000": server.http, "deit_s": "linear"})
    done = subprocess.run([*asked, "-sS"], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["classes"], done.stderr


def test_many_clients_at_once_share_batches(server: Server) -> None:
    def client(number: int) -> list[int]:
        asks, sizes = Client(server), []
        for turn in range(6):
            images = some_images(1 + number % 3, seed=100 * number + turn)
            logits, size = asks.ask(images)
            np.testing.assert_allclose(logits, answers(images), rtol=1e-5, atol=1e-4)
            assert len(images) <= size <= 16
            sizes.append(size)
        return sizes

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = [size for sizes in pool.map(client, range(CLIENTS)) for size in sizes]
    row = stats(server)
    assert max(found) > 3  # more than one request
    assert row["inference_count"] / row["execution_count"] > 2  # and 1, 2 or 3 images are a request


def test_a_replica_killed_under_load_costs_no_request(server: Server, nodes: Cluster) -> None:
    answered, failures, stop = [0] * 16, [], threading.Event()

    def client(number: int) -> None:
        asks = Client(server)
        while not stop.is_set():
            images = some_images(1, seed=number)  # too few to fill a batch before its time is up
            try:
                np.testing.assert_allclose(asks.ask(images)[0], answers(images), rtol=1e-5, atol=1e-4)
                answered[number] += 1
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(answered))]
    for thread in threads:
        thread.start()
    kills = 0
    try:
        # The replica may have no request when it is killed. Then suspend the next one until it has some.
        while not failures and not (kills and stats(server)["repeated"]) and kills < 10:
            before = nodes.replicas(ENGINES)
            so_far = sum(answered)
            until(lambda so_far=so_far: sum(answered) >= so_far + 100 or bool(failures))  # type: ignore[misc]
            victim = min(before)
            if kills:
                os.kill(victim, signal.SIGSTOP)
                enough, soon = sum(answered) + 50, time.monotonic() + 3  # unless every client waits for this one
                until(lambda enough=enough, soon=soon: sum(answered) >= enough or time.monotonic() > soon)  # type: ignore[misc]
            os.kill(victim, signal.SIGKILL)
            kills += 1
            so_far = sum(answered)
            until(lambda so_far=so_far: sum(answered) >= so_far + 100 or bool(failures))  # type: ignore[misc]
            until(lambda victim=victim: len(set(nodes.replicas(ENGINES)) - {victim}) == 2)  # type: ignore[misc]
        so_far = sum(answered)
        until(lambda: sum(answered) >= so_far + 100 or bool(failures))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    repeated = stats(server)["repeated"]
    print(f"{kills} killed, {sum(answered)} requests answered, {len(failures)} lost, {repeated} asked again")
    assert not failures
    assert repeated
    assert len(set(nodes.replicas(ENGINES).values())) == 2  # on both nodes again


@pytest.mark.parametrize(
    ("array", "name", "model", "line"),
    [
        (
            np.zeros((1, 3, 5, 4), np.float32),
            "images",
            "linear",
            r"shape \[1, 3, 5, 4\]; expected \[1 to 16, 3, 4, 4\]",
        ),
        (np.zeros((17, 3, 4, 4), np.float32), "images", "linear", r"shape \[17, 3, 4, 4\]; expected \[1 to 16, 3"),
        (np.zeros((1, 3, 4, 4)), "images", "linear", "datatype 'FP64'; expected 'FP32'"),
        (np.zeros((1, 3, 4, 4), np.float32), "pixels", "linear", "the input 'pixels'; expected 'images'"),
        (np.zeros((1, 3, 4, 4), np.float32), "images", "other", "there is no model 'other'; expected 'linear'"),
    ],
)
def test_a_wrong_request_is_told_so(server: Server, array: np.ndarray, name: str, model: str, line: str) -> None:
    with pytest.raises(InferenceServerException, match=line):
        Client(server).ask(array, name, model)
    check_still_answers(server)


def test_a_body_that_is_not_read_is_told_so(server: Server) -> None:
    infer = "/v2/models/linear/infer"
    assert plain(server, infer, b'{"inputs": [')[0] == 400
    assert plain(server, infer)[0] == 405
    assert plain(server, infer, b"x", **{"Content-Encoding": "gzip"})[0] == 415
    status, found = plain(server, infer, b"{", **{"Inference-Header-Content-Length": "9"})
    assert (status, found["error"]) == (
        400,
        "the header Inference-Header-Content-Length is '9'; expected a number up to 1",
    )
    with socket.create_connection(tuple(server.http.split(":"))) as connection:  # type: ignore[arg-type]
        connection.sendall(f"POST {infer} HTTP/1.1\r\nHost: a\r\nContent-Length: {1 << 40}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(100)
    check_still_answers(server)


def test_half_a_request_takes_nothing_down(server: Server) -> None:
    start = b'POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"inputs"'
    for sent in (b"", start[:30], start, b"\0" * 300):
        with socket.create_connection(tuple(server.http.split(":"))) as connection:  # type: ignore[arg-type]
            connection.sendall(sent)
    check_still_answers(server)
    until(lambda: stats(server)["pending"] == 0)


def test_a_shutdown_answers_what_is_under_way(server: Server, nodes: Cluster, work: Path) -> None:
    """SIGTERM while requests to a second bundle on the cluster wait for others."""
    bundle = write_linear(work / "double.vpe", 2.0, name="double")
    port = int(server.http.split(":")[1])
    options = ("--replicas", "1", "--wait-ms", "4000")
    with serving(bundle, nodes, work, port, *options, route="/double") as second, ThreadPoolExecutor(4) as pool:
        images = some_images(1)
        found = [pool.submit(lambda: Client(second).ask(images, model="double")[0]) for _ in range(4)]
        until(lambda: stats(second, "double")["pending"] == 4)
        second.process.send_signal(signal.SIGTERM)
        for each in found:
            np.testing.assert_allclose(each.result(LONG), answers(images, 2.0), rtol=1e-5, atol=1e-4)
        assert second.process.wait(LONG) == 0, second.said()
    assert "stopping double" in second.said()
    check_still_answers(server)  # the first application is not affected


def refused(nodes: Cluster, bundle: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and error line of a command that must not serve."""
    found = subprocess.run(
        command(bundle, *arguments), env=nodes.environment, capture_output=True, text=True, timeout=LONG
    )
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1, found.stderr
    return found.returncode, found.stderr


def test_what_a_cluster_refuses(server: Server, nodes: Cluster, bundle: Path, tmp_path: Path) -> None:
    """A name or route already in use, or an engine that no node can run."""
    engine = {"name": "trt", "version": "10.0", "precision": "fp16", "device": "cpu", "batch": None}
    gpu = write_linear(tmp_path / "gpu.vpe", engine=engine, name="gpu")
    join = ("--address", nodes.address, "--replicas", "1", "--fronts", "1", "--threads")
    for code, start, arguments in (
        (2, "the cluster serves 'linear' already; give another --name", [bundle, *join, "1"]),
        (2, "Ray Serve did not start: ", [bundle, *join, "1", "--name", "second"]),
        (3, "the engine 'trt' of the bundle cannot run here", [gpu, *join, "1"]),
    ):
        found = refused(nodes, *arguments)  # type: ignore[arg-type]
        assert (found[0], found[1].startswith(f"error: {start}")) == (code, True), found
    check_still_answers(server)


def test_what_is_refused_before_a_cluster_starts(nodes: Cluster, bundle: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(bundle, tmp_path / "altered.vpe"))
    content = bytearray((altered / "engine" / "model.onnx").read_bytes())
    content[-1] ^= 1
    (altered / "engine" / "model.onnx").write_bytes(content)
    code, line = refused(nodes, altered)
    assert (code, "error: 'engine/model.onnx' has sha256" in line) == (2, True), line

    engine = {"name": "trt", "version": "10.0", "precision": "fp16", "device": "cuda", "batch": None}
    code, line = refused(nodes, write_linear(tmp_path / "gpu.vpe", engine=engine))
    assert (code, "error: the engine 'trt' of the bundle cannot run here" in line) == (3, True), line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(nodes, bundle, "--port", str(port))
    assert (code, f"error: cannot listen on 127.0.0.1:{port}: address already in use" in line) == (2, True), line
