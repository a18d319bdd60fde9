"""Parsing of requests, and errors for invalid ones. Does not need Ray."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client

from vp_engines.backends.base import TensorSpec
from vp_engines.serving.ray import protocol
from vp_engines.serving.ray.protocol import Model, Refusal, infer_reply, read_infer, route

MODEL = Model(
    "tiny",
    "ort_fp32",
    TensorSpec("images", "float32", ("batch", 3, 2, 2)),
    (TensorSpec("logits", "float32", ("batch", 2)), TensorSpec("features", "float32", ("batch", 4))),
    4,
    ("cat", "dog"),
)
IMAGES = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7
OUTPUTS = {"logits": np.array([[1, 2], [3, 4]], np.float32), "features": np.ones((2, 4), np.float32)}


def document(**changes: Any) -> dict[str, Any]:
    """A request as JSON; members changed to None are removed."""
    tensor = {"name": "images", "datatype": "FP32", "shape": [2, 3, 2, 2], "data": IMAGES.reshape(-1).tolist()}
    tensor = {key: value for key, value in (tensor | changes).items() if value is not None}
    return {"inputs": [tensor]}


def encode(**changes: Any) -> bytes:
    return json.dumps(document(**changes)).encode()


@pytest.mark.parametrize("binary", [True, False])
def test_what_the_protocols_own_client_writes_and_reads(binary: bool) -> None:
    tensor = http_client.InferInput("images", [2, 3, 2, 2], "FP32")
    tensor.set_data_from_numpy(IMAGES, binary_data=binary)
    wanted = [http_client.InferRequestedOutput(name, binary_data=binary) for name in ("features", "logits")]
    body, length = http_client.InferenceServerClient.generate_request_body([tensor], wanted, request_id="7")
    asked = read_infer(body, None if length is None else str(length), MODEL)
    np.testing.assert_array_equal(asked.images, IMAGES)
    reply = infer_reply(asked, OUTPUTS, MODEL, batch_size=5)
    told = reply.headers.get(protocol.JSON_LENGTH)
    found = http_client.InferenceServerClient.parse_response_body(
        reply.body, header_length=None if told is None else int(told)
    )
    for name, expected in OUTPUTS.items():
        np.testing.assert_array_equal(found.as_numpy(name), expected)
    assert found.get_response()["id"] == "7"
    assert found.get_response()["parameters"] == {"batch_size": 5}


def test_all_outputs_where_none_is_named_and_nested_numbers() -> None:
    asked = read_infer(encode(data=IMAGES.tolist()), None, MODEL)
    np.testing.assert_array_equal(asked.images, IMAGES)
    assert asked.outputs == (("logits", False), ("features", False))
    found = json.loads(infer_reply(asked, OUTPUTS, MODEL).body)
    assert [tensor["name"] for tensor in found["outputs"]] == ["logits", "features"]
    assert found["outputs"][0]["data"] == [1, 2, 3, 4]


def test_binary_images_are_not_copied() -> None:
    text = encode(data=None, parameters={"binary_data_size": 96})
    body = text + IMAGES.tobytes()
    asked = read_infer(body, str(len(text)), MODEL)
    assert np.shares_memory(asked.images, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", "the request is not JSON"),
        (b"\xff", "the request is not JSON"),
        (b"[" * 100_000, "the request is not JSON: nested too deeply"),
        (b"[]", "the request is no JSON object"),
        (b"{}", "'inputs' is not a list of one tensor; expected one, called 'images'"),
        (b'{"inputs": [1]}', "'inputs' is not a list of one tensor"),
        (encode(name="pixels"), "the input 'pixels'; expected 'images'"),
        (encode(datatype="FP64"), "has datatype 'FP64'; expected 'FP32'"),
        (encode(shape="2"), "'shape' of 'images' is 2; expected [1 to 4, 3, 2, 2]"),
        (encode(shape=[True, 3, 2, 2]), "'shape' of 'images' is [True, 3, 2, 2]"),
        (encode(shape=[2, 3, 2]), "has shape [2, 3, 2]; expected [1 to 4, 3, 2, 2]"),
        (encode(shape=[0, 3, 2, 2]), "has shape [0, 3, 2, 2]"),
        (encode(shape=[10**30, 3, 2, 2]), "has shape [1000000000"),
        (encode(data=None), "'data' of 'images' is not a list of numbers; expected 24 of them"),
        (encode(data=["1"] * 24), "is not a list of numbers"),
        (encode(data=[True] * 24), "is not a list of numbers"),
        (encode(data=[[1, 2], [3]]), "is not a list of numbers"),
        (encode(data=[10**400] * 24), "is not a list of numbers"),
        (encode(data=[1, 2]), "'data' of 'images' has 2 numbers; expected 24"),
        (encode(parameters=[]), "'parameters' is no JSON object"),
        (encode(parameters={"binary_data_size": 96}), "is 96 and 0 bytes follow the JSON; expected 96"),
        (
            json.dumps(document() | {"outputs": [{"name": "x"}]}).encode(),
            "the output 'x'; expected one of logits, features",
        ),
        (json.dumps(document() | {"outputs": 1}).encode(), "'outputs' is not a list of tensors"),
        (json.dumps(document() | {"id": 1}).encode(), "'id' is not a string"),
        (
            json.dumps(document() | {"outputs": [{"name": "logits", "parameters": {"classification": 1}}]}).encode(),
            "POST an image file to /v2/models/tiny/classify",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_one_line(body: bytes, line: str) -> None:
    with pytest.raises(Refusal, match=re.escape(line)) as found:
        read_infer(body, None, MODEL)
    assert found.value.status == 400
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500


@pytest.mark.parametrize("length", ["", "-1", "+1", "1e1", "x", "9" * 30, "100000", "٣"])
def test_a_wrong_length_of_the_json(length: str) -> None:
    with pytest.raises(Refusal, match="the header Inference-Header-Content-Length is"):
        read_infer(encode(), length, MODEL)


def test_bytes_that_no_tensor_claims() -> None:
    body = encode()
    with pytest.raises(Refusal, match="3 bytes follow the JSON, which names no 'binary_data_size'"):
        read_infer(body + b"abc", str(len(body)), MODEL)


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v2", "server"),
        ("GET", "/v2/health/live", "live"),
        ("HEAD", "/v2/health/ready", "ready"),
        ("GET", "/v2/models/tiny", "model"),
        ("GET", "/v2/models/tiny/versions/1/ready", "ready"),
        ("GET", "/v2/models/tiny/stats", "stats"),
        ("POST", "/v2/models/t%69ny/infer", "infer"),
        ("POST", "/v2/models/tiny/versions/1/infer", "infer"),
        ("POST", "/v2/models/tiny/classify", "classify"),
    ],
)
def test_paths(method: str, path: str, kind: str) -> None:
    assert route(method, path, MODEL) == kind


@pytest.mark.parametrize(
    ("method", "path", "status", "line"),
    [
        ("GET", "/", 404, "the path '/'; expected /v2/models/tiny/infer"),
        ("GET", "/v2/models/tiny/config", 404, "the path '/v2/models/tiny/config'"),
        ("GET", "/v2/models/other", 404, "there is no model 'other'; expected 'tiny'"),
        ("GET", "/v2/models/tiny/versions/2", 404, "there is no version '2' of 'tiny'; expected version 1"),
        ("GET", "/v2/models/tiny/infer", 405, "GET on /v2/models/tiny/infer; expected POST"),
        ("POST", "/v2/health/ready", 405, "expected GET"),
    ],
)
def test_wrong_paths(method: str, path: str, status: int, line: str) -> None:
    with pytest.raises(Refusal, match=re.escape(line)) as found:
        route(method, path, MODEL)
    assert found.value.status == status


def test_classes_of_an_image() -> None:
    found = json.loads(protocol.classify_reply(np.array([1, 3], np.float32), 5, MODEL).body)
    assert [row["label"] for row in found["classes"]] == ["dog", "cat"]
    chances = [row["probability"] for row in found["classes"]]
    np.testing.assert_allclose(chances, [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))])
    assert protocol.read_top(None) == 5
    for text in ("0", "x", "-1", "1.5"):
        with pytest.raises(Refusal, match="expected a whole number from 1"):
            protocol.read_top(text)


def test_bodies_that_are_not_read() -> None:
    protocol.check_length(MODEL.most_bytes, MODEL)
    with pytest.raises(Refusal, match="expected at most 16777216; send fewer images") as found:
        protocol.check_length(MODEL.most_bytes + 1, MODEL)
    assert found.value.status == 413
    protocol.check_encoding("identity")
    with pytest.raises(Refusal, match="send it without compression") as found:
        protocol.check_encoding("gzip")
    assert found.value.status == 415
