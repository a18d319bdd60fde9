"""Manifest of a bundle: schema, canonical encoding, and checks of an untrusted manifest.

Not imported by `import vp_engines`: only opening a bundle needs pydantic.

The encoding is canonical: sorted keys, two spaces of indent, UTF-8, a final newline. The file has one more member than
the schema, `digest`: the sha256 of the canonical form of all others, so any changed byte of the manifest is detected,
as in every other file. (It is a checksum, not a signature: whoever rewrites the manifest on purpose can rewrite the
digest too. Compare the digest printed by vp-inspect with one that you trust.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from vp_engines.backends.base import TensorSpec
from vp_engines.errors import BundleCorruptError, BundleError, BundleIncompatibleError

FORMAT = "vpe"
FORMAT_VERSION = "1.0"
MANIFEST_NAME = "manifest.json"
VARIANT_FOLDERS = {"reduced": "engine", "dense": "dense"}

# Far above any real bundle, and harmless to read from an untrusted one.
MAX_MANIFEST_BYTES = 8 << 20
MAX_JSON_DEPTH = 32
MAX_FILES = 1000
MAX_FILE_BYTES = 32 << 30
MAX_PATH_PARTS = 8
MAX_PATH_LENGTH = 400

# An allow-list, which rules out '..', '/x', 'C:', '\\', NUL, control characters, hidden files, and different encodings
# of one Unicode name.
_PATH_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+-]{0,126}[A-Za-z0-9_+-])?")
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789"}
)
_VERSION = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})")

T = TypeVar("T")


def check_path(path: str) -> str:
    """Return `path` if it is a valid file path inside a bundle: relative, POSIX, plain ASCII parts, bounded in length.

    Raises:
        ValueError: if it is not; the message says why.
    """
    parts = path.split("/")
    if len(path) > MAX_PATH_LENGTH or len(parts) > MAX_PATH_PARTS:
        raise ValueError(f"a path of {len(path)} characters and {len(parts)} parts is too long")
    for part in parts:
        if not _PATH_PART.fullmatch(part) or part.split(".")[0].lower() in _WINDOWS_DEVICES:
            raise ValueError(f"unsafe path {path[:100]!r} (relative, parts of letters, digits and _ . + - only)")
    return path


def _pair(value: object) -> object:
    return (value, value) if type(value) is int else value


def _real_time(value: str) -> str:
    datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ")  # ValueError for e.g. 31 February
    return value


# Accept lists from Python; the items stay strict.
Many = Annotated[tuple[T, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Text = Annotated[str, Field(max_length=4000)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BundlePath = Annotated[str, AfterValidator(check_path)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Spread = Annotated[float, Field(allow_inf_nan=False, gt=0)]
Size = Annotated[tuple[Positive, Positive], Field(strict=False)]
SquareOrSize = Annotated[Size, BeforeValidator(_pair)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class ToolInfo(_Part):
    """The program that wrote the bundle."""

    name: Name
    version: Name


class FileEntry(_Part):
    """One file of the bundle: path inside it, size in bytes, and sha256 of its content in hex."""

    path: BundlePath
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


class BatchRange(_Part):
    """Batch sizes (images) that the engine was built for."""

    min: Positive
    opt: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes min {self.min}, opt {self.opt}, max {self.max} are not in order")
        return self


class EngineInfo(_Part):
    """The engine that runs the artefacts; `batch` is None if it supports any batch size."""

    name: Name
    version: Name
    precision: Literal["fp32", "fp16", "bf16"]
    device: Literal["cpu", "cuda"]
    batch: BatchRange | None = None


class VariantInfo(_Part):
    """One model of the bundle. Paths start with the variant's folder (see VARIANT_FOLDERS)."""

    artefact: BundlePath
    files: Annotated[tuple[BundlePath, ...], Field(strict=False, min_length=1)]
    requirements: dict[str, JsonValue] = {}
    notes: Many[Text] = ()


