"""HTTP protocol of a deployment: the Open Inference Protocol (KServe v2), and uploads of image files.

Tensors are JSON or binary, so `tritonclient.http` works as with Triton.

    GET  /v2   /v2/health/live   /v2/health/ready   /v2/models/NAME   /v2/models/NAME/ready   /v2/models/NAME/stats
    POST /v2/models/NAME/infer         tensors; /versions/1 may stand before it
    POST /v2/models/NAME/classify      one image file as the body; ?top=5

Pure functions of bytes and numpy arrays; imports neither Ray nor an HTTP library.
Specifications: https://github.com/kserve/open-inference-protocol and Triton's "Binary Tensor Data Extension".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np

from vp_engines.backends.base import TensorSpec
from vp_engines.errors import InputError

JSON_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the binary tensors
VERSION = "1"
JSON = "application/json"
BINARY = "application/octet-stream"
_NUMBER_BYTES = 24  # per number in JSON: "-1.2345678e-01, " and some whitespace
_LEAST_BODY = 16 << 20  # bytes; image files may be larger than the tensors made of them
_GETS = ("server", "live", "ready", "model", "stats")
_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|stats|infer|classify))?")


class Refusal(InputError):
    """A rejected request; `status` is the HTTP status code."""

    def __init__(self, status: int, found: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(found, expected=expected, fix=fix)
        self.status = status


@dataclass(frozen=True)
class Model:
    """Description of a model, enough for a front to handle requests without the engine.

    Attributes:
        name: Name in URLs.
        platform: Engine and precision, for metadata.
        input: Input of the engine, float32 [batch, 3, height, width].
        outputs: Outputs of the engine.
        max_batch: Maximum number of images in one request.
        classes: Class names by index; None if the bundle has none.
    """

    name: str
    platform: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    classes: tuple[str, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.input.shape[1:])

    @property
    def most_bytes(self) -> int:
        """Size limit of a request body."""
        return max(_LEAST_BODY, self.max_batch * int(np.prod(self.image_shape)) * _NUMBER_BYTES)


@dataclass(frozen=True)
class Asked:
    """An inference request.

    Attributes:
        images: float32 [b, 3, H, W]; may be a read-only and unaligned view of the body.
        id: Returned in the answer.
        outputs: Names of requested outputs, and whether as binary.
    """

    images: np.ndarray
    id: str | None
    outputs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    status: int
    body: bytes
    headers: Mapping[str, str]


def route(method: str, path: str, model: Model) -> str:
    """Map a request to "server", "live", "ready", "model", "stats", "infer" or "classify".

    Args:
        path: From /v2 on.

    Raises:
        Refusal: 404 for an unknown path, model or version; 405 for the wrong method.
    """
    plain = {"/v2": "server", "/v2/": "server", "/v2/health/live": "live", "/v2/health/ready": "ready"}
    if (kind := plain.get(path)) is None:
        match = _MODEL.fullmatch(path)
        if match is None:
            raise Refusal(
                404, f"the path {path[:200]!r}", expected=f"/v2/models/{model.name}/infer or /v2/health/ready"
            )
        name, version, kind = unquote(match[1]), match[2], match[3] or "model"
        if name != model.name:
            raise Refusal(404, f"there is no model {name[:200]!r}", expected=repr(model.name))
        if version not in (None, VERSION):
            raise Refusal(404, f"there is no version {version[:50]!r} of {model.name!r}", expected=f"version {VERSION}")
    wanted = ("GET", "HEAD") if kind in _GETS else ("POST",)
    if method not in wanted:
        raise Refusal(405, f"{method} on {path[:200]}", expected=wanted[0])
    return kind


def read_infer(body: bytes, json_length: str | None, model: Model) -> Asked:
    """Parse the body of an inference request.

    Args:
        json_length: Value of the header JSON_LENGTH, None if absent.

    Raises:
        Refusal: 400, saying what is wrong.
    """
    end = _json_end(body, json_length)
    document = _document(body[:end])
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad("'inputs' is not a list of one tensor", expected=f"one, called {model.input.name!r}")
    images = _tensor(inputs[0], memoryview(body)[end:], model)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise _bad("'id' is not a string")
    return Asked(images, request_id or None, _outputs(document, model))


def _json_end(body: bytes, json_length: str | None) -> int:
    if json_length is None:
        return len(body)
    # isdecimal: int() would also accept "+1", "1_000" and spaces.
    if not (json_length.isascii() and json_length.isdecimal()) or not int(json_length[:20]) <= len(body):
        raise _bad(f"the header {JSON_LENGTH} is {json_length[:50]!r}", expected=f"a number up to {len(body)}")
    return int(json_length[:20])


def _document(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise _bad(f"the request is not JSON: {reason}", expected="an inference request as JSON") from None
    if not isinstance(document, dict):
        raise _bad("the request is no JSON object", expected='{"inputs": [...]}')
    return document


def _tensor(tensor: dict[str, Any], blob: memoryview, model: Model) -> np.ndarray:
    name, dtype, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
    if name != model.input.name:
        raise _bad(f"the input {str(name)[:100]!r}", expected=repr(model.input.name))
    if dtype != "FP32":
        raise _bad(f"the input {name!r} has datatype {str(dtype)[:20]!r}", expected="'FP32'")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise _bad(f"'shape' of {name!r} is {str(shape)[:100]}", expected=_shape(model))
    if len(shape) != 4 or tuple(shape[1:]) != model.image_shape or not 1 <= shape[0] <= model.max_batch:
        raise _bad(f"the input {name!r} has shape {str(shape)[:100]}", expected=_shape(model))
    count = int(np.prod(shape))
    size = _parameters(tensor).get("binary_data_size")
    if size is not None:
        if size != 4 * count or len(blob) != 4 * count:
            raise _bad(
                f"'binary_data_size' of {name!r} is {str(size)[:50]} and {len(blob)} bytes follow the JSON",
                expected=f"{4 * count} for shape {shape}",
            )
        return np.frombuffer(blob, "<f4").reshape(shape)
    if blob:
        raise _bad(f"{len(blob)} bytes follow the JSON, which names no 'binary_data_size'")
    return _numbers(tensor.get("data"), name, count).reshape(shape)


def _numbers(data: object, name: str, count: int) -> np.ndarray:
    """Convert JSON numbers, flat or nested, to float32 [count]."""
    try:
        found = np.asarray(data)
    except (ValueError, OverflowError):  # ragged lists
        found = np.asarray(None)
    if found.dtype.kind not in "iuf":
        raise _bad(f"'data' of {name!r} is not a list of numbers", expected=f"{count} of them")
    if found.size != count:
        raise _bad(f"'data' of {name!r} has {found.size} numbers", expected=f"{count}")
    with np.errstate(over="ignore"):
        return found.reshape(-1).astype(np.float32)


def _outputs(document: dict[str, Any], model: Model) -> tuple[tuple[str, bool], ...]:
    binary = _parameters(document).get("binary_data_output") is True
    known = [output.name for output in model.outputs]
    wanted = document.get("outputs")
    if not wanted:
        return tuple((name, binary) for name in known)
    if not isinstance(wanted, list) or not all(isinstance(output, dict) for output in wanted):
        raise _bad("'outputs' is not a list of tensors")
    found = []
    for output in wanted:
        if output.get("name") not in known:
            raise _bad(f"the output {str(output.get('name'))[:100]!r}", expected=f"one of {', '.join(known)}")
        parameters = _parameters(output)
        if parameters.get("classification"):
            raise _bad("'classification' of an output", fix=f"POST an image file to /v2/models/{model.name}/classify")
        found.append((output["name"], parameters.get("binary_data", binary) is True))
    return tuple(found)


def _parameters(of: Mapping[str, Any]) -> dict[str, Any]:
    parameters = of.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _bad("'parameters' is no JSON object")
    return parameters


def infer_reply(asked: Asked, outputs: Mapping[str, np.ndarray], model: Model, **said: Any) -> Reply:
    """Build the answer to an inference request.

    Args:
        outputs: float32 arrays by name, axis 0 the batch.
        said: Further parameters of the answer.
    """
    tensors, blobs = [], []
    for name, binary in asked.outputs:
        array = np.ascontiguousarray(outputs[name], "<f4")
        tensor: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            blobs.append(array.tobytes())
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    document: dict[str, Any] = {"model_name": model.name, "model_version": VERSION, "outputs": tensors}
    document |= {"id": asked.id} if asked.id is not None else {}
    document |= {"parameters": said} if said else {}
    if not blobs:
        return json_reply(document)
    text = json.dumps(document).encode()
    return Reply(200, b"".join([text, *blobs]), {"Content-Type": BINARY, JSON_LENGTH: str(len(text))})


def classify_reply(logits: np.ndarray, top: int, model: Model) -> Reply:
    """Build the answer to a classification request: classes, most likely first.

    Args:
        logits: float32 [classes].
    """
    scores = logits.astype(np.float64)
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    order = np.argsort(-scores, kind="stable")[:top]
    classes = [
        {"index": int(index), "probability": float(chances[index]), "logit": float(scores[index])}
        | ({"label": model.classes[index]} if model.classes else {})
        for index in order
    ]
    return json_reply({"model_name": model.name, "classes": classes})


def read_top(text: str | None) -> int:
    """Number of classes to return, from the query parameter `top`.

    Raises:
        Refusal: 400, if it is not a number of at least 1.
    """
    if text is None:
        return 5
    if not (text.isascii() and text.isdecimal() and int(text[:9]) >= 1):
        raise _bad(f"top is {text[:50]!r}", expected="a whole number from 1")
    return int(text[:9])


def metadata(model: Model) -> dict[str, Any]:
    """Answer to GET /v2/models/NAME."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        return {
            "name": spec.name,
            "datatype": "FP32",
            "shape": [-1 if isinstance(size, str) else size for size in spec.shape],
        }

    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": model.platform,
        "inputs": [tensor(model.input)],
        "outputs": [tensor(output) for output in model.outputs],
        "parameters": {"max_batch_size": model.max_batch},
    }


