"""Models for Triton Inference Server's Python backend: any engine of a bundle, and preprocessing of images.

The server creates one object per model instance, each in its own process, and passes it gathered requests; see the
documentation of the Python backend for the three methods. A request that fails gets an error of its own and does not
affect others.

Servers up to 2.51 need numpy below 2: with a later one their Python backend passes empty arrays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vp_engines.engine import Engine, load
from vp_engines.errors import VpError
from vp_engines.manifest import Preprocessing
from vp_engines.preprocess import preprocess
from vp_engines.serving.triton.config import BUNDLE_FOLDER, ENCODED, PREPROCESSING_NAME


class VpModel:
    """Runs a bundle's engine. Requests passed together run as one batch."""

    engine: Engine

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle beside the model file.

        Raises:
            VpError: if it cannot be loaded; the server shows the message and keeps the previous version.
        """
        self._pb = _utilities()
        config, folder = json.loads(args["model_config"]), _folder(args)
        said = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.encoded = said["takes"] == "encoded"
        self.engine = load(
            folder / BUNDLE_FOLDER,
            variant="dense" if said["variant"] == "dense" else "reduced",
            threads=int(said["threads"]) if "threads" in said else None,
        )
        self.most = int(config["max_batch_size"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        pb, responses = self._pb, [None] * len(requests)
        taken: list[tuple[int, np.ndarray]] = []
        for place, request in enumerate(requests):
            try:
                taken.append((place, self._images(request)))
            except VpError as error:
                responses[place] = _refused(pb, error)
        try:
            answers = _run(self.engine, [images for _, images in taken], self.most)
        except VpError as error:
            for place, _ in taken:
                responses[place] = _refused(pb, error)
            return responses
        for (place, _), answer in zip(taken, answers, strict=True):
            responses[place] = pb.InferenceResponse([pb.Tensor(name, array) for name, array in answer.items()])
        return responses

    def finalize(self) -> None:
        """Called before the server removes the instance."""
        if hasattr(self, "engine"):
            self.engine.close()

    def _images(self, request: Any) -> np.ndarray:
        if self.encoded:
            return preprocess(_files(self._pb, request), self.engine.manifest.preprocessing)
        array: np.ndarray = self._pb.get_input_tensor_by_name(request, self.engine.inputs[0].name).as_numpy()
        return array


class VpPreprocessor:
    """Turns image files into inputs of the engine in the same ensemble."""

    def initialize(self, args: dict[str, str]) -> None:
        self._pb = _utilities()
        self._how = Preprocessing.model_validate_json((_folder(args) / PREPROCESSING_NAME).read_bytes())
        (output,) = json.loads(args["model_config"])["output"]
        self._name = output["name"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        pb, responses = self._pb, []
        for request in requests:
            try:
                images = preprocess(_files(pb, request), self._how)
                responses.append(pb.InferenceResponse([pb.Tensor(self._name, images)]))
            except VpError as error:
                responses.append(_refused(pb, error))
        return responses


def _run(engine: Engine, parts: Sequence[np.ndarray], most: int) -> list[dict[str, np.ndarray]]:
    """Run requests as one batch, or as several if they exceed the maximum.

    Args:
        parts: float32 [b, 3, H, W] of each request.
        most: Largest batch; no single request is larger.

    Returns:
        Each request's rows of every output.
    """
    answers: list[dict[str, np.ndarray]] = []
    while len(answers) < len(parts):
        group: list[np.ndarray] = []
        images = 0
        for part in parts[len(answers) :]:
            if group and images + len(part) > most:
                break
            group.append(part)
            images += len(part)
        outputs = engine.run(group[0] if len(group) == 1 else np.concatenate(group))
        start = 0
        for part in group:
            # The server ignores strides.
            answers.append({
                name: np.ascontiguousarray(array[start : start + len(part)]) for name, array in outputs.items()
            })  # fmt: skip
            start += len(part)
    return answers


def _files(pb: Any, request: Any) -> list[bytes]:
    """Image files of a request: BYTES [b, 1]."""
    return [bytes(element) for element in pb.get_input_tensor_by_name(request, ENCODED.name).as_numpy().reshape(-1)]


def _refused(pb: Any, error: VpError) -> Any:
    return pb.InferenceResponse([], pb.TritonError(str(error)))


def _folder(args: dict[str, str]) -> Path:
    """Folder of this version's files."""
    return Path(args["model_repository"]) / args["model_version"]


def _utilities() -> Any:
    """The backend's own module, which only exists in its processes."""
    import triton_python_backend_utils

    return triton_python_backend_utils