class TensorInfo(_Part):
    """An input or output; a string in `shape` is a dynamic axis."""

    name: Name
    dtype: Name
    shape: Many[Positive | Name]

    def spec(self) -> TensorSpec:
        """Convert to the form that backends use."""
        return TensorSpec(self.name, self.dtype, tuple(self.shape))


class Preprocessing(_Part):
    """Preprocessing of an RGB image, in the terms of timm's eval transform.

    Attributes:
        input_size: [3, height, width] of the engine's input.
        resize: floor(size / crop_pct). With `center`, an int is the length of the shorter side, and [height, width] a
            box that the image is scaled to cover, keeping its aspect ratio. With `squash`, the image is resized to
            exactly that size; with `border`, scaled to fit inside (an int n means [n, n] for both). None: not resized.
        crop_mode: `center` and `squash` crop input_size from the centre, padding with black if too small; `border` pads
            with the mean colour.
        mean, std: Per channel, on the scale 0 to 1.

    Examples:
        >>> import vp_engines
        >>> print(vp_engines.read_manifest("tiny.vpe").preprocessing.summary())
        resize shorter side 71 (bicubic), crop 64x64, center, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5
    """

    input_size: Annotated[tuple[Literal[3], Positive, Positive], Field(strict=False)]
    resize: Positive | Size | None
    crop_mode: Literal["center", "squash", "border"]
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"]
    mean: Annotated[tuple[Finite, Finite, Finite], Field(strict=False)]
    std: Annotated[tuple[Spread, Spread, Spread], Field(strict=False)]

    def facts(self) -> dict[str, str]:
        """Processing steps in order, by name, in readable form."""
        _, height, width = self.input_size
        numbers = {key: ", ".join(f"{value:.6g}" for value in getattr(self, key)) for key in ("mean", "std")}
        return {"resize": self._resize_words(), "crop": f"{height}x{width}, {self.crop_mode}",
                "interpolation": self.interpolation if self.resize is not None else "none", **numbers}  # fmt: skip

    def summary(self) -> str:
        """One line: resize, crop, mean and std."""
        facts = self.facts()
        resize = f"resize {facts['resize']} ({facts['interpolation']})" if self.resize is not None else "no resize"
        return f"{resize}, crop {facts['crop']}, mean {facts['mean']}, std {facts['std']}"

    def _resize_words(self) -> str:
        if self.resize is None:
            return "none"
        if isinstance(self.resize, int):
            side = f"{self.resize}x{self.resize}" if self.crop_mode != "center" else f"shorter side {self.resize}"
            return {"center": side, "squash": f"to {side}", "border": f"within {side}"}[self.crop_mode]
        height, width = self.resize
        return {"center": "cover ", "squash": "to ", "border": "within "}[self.crop_mode] + f"{height}x{width}"


class ModelInfo(_Part):
    """The exported model; sizes are [height, width] in pixels (an int in Python means a square)."""

    name: Name
    num_classes: Count
    img_size: SquareOrSize
    patch_size: SquareOrSize
    weights_sha256: Sha256
    weights_source: Text


class PlanInfo(_Part):
    """The plan (stored in the file `path`), its MACs per image, and the tokens that remain."""

    path: BundlePath
    fingerprint: Name
    method: Name
    macs_dense: Count
    macs_reduced: Count
    tokens: Many[Count | Many[Count]]


class ValidationInfo(_Part):
    """Verdict of the validation in the report, its grounds, and its wording.

    Attributes:
        status: "passed" (a budget was set and met, and nothing is slower), "failed" (a budget was missed, or outputs
            are not finite), "measured" (no budget, or slower) or "unvalidated" (outputs not compared).
    """

    status: Literal["passed", "failed", "measured", "unvalidated"]
    accuracy: Literal["measured", "unmeasured"]
    latency: Literal["measured", "unmeasured"]
    summary: Text