def json_reply(document: object, status: int = 200, **headers: str) -> Reply:
    """Build a JSON response."""
    return Reply(status, json.dumps(document).encode(), {"Content-Type": JSON, **headers})


def error_reply(status: int, line: str) -> Reply:
    """Build an error response of the protocol; 503 means that the client may retry."""
    retry = {"Retry-After": "1"} if status == 503 else {}
    return json_reply({"error": line}, status, **retry)


def check_length(length: int, model: Model) -> None:
    """Check the size of a request body.

    Raises:
        Refusal: 413, if it is too large.
    """
    if length > model.most_bytes:
        raise Refusal(
            413,
            f"the body has {length} bytes or more",
            expected=f"at most {model.most_bytes}",
            fix="send fewer images at a time, or binary tensors in place of JSON",
        )


def check_encoding(encoding: str | None) -> None:
    """Check the Content-Encoding of a request body.

    Raises:
        Refusal: 415, if it is compressed.
    """
    if encoding not in (None, "", "identity"):
        raise Refusal(415, f"the body is encoded as {encoding[:50]!r}", fix="send it without compression")


def _shape(model: Model) -> str:
    return f"[1 to {model.max_batch}, {', '.join(map(str, model.image_shape))}]"


def _bad(found: str, *, expected: str = "", fix: str = "") -> Refusal:
    return Refusal(400, found, expected=expected, fix=fix)
