"""The manifest: accepted and rejected documents; only BundleErrors are ever raised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.bundle_samples import document, fields, signed, write_sample
from vp_engines.errors import BundleCorruptError, BundleError, BundleIncompatibleError
from vp_engines.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    canonical_json,
    check_path,
    make_manifest,
    parse_manifest,
)

FILE_LIST = [
    {"path": path, "size": 1, "sha256": "0" * 64}
    for path in ("dense/model.onnx", "engine/model.onnx", "engine/more/weights.bin", "plan.json")
]


def sample(**changes: Any) -> Manifest:
    return make_manifest(**fields(**{"files": FILE_LIST, **changes}))


def altered(path: str, value: object) -> bytes:
    """Bytes of a manifest with one value replaced (or removed: ...) and a correct digest."""
    changed = sample().document()
    *parents, last = path.split(".")
    here: Any = changed
    for step in parents:
        here = here[int(step)] if isinstance(here, list) else here[step]
    key = int(last) if isinstance(here, list) else last
    if value is ...:
        del here[key]
    else:
        here[key] = value
    return signed(changed)


def test_bytes_come_back_as_the_same_manifest() -> None:
    manifest = sample()
    again, digest = parse_manifest(manifest.to_bytes())
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert digest == manifest.digest() == again.digest()


def test_bytes_are_canonical() -> None:
    data = sample().to_bytes()
    assert data == canonical_json(json.loads(data))
    reordered = {key: fields()[key] for key in sorted(fields(), reverse=True)}
    assert make_manifest(files=FILE_LIST, **reordered).to_bytes() == data


def test_digest_changes_with_any_file_hash() -> None:
    other = copy.deepcopy(FILE_LIST)
    other[0]["sha256"] = "1" + "0" * 63
    assert sample(files=other).digest() != sample().digest()


def test_lists_and_ints_from_python_become_what_the_schema_holds() -> None:
    manifest = sample()
    assert manifest.model.img_size == (4, 4)
    assert manifest.model.patch_size == (2, 2)
    assert manifest.plan.tokens == (5, 5, (4, 3))
    assert manifest.inputs[0].spec().shape == ("batch", 3, 4, 4)


def test_manifest_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        sample().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", ...),
        ("name", ""),
        ("name", "a\nb"),
        ("name", 5),
        ("surprise", 1),
        ("engine.surprise", 1),
        ("engine.precision", "int8"),
        ("engine.device", "tpu"),
        ("engine.batch", {"min": 8, "opt": 4, "max": 64}),
        ("engine.batch", {"min": 0, "opt": 4, "max": 64}),
        ("files.0.size", -1),
        ("files.0.size", 1.0),
        ("files.0.size", True),
        ("files.0.size", "1"),
        ("files.0.size", 1 << 60),
        ("files.0.sha256", "0" * 63),
        ("files.0.sha256", "A" * 64),
        ("files", []),
        ("created", "2026-02-31T00:00:00Z"),
        ("created", "yesterday"),
        ("variants.reduced", ...),
        ("variants.int8", {"artefact": "engine/model.onnx", "files": ["engine/model.onnx"]}),
        ("variants.reduced.artefact", "engine/other.onnx"),
        ("variants.reduced.files.1", "engine/unlisted.bin"),
        ("variants.reduced.files", ["engine/model.onnx", "dense/model.onnx"]),
        ("variants.reduced.files", []),
        ("plan.path", "other.json"),
        ("plan.tokens", ["5"]),
        ("classes", ["cat"]),
        ("preprocessing.std.1", 0.0),
        ("preprocessing.mean", [0.5, 0.5]),
        ("preprocessing.input_size", [3, 8, 8]),
        ("preprocessing.input_size", [1, 4, 4]),
        ("preprocessing.resize", [4]),
        ("preprocessing.resize", 0),
        ("preprocessing.crop_mode", "left"),
        ("preprocessing.interpolation", "random"),
        ("validation.accuracy", "perfect"),
        ("format", "onnx"),
        ("format_version", 1.0),
        ("format_version", "1"),
        ("format_version", "01.0"),
    ],
)
def test_a_wrong_field_is_corrupt_and_explained_in_one_line(path: str, value: object) -> None:
    with pytest.raises(BundleCorruptError) as caught:
        parse_manifest(altered(path, value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "C:x", "C:/x", "a\x00b", "a\nb",
        "a\x7f", " a", "a ", "a.", ".hidden", "a/.git/x", "żółw", "a" * 129, "/".join("a" * 9),
        "/".join(["a" * 100] * 5), "con", "a/NUL", "aux.txt", "~x", "a:b", "a*", "a?", "-rf",
    ],
)  # fmt: skip
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_path(path)
    files = [*FILE_LIST, {"path": path, "size": 1, "sha256": "0" * 64}]
    with pytest.raises(BundleCorruptError):
        parse_manifest(altered("files", files))


@pytest.mark.parametrize("path", ["plan.json", "engine/model.onnx", "dense/a-b_c+d.1.bin", "a/b/c/d/e/f/g/h"])
def test_ordinary_paths_are_taken(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "extra",
    ["plan.json", "PLAN.json", "Manifest.json", "plan.json/x", "PLAN.JSON/x", "ENGINE/x.bin", "engine", "Engine"],
)
def test_paths_that_clash_are_refused(extra: str) -> None:
    files = [*FILE_LIST, {"path": extra, "size": 1, "sha256": "0" * 64}]
    with pytest.raises(BundleCorruptError, match=r"same file|clashes"):
        parse_manifest(altered("files", files))


def test_too_many_files_are_refused() -> None:
    files = FILE_LIST + [{"path": f"f{i}", "size": 1, "sha256": "0" * 64} for i in range(1000)]
    with pytest.raises(BundleCorruptError, match="1000"):
        parse_manifest(altered("files", files))


@pytest.mark.parametrize(
    ("version", "fix"), [("2.0", "upgrade"), ("17.3", "upgrade"), ("0.9", "export the model again")]
)
def test_another_major_version_is_named_with_what_to_do(version: str, fix: str) -> None:
    with pytest.raises(BundleIncompatibleError) as caught:
        parse_manifest(altered("format_version", version))
    assert version in caught.value.found
    assert caught.value.expected == "1.x"
    assert fix in caught.value.fix


def test_a_newer_minor_version_may_say_more() -> None:
    changed = sample().document()
    changed["format_version"] = "1.7"
    changed["novelty"] = {"a": [1]}
    changed["engine"]["novelty"] = 1
    changed["files"][0]["novelty"] = 1
    changed["variants"]["int8"] = {"anything": 1}
    manifest, digest = parse_manifest(signed(changed))
    assert manifest == sample().model_copy(update={"format_version": "1.7"})
    assert digest != manifest.digest()  # the digest of what was read, not of what was understood


def test_a_newer_minor_version_must_still_say_what_we_need() -> None:
    changed = sample().document()
    changed |= {"format_version": "1.7", "novelty": 1}
    del changed["engine"]["precision"]
    with pytest.raises(BundleCorruptError, match=r"engine\.precision"):
        parse_manifest(signed(changed))


def test_the_current_version_may_not_say_more() -> None:
    with pytest.raises(BundleCorruptError, match="novelty"):
        parse_manifest(altered("novelty", 1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"format": "vpe", "format": "vpe"}', "twice"),
        (b'{"format": "vpe", "a": {"b": 1, "b": 1}}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' * 100_000, "JSON"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"format": "vpe", "format_version": "1.0", "a": 1e999}', "cannot"),
        (b'{"format": "vpe", "format_version": "1.0", "a": "\\ud800"}', "cannot"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "long"),
    ],
    ids=range(16),
)
def test_hostile_json_is_corrupt(data: bytes, reason: str) -> None:
    with pytest.raises(BundleCorruptError, match=reason):
        parse_manifest(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_cannot_be_written(value: float) -> None:
    with pytest.raises((BundleError, ValueError)):
        sample(preprocessing={**fields()["preprocessing"], "mean": [value, 0.0, 0.0]}).to_bytes()


def test_make_manifest_names_the_field() -> None:
    with pytest.raises(BundleError, match=r"engine\.version"):
        sample(engine={"name": "ort", "precision": "fp32", "device": "cpu"})


ORIGINAL = sample()
ORIGINAL_BYTES = ORIGINAL.to_bytes()

mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "delete", "insert", "repeat", "cut"]),
        st.integers(0, len(ORIGINAL_BYTES) - 1),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


@given(mutations)
@settings(max_examples=500, deadline=None)
def test_mutated_bytes_give_a_bundle_error_or_the_same_manifest(steps: list[tuple[str, int, bytes]]) -> None:
    data = bytearray(ORIGINAL_BYTES)
    for kind, at, piece in steps:
        if kind == "flip":
            data[at : at + 1] = bytes(byte ^ (1 << piece[0] % 8) for byte in data[at : at + 1])
        elif kind == "delete":
            del data[at : at + len(piece)]
        elif kind == "insert":
            data[at:at] = piece
        elif kind == "repeat":
            data[at:at] = data[at : at + 50]
        else:
            del data[at:]
    try:
        manifest, digest = parse_manifest(bytes(data))
    except BundleError:
        return
    assert manifest == ORIGINAL
    assert digest == ORIGINAL.digest()


json_values = st.recursive(
    # No subnormals: another library may have set this thread to flush them to zero.
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_forged_documents_give_a_bundle_error_or_a_manifest(data: st.DataObject) -> None:
    """Mutated values with a correct digest pass the checksum and reach the schema."""
    changed: Any = ORIGINAL.document()
    here = changed
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(here[key], (dict, list)) and here[key] and data.draw(st.booleans()):
            here = here[key]
            continue
        if data.draw(st.booleans()):
            here[key] = data.draw(json_values)
        else:
            del here[key]
        break
    try:
        raw = signed(changed)
    except ValueError:  # NaN and such
        return
    try:
        manifest, _ = parse_manifest(raw)
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(manifest, Manifest)


def test_manifest_on_disk_is_the_canonical_form(tmp_path: Path) -> None:
    manifest = write_sample(tmp_path / "a.vpe")
    assert (tmp_path / "a.vpe" / "manifest.json").read_bytes() == manifest.to_bytes()
    assert document(tmp_path / "a.vpe") == manifest.document()


@pytest.mark.parametrize("status", ["passed", "failed", "measured", "unvalidated"])
def test_every_status_of_a_verdict_is_kept(status: str) -> None:
    words = {"status": status, "accuracy": "measured", "latency": "measured", "summary": "in words"}
    assert parse_manifest(sample(validation=words).to_bytes())[0].validation.status == status


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "resize shorter side 4 (bicubic), crop 4x4, center"),
        ({"resize": (5, 6)}, "resize cover 5x6 (bicubic), crop 4x4, center"),
        ({"resize": (5, 6), "crop_mode": "squash"}, "resize to 5x6 (bicubic), crop 4x4, squash"),
        ({"resize": 5, "crop_mode": "squash"}, "resize to 5x5 (bicubic), crop 4x4, squash"),
        (
            {"resize": 5, "crop_mode": "border", "interpolation": "lanczos"},
            "resize within 5x5 (lanczos), crop 4x4, border",
        ),
        ({"resize": None}, "no resize, crop 4x4, center"),
    ],
)
def test_preprocessing_in_one_line(change: dict[str, Any], words: str) -> None:
    spec = sample(preprocessing={**fields()["preprocessing"], **change}).preprocessing
    assert spec.summary() == f"{words}, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    assert list(spec.facts()) == ["resize", "crop", "interpolation", "mean", "std"]