class Manifest(_Part):
    """Everything known about a bundle before deserialising it.

    Examples:
        >>> import vp_engines
        >>> manifest = vp_engines.read_manifest("tiny.vpe")
        >>> manifest.inputs[0].shape, sorted(manifest.variants)
        (('batch', 3, 64, 64), ['dense', 'reduced'])
    """

    format: Literal["vpe"]
    format_version: Name
    name: Name
    created: Annotated[
        str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$"), AfterValidator(_real_time)
    ]  # UTC, ISO 8601
    tool: ToolInfo
    files: Annotated[tuple[FileEntry, ...], Field(strict=False, min_length=1, max_length=MAX_FILES)]
    engine: EngineInfo
    variants: dict[Literal["reduced", "dense"], VariantInfo]
    inputs: Annotated[tuple[TensorInfo, ...], Field(strict=False, min_length=1)]
    outputs: Annotated[tuple[TensorInfo, ...], Field(strict=False, min_length=1)]
    preprocessing: Preprocessing
    classes: Many[Text] | None
    model: ModelInfo
    plan: PlanInfo
    validation: ValidationInfo
    kernels: Name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [entry.path for entry in self.files]
        _check_paths_together(paths)
        known = set(paths)
        if "reduced" not in self.variants:
            raise ValueError("variants has no 'reduced'")
        for key, variant in self.variants.items():
            folder = VARIANT_FOLDERS[key] + "/"
            if stray := [path for path in variant.files if path not in known or not path.startswith(folder)]:
                raise ValueError(f"variant '{key}' names {stray[0]!r}, which is not a listed file in {folder}")
            if variant.artefact not in variant.files:
                raise ValueError(f"variant '{key}' starts from {variant.artefact!r}, which is not among its files")
        if self.plan.path not in known:
            raise ValueError(f"the plan {self.plan.path!r} is not a listed file")
        if self.classes is not None and len(self.classes) != self.model.num_classes:
            raise ValueError(f"{len(self.classes)} class names for a model of {self.model.num_classes} classes")
        if self.inputs[0].shape[1:] != self.preprocessing.input_size:
            raise ValueError("the first input does not take what the preprocessing makes")
        return self

    def document(self) -> dict[str, Any]:
        """The manifest as plain JSON values, without its digest."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """sha256 (hex) of the canonical form. Identifies the bundle, since it covers every file's hash.

        For a manifest of a newer minor version, whose unknown fields are not included here, use `Bundle.digest`.
        """
        return hashlib.sha256(canonical_json(self.document())).hexdigest()

    def to_bytes(self) -> bytes:
        """Content of manifest.json.

        Raises:
            BundleError: if it is larger than readers accept.
        """
        data = canonical_json({**self.document(), "digest": self.digest()})
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"the manifest takes {len(data)} bytes", expected=f"at most {MAX_MANIFEST_BYTES}")
        return data


def _check_paths_together(paths: Sequence[str]) -> None:
    """Raise ValueError if two paths collide on a case-insensitive disk, or a path is both a file and a folder."""
    seen = {MANIFEST_NAME: MANIFEST_NAME}
    for path in paths:
        if path.lower() in seen:
            raise ValueError(f"{path!r} and {seen[path.lower()]!r} are the same file where case is ignored")
        seen[path.lower()] = path
    folders: dict[str, str] = {}  # lower case -> spelling used
    for path in paths:
        parts = path.split("/")
        for end in range(1, len(parts)):
            folder = "/".join(parts[:end])
            if folder.lower() in seen or folders.setdefault(folder.lower(), folder) != folder:
                raise ValueError(f"folder {folder!r} of {path!r} clashes with another name")


def utc_now() -> str:
    """The current time, for `created`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_manifest(**fields: Any) -> Manifest:
    """Make a manifest of the current format from its fields (models, or plain dicts and lists).

    Raises:
        BundleError: if a field is missing, unknown or invalid.
    """
    try:
        return Manifest.model_validate({"format": FORMAT, "format_version": FORMAT_VERSION, **fields})
    except ValidationError as error:
        raise BundleError(f"cannot make a manifest: {_explain(error)}") from None


