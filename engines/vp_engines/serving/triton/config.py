"""Model configurations of Triton Inference Server, using the protobuf definitions of tritonclient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vp_engines.backends.base import TensorSpec, first_line
from vp_engines.errors import BundleError, EngineUnavailableError
from vp_engines.extras import install_hint

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG_NAME = "config.pbtxt"
LABELS_NAME = "labels.txt"
BUNDLE_FOLDER = "bundle.vpe"  # in a version's folder, for the Python backend
PREPROCESSING_NAME = "preprocessing.json"  # likewise, for a model that only preprocesses images
ENCODED = TensorSpec("encoded", "bytes", ("batch", 1))  # image files, one per image

# Dtype -> TYPE_* of a configuration.
_TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "uint8": "UINT8",
    "bytes": "STRING",
}  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """Contents of a model configuration; axis 0 of every tensor is the batch.

    Attributes:
        name: Name of the model and of its folder.
        backend, platform: The server's names; one of them may be "".
        file: File that the server loads, inside the version's folder; "" for an ensemble.
        max_batch: Largest batch that the server forms.
        preferred: Preferred batch sizes; () for none.
        delay: Microseconds that a request may wait for others.
        instances: Number of instances.
        gpu: Whether they run on a GPU.
        warmup: Batch sizes to run before the model is ready.
        warmup_file: File in the folder warmup/ with an element of the first input, if that is of type bytes.
        labels: Whether LABELS_NAME names the classes of the first output.
        parameters: Parameters of the backend.
        steps: Of an ensemble: (model, {its input: our tensor}, {its output: our tensor}), in order.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    backend: str = ""
    platform: str = ""
    file: str = ""
    preferred: tuple[int, ...] = ()
    delay: int = 0
    instances: int = 1
    gpu: bool = False
    warmup: tuple[int, ...] = ()
    warmup_file: str = ""
    labels: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[tuple[str, Mapping[str, str], Mapping[str, str]], ...] = ()


def definitions() -> ModuleType:
    """tritonclient's protobuf definitions of a model configuration.

    Raises:
        EngineUnavailableError: if tritonclient or protobuf is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise EngineUnavailableError(
            f"a model repository needs tritonclient: {first_line(error)}", fix=install_hint("serve")
        ) from None
    return model_config_pb2


def model_config(spec: ModelSpec) -> ModelConfig:
    """Build the configuration of a model.

    Raises:
        EngineUnavailableError: if tritonclient is not installed.
        BundleError: if the server does not support a dtype.
    """
    pb = definitions()
    config: ModelConfig = pb.ModelConfig(
        name=spec.name,
        backend=spec.backend,
        platform=spec.platform,
        default_model_filename=spec.file,
        max_batch_size=spec.max_batch,
        input=[_tensor(pb.ModelInput, tensor) for tensor in spec.inputs],
        output=[_tensor(pb.ModelOutput, tensor) for tensor in spec.outputs],
        parameters={key: pb.ModelParameter(string_value=value) for key, value in sorted(spec.parameters.items())},
        model_warmup=[_warmup(pb, spec, size) for size in spec.warmup],
    )
    config.version_policy.latest.num_versions = 1  # a new version replaces the previous one once it is ready
    if spec.labels:
        config.output[0].label_filename = LABELS_NAME
    if spec.steps:
        for model, inputs, outputs in spec.steps:
            config.ensemble_scheduling.step.add(
                model_name=model, model_version=-1, input_map=dict(inputs), output_map=dict(outputs)
            )
        return config
    config.dynamic_batching.preferred_batch_size.extend(spec.preferred)
    config.dynamic_batching.max_queue_delay_microseconds = spec.delay
    kind = pb.ModelInstanceGroup.KIND_GPU if spec.gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=spec.instances, kind=kind)
    return config


def to_text(config: ModelConfig) -> str:
    """Format as config.pbtxt; parsing it gives the same configuration."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    if from_text(text) != config:
        raise BundleError(f"the configuration of {config.name!r} does not survive being written")
    return text


def from_text(text: str) -> ModelConfig:
    """Parse a config.pbtxt.

    Raises:
        BundleError: if it is not valid.
    """
    from google.protobuf import text_format

    try:
        found: ModelConfig = text_format.Parse(text, definitions().ModelConfig())
    except text_format.ParseError as error:
        raise BundleError(f"{CONFIG_NAME} is not a model configuration: {first_line(error)}") from None
    return found


def signature(config: ModelConfig) -> dict[str, Any]:
    """What versions of a model must have in common: its interface to clients."""

    def of(tensors: Sequence[Any]) -> list[tuple[str, int, tuple[int, ...]]]:
        return [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in tensors]

    return {"inputs": of(config.input), "outputs": of(config.output)}


def says(found: dict[str, Any]) -> str:
    """Format a signature in words."""
    types = definitions().DataType.Name
    return "; ".join(
        f"{kind} " + ", ".join(f"{name} {types(dtype)} {list(dims)}" for name, dtype, dims in tensors)
        for kind, tensors in found.items()
    )


def _tensor(kind: Any, tensor: TensorSpec) -> Any:
    return kind(name=tensor.name, data_type=_type(tensor), dims=_dims(tensor))


def _type(tensor: TensorSpec) -> int:
    if tensor.dtype not in _TYPES:
        raise BundleError(f"tensor {tensor.name!r} is of {tensor.dtype}", expected=f"one of {', '.join(_TYPES)}")
    value: int = definitions().DataType.Value(f"TYPE_{_TYPES[tensor.dtype]}")
    return value


def _dims(tensor: TensorSpec) -> list[int]:
    """Shape without the batch; -1 for an axis of any size."""
    return [axis if isinstance(axis, int) else -1 for axis in tensor.shape[1:]]


def _warmup(pb: ModuleType, spec: ModelSpec, size: int) -> Any:
    made = pb.ModelWarmup(name=f"batch-{size}", batch_size=size)
    for tensor in spec.inputs:
        entry = made.inputs[tensor.name]
        entry.data_type = _type(tensor)
        entry.dims.extend(_dims(tensor))
        if spec.warmup_file:
            entry.input_data_file = spec.warmup_file
        else:
            entry.random_data = True
    return made
