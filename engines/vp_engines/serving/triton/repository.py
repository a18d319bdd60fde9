"""Write a bundle as a model of a Triton Inference Server repository, atomically.

    models/NAME/config.pbtxt, labels.txt
    models/NAME/1/model.onnx        or model.plan, model.pt2; or, for the Python backend, model.py and the whole bundle

Every file is verified against the bundle's manifest before anything is written. The Python backend verifies it again on
every load.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vp_engines.atomic import building, check_parent, put_in_place
from vp_engines.backends import ENGINES, get_backend
from vp_engines.backends.base import TensorSpec
from vp_engines.bundle import Bundle, read_bundle, verify_bundle
from vp_engines.errors import BundleError, BundleIncompatibleError, InputError
from vp_engines.manifest import MANIFEST_NAME, VARIANT_FOLDERS, canonical_json
from vp_engines.serving.triton import batching
from vp_engines.serving.triton.config import (
    BUNDLE_FOLDER,
    CONFIG_NAME,
    ENCODED,
    LABELS_NAME,
    PREPROCESSING_NAME,
    ModelSpec,
    definitions,
    from_text,
    model_config,
    says,
    signature,
    to_text,
)
from vp_engines.serving.triton.releases import server_needed

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PREPROCESS = ("none", "model", "ensemble")


@dataclass(frozen=True)
class Native:
    """A server backend that runs an engine's artefact directly."""

    backend: str
    platform: str
    file: str
    numbered: bool = False  # tensors are named INPUT__0, OUTPUT__0


