"""A one-file engine on onnx's reference evaluator. test_extending.py adds it to a copy of the repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vp_engines.backends.base import (
    Availability,
    Backend,
    BuildOptions,
    BuildResult,
    BuildSource,
    Runner,
    RunOptions,
    TensorSpec,
    require,
)
from vp_engines.extras import install_hint, installed

if TYPE_CHECKING:
    import numpy as np


class ReferenceBackend(Backend):
    name = "reference"
    source = "onnx"
    opset = 23
    precisions = ("fp32",)
    extra = "export"
    devices = ("cpu",)

    @property
    def packages(self) -> tuple[str, ...]:
        return ("onnx",)

    def available(self, purpose: Literal["build", "run"] = "run") -> Availability:
        return Availability(installed("onnx"), "" if installed("onnx") else f"needs onnx: {install_hint(self.extra)}")

    def version(self) -> str:
        return str(require("onnx", self.name, self.extra).__version__)

    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        self.check_source(source)
        assert source.onnx is not None
        (out / "model.onnx").write_bytes(source.onnx.read_bytes())
        return BuildResult("model.onnx", ("model.onnx",))

    def open(
        self,
        artefact: str,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        requirements: Mapping[str, Any],
        options: RunOptions,
    ) -> Runner:
        require("onnx", self.name, self.extra)
        import onnx
        from onnx.reference import ReferenceEvaluator

        return ReferenceRunner(ReferenceEvaluator(onnx.load_from_string(files[artefact])), inputs, outputs)


class ReferenceRunner(Runner):
    concurrent = False

    def __init__(self, session: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(inputs, outputs)
        self._session = session

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        found = self._session.run(None, {self.inputs[0].name: images})
        return {spec.name: value for spec, value in zip(self.outputs, found, strict=True)}
