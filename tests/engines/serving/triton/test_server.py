"""Model repositories on a real server: results, batching, version changes under load, and invalid requests."""

from __future__ import annotations

import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from PIL import Image
from tritonclient.utils import InferenceServerException

import vp_engines
from tests.engines.serving.triton.samples import answers, write_linear
from tests.engines.serving.triton.server import Server, packages, running
from tests.waiting import LONG, until
from vp_engines.serving.triton.repository import BUNDLE_FOLDER, ServeOptions, write_repository

pytestmark = [pytest.mark.slow, pytest.mark.built]
CLIENTS = 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packages()
    return write_linear(tmp_path_factory.mktemp("bundle") / "linear.vpe")


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "models"
    for options in (
        ServeOptions(backend="python", threads=1),
        ServeOptions(name="slow", backend="python", delay=2_000_000, warmup=False),
        ServeOptions(name="files", preprocess="model"),
        ServeOptions(name="row", backend="python", preprocess="ensemble"),
    ):
        write_repository(bundle, out, options)
    return out


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("server")
    with running(repository, work, "--model-control-mode", "explicit", "--load-model", "*") as found:
        yield found


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def ask(server: Server, protocol: str, model: str, array: np.ndarray, name: str = "images", **given: Any) -> np.ndarray:
    """One request on a new connection."""
    module: ModuleType = http_client if protocol == "http" else grpc_client
    client = module.InferenceServerClient(server.http if protocol == "http" else server.grpc)
    dtype = {"float32": "FP32", "float64": "FP64", "object": "BYTES"}[str(array.dtype)]
    tensor = module.InferInput(name, list(array.shape), dtype)
    tensor.set_data_from_numpy(array)
    try:
        found: np.ndarray = client.infer(model, [tensor], **given).as_numpy("logits")
    finally:
        client.close()
    return found


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 4, 4)).astype(np.float32)


def some_files(count: int) -> list[bytes]:
    files = []
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        files.append(buffer.getvalue())
    return files


def test_same_answers_as_a_direct_run(server: Server, bundle: Path, protocol: str) -> None:
    images = some_images(3)
    with vp_engines.load(bundle) as engine:
        direct = engine.run(images)["logits"]
    np.testing.assert_allclose(ask(server, protocol, "linear", images), direct, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(direct, answers(images), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", ["files", "row"])
def test_image_files(server: Server, bundle: Path, protocol: str, model: str) -> None:
    files = some_files(3)
    with vp_engines.load(bundle) as engine:
        direct = engine.run(engine.preprocess(files))["logits"]
    encoded = np.array(files, dtype=object)[:, None]
    np.testing.assert_allclose(ask(server, protocol, model, encoded, "encoded"), direct, rtol=1e-5, atol=1e-5)


def test_class_names(server: Server) -> None:
    wanted = [http_client.InferRequestedOutput("logits", class_count=1)]
    (found,) = ask(server, "http", "linear", np.ones((1, 3, 4, 4), np.float32), outputs=wanted)
    assert found[0] == b"48.000000:0:cat"


def test_requests_that_wait_together_run_together(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: ask(server, "http", "slow", some_images(1, seed)), range(8)))
    for seed, logits in enumerate(found):
        np.testing.assert_allclose(logits, answers(some_images(1, seed)), rtol=1e-5, atol=1e-4)
    client = http_client.InferenceServerClient(server.http)
    (row,) = client.get_inference_statistics("slow")["model_stats"]
    assert row["inference_count"] == 8
    assert row["execution_count"] < 8


def test_many_clients_at_once(server: Server, protocol: str) -> None:
    def client(number: int) -> None:
        for round_ in range(5):
            images = some_images(1 + number % 3, seed=100 * number + round_)
            logits = ask(server, protocol, "linear", images)
            np.testing.assert_allclose(logits, answers(images), rtol=1e-5, atol=1e-4)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))