def canonical_json(document: object) -> bytes:
    """Canonical encoding of a JSON document.

    Raises:
        ValueError: if it has NaN, an infinity or a lone surrogate, which JSON cannot represent.
    """
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def parse_manifest(data: bytes) -> tuple[Manifest, str]:
    """Check the content of a manifest file and return the manifest with its digest (sha256, hex).

    Raises:
        BundleCorruptError: if it is not JSON within the limits, or has a duplicate key, a wrong digest or an invalid
            field.
        BundleIncompatibleError: if the format has another major version.
    """
    document = _parse_json(data)
    newer_minor = _check_version(document)
    told = document.pop("digest", None)
    try:
        canonical = canonical_json(document)
    except ValueError as error:
        raise _corrupt(f"holds what JSON cannot ({error})") from None
    digest = hashlib.sha256(canonical).hexdigest()
    if told != digest:
        raise _corrupt(f"has the digest {str(told)[:64]!r}", expected=digest)
    try:
        return Manifest.model_validate_json(canonical), digest
    except ValidationError as error:
        if not newer_minor:
            raise _corrupt(_explain(error)) from None
        _drop_unknown(document, error)
    try:
        return Manifest.model_validate_json(canonical_json(document)), digest
    except ValidationError as error:
        raise _corrupt(_explain(error)) from None


def _corrupt(problem: str, expected: str = "") -> BundleCorruptError:
    fix = "copy or export the bundle again"
    return BundleCorruptError(f"{MANIFEST_NAME}: {problem}", expected=expected, fix=fix)


def _parse_json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise _corrupt(f"is {len(data)} bytes long", expected=f"at most {MAX_MANIFEST_BYTES}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a key is given twice in one object")
        return members

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _corrupt(
            f"cannot be read as JSON ({type(error).__name__}: {' '.join(str(error)[:200].split())})"
        ) from None
    if not isinstance(document, dict):
        raise _corrupt(f"holds a {type(document).__name__}", expected="a JSON object")
    level: list[Any] = [document]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for value in level if isinstance(value, (dict, list)) for child in _children(value)]
        if not level:
            return document
    raise _corrupt("is nested too deeply", expected=f"at most {MAX_JSON_DEPTH} levels")


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _check_version(document: dict[str, Any]) -> bool:
    """Whether a newer minor version wrote the document."""
    if document.get("format") != FORMAT:
        raise _corrupt(f"has format {str(document.get('format'))[:40]!r}", expected=f"'{FORMAT}'")
    version = document.get("format_version")
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise _corrupt(f"has format_version {str(version)[:40]!r}", expected="two numbers, as in '1.0'")
    major, minor = int(match[1]), int(match[2])
    ours = [int(number) for number in FORMAT_VERSION.split(".")]
    if major != ours[0]:
        newer = major > ours[0]
        raise BundleIncompatibleError(
            f"the bundle has format version {version}",
            expected=f"{ours[0]}.x",
            fix="upgrade with 'pip install -U vp-export'" if newer else "export the model again with this version",
        )
    return minor > ours[1]


def _drop_unknown(document: dict[str, Any], error: ValidationError) -> None:
    """Remove members and variants that this version does not know from `document`."""
    for problem in error.errors(include_url=False, include_input=False):
        loc = list(problem["loc"])
        if problem["type"] == "literal_error" and loc[-1] == "[key]":
            loc.pop()
        elif problem["type"] != "extra_forbidden":
            continue
        parent: Any = document
        try:
            for step in loc[:-1]:
                parent = parent[step]
            del parent[loc[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # inside a member already removed


def _explain(error: ValidationError) -> str:
    """First problem of a validation, in one line."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(str(step) for step in problems[0]["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = f"{where}: {problems[0]['msg']}" if where else problems[0]["msg"]
    return ascii(" ".join(text.split())[:400])[1:-1] + more