NATIVE = {
    "ort": Native("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    "trt": Native("tensorrt", "tensorrt_plan", "model.plan"),
    "aoti": Native("pytorch", "torch_aoti", "model.pt2", numbered=True),
}
BACKENDS = (*(native.backend for native in NATIVE.values()), "python")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

_MODEL = '''\
"""Written by vp-serve. The model itself is in {module}."""

import os
import sys

# Some servers run their interpreter isolated: it ignores PYTHONPATH, by which they are told where packages are.
if sys.flags.ignore_environment:
    sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]

from {module} import {name} as TritonPythonModel  # noqa: E402, F401
'''


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a bundle.

    Attributes:
        name: Name of the model; None for the bundle's.
        backend: One of BACKENDS; None for the engine's native backend if the server has one, else python.
        preprocess: "none": clients send preprocessed images; "model": clients send image files, which the Python
            backend preprocesses; "ensemble": clients send image files, and NAME is an ensemble of a preprocessing model
            and the engine's.
        variant: "reduced" or "dense".
        version: Version number; None for the next one.
        max_batch: Largest batch; None for what the engine was built for or measured at.
        delay: Microseconds that a request may wait for others to form a batch.
        instances: Number of instances.
        threads: CPU threads of each; None for the runtime's default.
        warmup: Run a few batches before the model is ready.

    Raises:
        InputError: if a value is invalid.

    Examples:
        >>> from vp_engines import ServeOptions
        >>> ServeOptions(backend="python", preprocess="model").instances
        1
    """

    name: str | None = None
    backend: str | None = None
    preprocess: str = "none"
    variant: str = "reduced"
    version: int | None = None
    max_batch: int | None = None
    delay: int = 0
    instances: int = 1
    threads: int | None = None
    warmup: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("backend", self.backend, BACKENDS), ("preprocess", self.preprocess, PREPROCESS),
            ("variant", self.variant, tuple(VARIANT_FOLDERS)),
        ):  # fmt: skip
            if value is not None and value not in known:
                raise InputError(f"{name} is {value!r}", expected=f"one of {', '.join(known)}")
        for name in ("version", "max_batch", "instances", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InputError(f"{name} is {number}", expected="1 or more")
        if self.delay < 0:
            raise InputError(f"delay is {self.delay} microseconds", expected="0 or more")
        if self.preprocess == "model" and self.backend not in (None, "python"):
            raise InputError(
                f"the backend {self.backend} takes no image files",
                expected="preprocess='ensemble', or backend='python'",
            )


@dataclass(frozen=True)
class Served:
    """What was written to the repository.

    Attributes:
        name: Name of the model that clients use.
        version: Version number.
        folders: Folders of the models, that of the client's model last.
        backend: Backend that runs the engine.
        max_batch: Largest batch that the server forms, `max_batch_size` in its configuration.
        max_batch_reason: Reason for it.
        server: Which server versions support the engine, in words; None if the bundle does not say.
    """

    name: str
    version: int
    folders: tuple[Path, ...]
    backend: str
    max_batch: int
    max_batch_reason: str
    server: str | None = None


@dataclass(frozen=True)
class _Model:
    """A model to write: configuration, files beside it, and files of its version."""

    config: ModelConfig
    beside: dict[str, bytes]
    inside: dict[str, bytes]


def write_repository(bundle: str | Path, repository: str | Path, options: ServeOptions | None = None) -> Served:
    """Verify a bundle and add it to a model repository, as a new model or as the next version of one.

    Args:
        repository: Folder of models; created if missing.
        options: How to serve it; None for the defaults.

    Raises:
        BundleError: if the bundle is not valid, its signature differs from that of the model's other versions, the
            version exists, or writing fails. Nothing is left half-written.
        InputError: if the server does not support the name, or the engine was not built for the batch.
        EngineUnavailableError: if tritonclient is not installed.

    Examples:
        >>> from vp_engines import ServeOptions, write_repository
        >>> served = write_repository("tiny.vpe", "models", ServeOptions(backend="python"))
        >>> served.name, served.version
        ('tiny', 1)
    """
    options = options or ServeOptions()
    definitions()
    found, repository = read_bundle(bundle), Path(os.path.abspath(repository))
    if options.variant not in found.manifest.variants:
        raise BundleIncompatibleError(f"{bundle} holds no {options.variant} model", expected="variant='reduced'")
    batch = _max_batch(found, options)
    models, backend = _models(found, options, batch[0])
    if not repository.is_dir():
        check_parent(repository)
    repository.mkdir(parents=True, exist_ok=True)
    places = [repository / model.config.name for model in models]
    for model, place in zip(models, places, strict=True):
        _check_place(model, place)
    taken = [number for place in places for number in _versions(place)]
    version = options.version if options.version is not None else max(taken, default=0) + 1
    done: list[Path] = []
    try:
        for model, place in zip(models, places, strict=True):  # the client's model comes last: it needs the others
            done.append(_publish(model, place, version, found))
    except BaseException:
        for folder in done:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    server = _server(found, options.variant, backend)
    return Served(models[-1].config.name, version, tuple(places), backend, *batch, server)


def _server(bundle: Bundle, variant: str, backend: str) -> str | None:
    """Which server versions support the engine."""
    manifest = bundle.manifest
    requirements = manifest.variants["dense" if variant == "dense" else "reduced"].requirements
    if backend == "onnxruntime":  # the server reads the file itself, so only the graph's requirements matter
        oldest = requirements.get("onnxruntime_min_graph", requirements.get("onnxruntime_min"))
        return None if oldest is None else server_needed(str(oldest))
    if manifest.engine.name not in ENGINES or not requirements:
        return None
    needs = get_backend(manifest.engine.name).needs(requirements)
    package = next(iter(needs))
    return f"a server {'whose Python has' if backend == 'python' else 'with'} {package} {needs[package]}"


def _max_batch(bundle: Bundle, options: ServeOptions) -> tuple[int, str]:
    """Largest batch that the server forms, and why."""
    sizes = bundle.manifest.engine.batch
    if sizes is not None and sizes.min > 1:
        raise BundleIncompatibleError(
            f"the engine takes {sizes.min} images at least", expected="1", fix="export with batches from 1 on"
        )
    if options.max_batch is None:
        measured = batching.throughput(bundle.contents.get("report.json"), options.variant)
        return batching.largest(measured, sizes.max if sizes else None)
    if sizes is not None and options.max_batch > sizes.max:
        raise InputError(f"max_batch is {options.max_batch}", expected=f"at most {sizes.max}, as the engine has it")
    return options.max_batch, "as asked"


def _models(bundle: Bundle, options: ServeOptions, max_batch: int) -> tuple[list[_Model], str]:
    """Models to write, the client's last, and the backend of the engine."""
    manifest = bundle.manifest
    name = manifest.name if options.name is None else options.name
    if not _NAME.fullmatch(name):
        raise InputError(
            f"the model name {name[:100]!r}",
            expected="at most 100 letters, digits and . _ - (a letter or digit first)",
            fix="choose another one with `name`",
        )
    native = NATIVE.get(manifest.engine.name)
    backend = options.backend or ("python" if native is None or options.preprocess == "model" else native.backend)
    if backend != "python" and (native is None or native.backend != backend):
        raise InputError(
            f"the backend {backend} does not run engines of {manifest.engine.name!r}",
            expected=f"{native.backend} or python" if native else "python",
        )
    measured = batching.throughput(bundle.contents.get("report.json"), options.variant)
    preferred = tuple(batching.preferred(measured, max_batch))
    inputs = tuple(tensor.spec() for tensor in manifest.inputs)
    outputs = tuple(tensor.spec() for tensor in manifest.outputs)
    engine = ModelSpec(
        name=f"{name}_engine" if options.preprocess == "ensemble" else name,
        inputs=inputs, outputs=outputs, max_batch=max_batch, preferred=preferred, delay=options.delay,
        instances=options.instances, gpu=manifest.engine.device == "cuda", labels=manifest.classes is not None,
        warmup=tuple(sorted({1, *preferred, max_batch})) if options.warmup else (),
    )  # fmt: skip
    chosen = _python(engine, bundle, options) if backend == "python" else _native(engine, bundle, options)
    models = [chosen]
    if options.preprocess == "ensemble":
        models = [_preprocessing(name, engine, bundle, options), chosen, _ensemble(name, engine, chosen.config, bundle)]
    return models, backend


def _native(spec: ModelSpec, bundle: Bundle, options: ServeOptions) -> _Model:
    """The engine's artefact, run by a native backend of the server."""
    variant = bundle.manifest.variants["dense" if options.variant == "dense" else "reduced"]
    native = NATIVE[bundle.manifest.engine.name]
    if len(variant.files) > 1:
        raise BundleIncompatibleError(
            f"the engine has {len(variant.files)} files", expected="one, for a backend of the server",
            fix="serve it with `backend=python`",
        )  # fmt: skip
    if native.numbered:
        spec = replace(spec, inputs=_numbered(spec.inputs, "INPUT"), outputs=_numbered(spec.outputs, "OUTPUT"))
    parameters = {}
    if options.threads is not None and native.backend == "onnxruntime":
        parameters["intra_op_thread_count"] = str(options.threads)
    spec = replace(spec, backend=native.backend, platform=native.platform, file=native.file, parameters=parameters)
    return _Model(model_config(spec), _labels(bundle), {native.file: bundle.contents[variant.artefact]})


def _python(spec: ModelSpec, bundle: Bundle, options: ServeOptions) -> _Model:
    """The whole bundle, run by the Python backend."""
    encoded = options.preprocess == "model"
    parameters = {"variant": options.variant, "takes": "encoded" if encoded else "images"}
    if options.threads is not None:
        parameters["threads"] = str(options.threads)
    spec = replace(spec, backend="python", file="model.py", parameters=parameters)
    beside = _labels(bundle)
    if encoded:
        spec, extra = _takes_encoded(spec, bundle)
        beside |= extra
    inside = {"model.py": _model_py("VpModel")}
    inside |= {f"{BUNDLE_FOLDER}/{path}": content for path, content in bundle.contents.items()}
    # The original bytes: rewriting would drop fields of a newer minor version.
    inside[f"{BUNDLE_FOLDER}/{MANIFEST_NAME}"] = (bundle.path / MANIFEST_NAME).read_bytes()
    return _Model(model_config(spec), beside, inside)


def _preprocessing(name: str, engine: ModelSpec, bundle: Bundle, options: ServeOptions) -> _Model:
    """Model that turns image files into inputs of the engine."""
    spec = ModelSpec(
        name=f"{name}_preprocess", inputs=(), outputs=engine.inputs, max_batch=engine.max_batch, backend="python",
        file="model.py", instances=options.instances, warmup=engine.warmup,
    )  # fmt: skip
    spec, beside = _takes_encoded(spec, bundle)
    how = canonical_json(bundle.manifest.preprocessing.model_dump(mode="json"))
    return _Model(model_config(spec), beside, {"model.py": _model_py("VpPreprocessor"), PREPROCESSING_NAME: how})


def _ensemble(name: str, engine: ModelSpec, config: ModelConfig, bundle: Bundle) -> _Model:
    """Ensemble of preprocessing and engine. Its outputs have the bundle's names, whatever the backend calls them."""
    inner = [tensor.name for tensor in engine.inputs]
    spec = ModelSpec(
        name=name, inputs=(ENCODED,), outputs=engine.outputs, max_batch=engine.max_batch, platform="ensemble",
        labels=engine.labels,
        steps=(
            (f"{name}_preprocess", {ENCODED.name: ENCODED.name}, {tensor: tensor for tensor in inner}),
            (
                engine.name,
                {tensor.name: ours for tensor, ours in zip(config.input, inner, strict=True)},
                {tensor.name: ours.name for tensor, ours in zip(config.output, engine.outputs, strict=True)},
            ),
        ),
    )  # fmt: skip
    return _Model(model_config(spec), _labels(bundle), {})


def _takes_encoded(spec: ModelSpec, bundle: Bundle) -> tuple[ModelSpec, dict[str, bytes]]:
    """Change a model's input to image files, and add an image for warm-up."""
    spec = replace(spec, inputs=(ENCODED,))
    if not spec.warmup:
        return spec, {}
    # One image: the file holds the elements of a whole batch.
    spec = replace(spec, warmup=(1,), warmup_file="grey.bin")
    return spec, {"warmup/grey.bin": _grey(*bundle.manifest.preprocessing.input_size[1:])}


def _grey(height: int, width: int) -> bytes:
    """A grey PNG as an element of a BYTES tensor: its length, then the file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(buffer, "PNG")
    return struct.pack("<I", len(buffer.getvalue())) + buffer.getvalue()


def _model_py(name: str) -> bytes:
    return _MODEL.format(module="vp_engines.serving.triton.model", name=name).encode()


def _numbered(tensors: tuple[TensorSpec, ...], kind: str) -> tuple[TensorSpec, ...]:
    return tuple(replace(tensor, name=f"{kind}__{index}") for index, tensor in enumerate(tensors))


def _labels(bundle: Bundle) -> dict[str, bytes]:
    """labels.txt: one class per line, so that clients can request the top classes by name."""
    classes = bundle.manifest.classes
    return {} if classes is None else {LABELS_NAME: "".join(" ".join(c.split()) + "\n" for c in classes).encode()}


def _versions(place: Path) -> list[int]:
    return [int(entry.name) for entry in place.iterdir() if entry.name.isdigit()] if place.is_dir() else []


def _check_place(model: _Model, place: Path) -> None:
    """Check that `model` can be added as a version at `place`.

    Raises:
        BundleError: if it cannot.
    """
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not (place / CONFIG_NAME).is_file():
        raise BundleError(f"{place} is not a model of a repository", fix="choose another `name`")
    there = from_text((place / CONFIG_NAME).read_text())
    old, new = signature(there), signature(model.config)
    if old != new:
        raise BundleError(
            f"the versions of {place.name!r} have {says(old)}, and this bundle has {says(new)}",
            expected="the same inputs and outputs", fix="choose another `name`",
        )  # fmt: skip
    kinds = [one.backend or one.platform for one in (there, model.config)]
    if kinds[0] != kinds[1]:
        raise BundleError(
            f"the versions of {place.name!r} run under {kinds[0]}, and this one would under {kinds[1]}",
            expected="one backend a model", fix="choose another `name` or `backend`",
        )  # fmt: skip
    labels = place / LABELS_NAME
    if (labels.read_bytes() if labels.is_file() else None) != model.beside.get(LABELS_NAME):
        raise BundleError(
            f"the versions of {place.name!r} have other class names", expected=f"those of {labels}",
            fix="choose another `name`",
        )  # fmt: skip


def _publish(model: _Model, place: Path, version: int, bundle: Bundle) -> Path:
    """Put a new model or version in place atomically, so that a polling server sees all of it or nothing.

    Returns:
        The new folder: the model's or the version's.
    """
    text = to_text(model.config).encode()
    with building(_beside(place)) as folder:
        new = not os.path.lexists(place)
        if os.path.lexists(place / str(version)):
            raise BundleError(f"{place} has a version {version}", expected="a new number", fix="choose the next one")
        inside = folder / str(version)
        inside.mkdir()
        for path, content in model.inside.items():
            _store(inside / path, content)
        if (inside / BUNDLE_FOLDER).is_dir() and verify_bundle(inside / BUNDLE_FOLDER).digest != bundle.digest:
            raise BundleError(f"{bundle.path} changed while it was copied", fix="try again")
        for path, content in ({**model.beside, CONFIG_NAME: text} if new else {CONFIG_NAME: text}).items():
            _store(folder / path, content)
        if new:
            put_in_place(folder, place)
            return place
        put_in_place(inside, place / str(version))
        # Preferred batch sizes may have changed with the engine.
        os.replace(folder / CONFIG_NAME, place / CONFIG_NAME)
    return place / str(version)


def _beside(place: Path) -> Path:
    """Where to build a model before moving it into place.

    A polling server takes every folder in a repository for a model, hidden ones included, so build beside the
    repository; inside it if that is on another disk or not writable.
    """
    repository = place.parent
    parent = repository.parent
    if os.access(parent, os.W_OK | os.X_OK) and os.stat(parent).st_dev == os.stat(repository).st_dev:
        return parent / f"{repository.name}.{place.name}"
    return place


def _store(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