@pytest.mark.parametrize(
    ("array", "name", "line"),
    [
        (np.zeros((1, 3, 5, 4), np.float32), "images", r"unexpected shape for input 'images'.*\[-1,3,4,4\]"),
        (np.zeros((1, 3, 4, 4)), "images", "data-type 'FP64'.*expected(s)? 'FP32'|FP64"),
        (np.zeros((1, 3, 4, 4), np.float32), "pixels", "unexpected inference input 'pixels'"),
        (np.zeros((65, 3, 4, 4), np.float32), "images", "batch-size must be <= 64"),
    ],
)
def test_a_wrong_request_is_told_so(server: Server, protocol: str, array: np.ndarray, name: str, line: str) -> None:
    with pytest.raises(InferenceServerException, match=line):
        ask(server, protocol, "linear", array, name)
    np.testing.assert_array_equal(ask(server, protocol, "linear", np.zeros((1, 3, 4, 4), np.float32)), [[0, 0]])


@pytest.mark.parametrize("model", ["files", "row"])
def test_a_broken_image_spoils_no_other_request(server: Server, model: str) -> None:
    (good,) = some_files(1)
    encoded = [good, b"no image", good, good[:40]]

    def one(content: bytes) -> str:
        try:
            return str(ask(server, "http", model, np.array([[content]], dtype=object), "encoded").shape)
        except InferenceServerException as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, encoded))
    assert found[0] == found[2] == "(1, 2)"
    assert "cannot be read: no format that Pillow knows" in found[1]
    assert "cannot be read" in found[3]


def test_half_a_request_takes_nothing_down(server: Server) -> None:
    host, port = server.http.split(":")
    for end in (b"", b'POST /v2/models/linear/infer HTTP/1.1\r\nContent-Length: 100000\r\n\r\n{"inputs"', b"\0" * 300):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(end)
    images = some_images(2)
    np.testing.assert_allclose(ask(server, "http", "linear", images), answers(images), rtol=1e-5, atol=1e-4)


def test_a_new_version_loses_no_request_and_a_damaged_one_changes_nothing(
    server: Server, repository: Path, tmp_path: Path
) -> None:
    write_repository(write_linear(tmp_path / "one.vpe", 1.0), repository, ServeOptions(name="live", backend="python"))
    control = http_client.InferenceServerClient(server.http, network_timeout=LONG, connection_timeout=LONG)
    control.load_model("live")
    ones, seen, failures, stop = np.ones((1, 3, 4, 4), np.float32), [], [], threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                seen.append(float(ask(server, "http", "live", ones)[0, 0]))
            except InferenceServerException as error:
                failures.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        served = write_repository(
            write_linear(tmp_path / "two.vpe", 2.0), repository, ServeOptions(name="live", backend="python")
        )
        assert served.version == 2
        control.load_model("live")
        until(lambda: 96.0 in seen[-4:] or failures)

        # The third version is corrupted on its way; the server keeps running the second.
        third = write_repository(
            write_linear(tmp_path / "three.vpe", 3.0), repository, ServeOptions(name="live", backend="python")
        )
        damaged = third.folders[0] / "3" / BUNDLE_FOLDER / "engine" / "model.onnx"
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(InferenceServerException, match=r"'engine/model.onnx'"):
            control.load_model("live")
        time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert set(seen) == {48.0, 96.0}
    assert seen[-1] == 96.0
    shutil.rmtree(third.folders[0] / "3")


def test_a_server_that_polls_finds_a_new_model_whole(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    write_repository(bundle, repository, ServeOptions(name="first", backend="python"))
    (tmp_path / "work").mkdir()
    with running(
        repository, tmp_path / "work", "--model-control-mode", "poll", "--repository-poll-secs", "1"
    ) as server:
        write_repository(bundle, repository, ServeOptions(name="second", backend="python"))
        with closing(http_client.InferenceServerClient(server.http)) as client:
            until(lambda: client.is_model_ready("second"), server.said)
            time.sleep(1.5)  # long enough for another poll
        ones = np.ones((1, 3, 4, 4), np.float32)
        np.testing.assert_array_equal(ask(server, "http", "second", ones), [[48, -48]])
        np.testing.assert_array_equal(ask(server, "http", "first", ones), [[48, -48]])
        errors = [line for line in server.said().splitlines() if re.match(r"E\d{4} ", line)]
        assert [line for line in errors if "CudaDriverHelper" not in line] == []
