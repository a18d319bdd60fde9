"""Damaged and malicious bundles: each is rejected quickly, with a BundleError that names the file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.bundle_samples import FILES, document, forge, write_sample
from vp_engines import bundle as bundle_module
from vp_engines.bundle import read_bundle, read_manifest, verify_bundle
from vp_engines.errors import BundleCorruptError, BundleError, BundleIncompatibleError
from vp_engines.manifest import MAX_MANIFEST_BYTES, FileEntry

pytestmark = pytest.mark.timeout(600)  # a FIFO that blocks the reader must fail the test, not hang the suite

ALL = [*FILES, "manifest.json"]
NOT_EMPTY = [name for name in ALL if FILES.get(name) != b""]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The unmodified sample bundle."""
    write_sample(tmp_path / "a.vpe")
    verify_bundle(tmp_path / "a.vpe")
    return tmp_path / "a.vpe"


def refused(out: Path, name: str) -> BundleCorruptError:
    """The error of reading `out`, which must name `name`, be one line, and not depend on what is kept."""
    with pytest.raises(BundleCorruptError) as caught:
        verify_bundle(out)
    with pytest.raises(BundleCorruptError) as kept:
        read_bundle(out)
    assert str(kept.value) == str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", NOT_EMPTY)
def test_a_flipped_bit(out: Path, name: str, where: str) -> None:
    data = bytearray((out / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 0x04
    (out / name).write_bytes(data)
    refused(out, name)


def test_every_flipped_bit_of_the_manifest_is_found_or_means_nothing(out: Path) -> None:
    manifest = read_manifest(out)
    path = out / "manifest.json"
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        data = bytearray(sound)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(data)
        with contextlib.suppress(BundleError):
            assert read_manifest(out) == manifest


@pytest.mark.parametrize("name", NOT_EMPTY)
@pytest.mark.parametrize("keep_bytes", [0, 1, -2])
def test_a_truncated_file(out: Path, name: str, keep_bytes: int) -> None:
    data = (out / name).read_bytes()
    (out / name).write_bytes(data[:keep_bytes])
    refused(out, name)


@pytest.mark.parametrize("name", ALL)
def test_a_file_with_more_at_its_end(out: Path, name: str) -> None:
    with open(out / name, "ab") as file:
        file.write(b"}")
    refused(out, name)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file(out: Path, name: str) -> None:
    (out / name).unlink()
    assert "missing" in str(refused(out, name))


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "engine/extra.bin", "engine/more/deep/x", "żółw", "a\nb"])
def test_an_extra_file(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"")
    assert "not in the manifest" in str(refused(out, repr(name)[1:-1]))


@pytest.mark.parametrize("name", ["empty", "engine/empty"])
def test_an_extra_empty_folder(out: Path, name: str) -> None:
    (out / name).mkdir()
    assert "not in the manifest" in str(refused(out, name))


def test_a_folder_where_a_file_should_be(out: Path) -> None:
    (out / "plan.json").unlink()
    (out / "plan.json").mkdir()
    refused(out, "plan.json")


def test_several_problems_are_all_named(out: Path) -> None:
    (out / "plan.json").unlink()
    (out / "extra").write_bytes(b"")
    error = refused(out, "'plan.json' is missing")
    assert "'extra' is not in the manifest" in str(error)


def test_thousands_of_extra_files_are_cut_short(out: Path) -> None:
    for number in range(2100):
        (out / f"x{number}").touch()
    assert len(str(refused(out, "too much"))) < 300


def test_a_deep_tree_is_cut_short(out: Path) -> None:
    (out / "/".join(["d"] * 300)).mkdir(parents=True)
    assert "too much" in str(refused(out, "d/d/d"))


@pytest.mark.parametrize("name", ALL)
def test_a_symlink_to_the_same_content(out: Path, name: str) -> None:
    elsewhere = out.parent / "elsewhere"
    (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    refused(out, name)


@pytest.mark.parametrize("folder", ["engine", "engine/more"])
def test_a_symlinked_folder_with_the_same_content(out: Path, folder: str) -> None:
    elsewhere = out.parent / "elsewhere"
    (out / folder).rename(elsewhere)
    (out / folder).symlink_to(elsewhere)
    refused(out, folder)


@pytest.mark.parametrize("name", ["engine", "plan.json"])
def test_what_becomes_a_link_after_it_was_listed(out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = bundle_module._check_closed_world

    def check_then_swap(*args: Any) -> None:
        check(*args)
        (out / name).rename(out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    monkeypatch.setattr(bundle_module, "_check_closed_world", check_then_swap)
    with pytest.raises(BundleCorruptError, match="link"):
        verify_bundle(out)


def test_what_is_returned_is_what_was_hashed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is rewritten just after it was read: the caller still gets the verified bytes."""
    read = bundle_module._read_file

    def read_then_rewrite(root: int, entry: FileEntry, keep: bool) -> bytes | None:
        data = read(root, entry, keep)
        (out / entry.path).write_bytes(b"evil")
        return data

    monkeypatch.setattr(bundle_module, "_read_file", read_then_rewrite)
    assert read_bundle(out).contents == FILES


def test_a_symlink_to_the_whole_bundle_is_the_users_own_path(out: Path) -> None:
    (out.parent / "latest.vpe").symlink_to(out)
    assert read_bundle(out.parent / "latest.vpe").contents == FILES


def test_hard_links_are_read_and_verified_like_any_file(out: Path) -> None:
    """uv, `cp -al` and deduplication tools create hard links; the content must still match the hash."""
    os.link(out / "plan.json", out.parent / "twin")
    assert read_bundle(out).contents == FILES
    (out.parent / "twin").write_bytes(b'{"plan": 2}\n')
    refused(out, "plan.json")


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # a socket's path is limited to about 100 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # /dev/null
    except PermissionError:
        pytest.skip("only root can make devices")


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, make_device], ids=["fifo", "socket", "device"])
@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "extra"])
def test_things_that_are_no_files(
    out: Path, make: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    (out / name).unlink(missing_ok=True)
    make(out / name)
    refused(out, name)


def test_a_fifo_that_appears_after_the_listing_does_not_hang(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = bundle_module._check_closed_world

    def check_then_swap(*args: Any) -> None:
        check(*args)
        (out / "plan.json").unlink()
        os.mkfifo(out / "plan.json")

    monkeypatch.setattr(bundle_module, "_check_closed_world", check_then_swap)
    with pytest.raises(BundleCorruptError, match=r"'plan\.json' is a pipe"):
        verify_bundle(out)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "engine\\secret", "engine/../../secret", "secret\x00"])
def test_a_manifest_that_points_outside(out: Path, path: str) -> None:
    (out.parent / "secret").write_bytes(b"secret")
    changed = document(out)
    changed["files"].append({"path": path, "size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()})
    forge(out, changed)
    refused(out, "unsafe path")


def test_case_twins(out: Path) -> None:
    (out / "Plan.json").write_bytes(b"x")
    changed = document(out)
    changed["files"].append({"path": "Plan.json", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()})
    forge(out, changed)
    refused(out, "case is ignored")


def test_a_file_listed_twice(out: Path) -> None:
    changed = document(out)
    changed["files"].append(changed["files"][0])
    forge(out, changed)
    refused(out, "same file")


def test_duplicate_json_keys(out: Path) -> None:
    path = out / "manifest.json"
    member = b'"kernels": "portable"'
    path.write_bytes(path.read_bytes().replace(member, member + b", " + member))
    refused(out, "twice")


def test_deep_json(out: Path) -> None:
    (out / "manifest.json").write_bytes(b"[" * 1_000_000)
    refused(out, "JSON")


def test_a_huge_manifest_is_not_read(out: Path) -> None:
    with open(out / "manifest.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    tracemalloc.start()
    refused(out, "manifest.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * MAX_MANIFEST_BYTES


def test_a_huge_declared_size_allocates_nothing(out: Path) -> None:
    changed = document(out)
    changed["files"][0]["size"] = 30 << 30
    forge(out, changed)
    tracemalloc.start()
    error = refused(out, changed["files"][0]["path"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(30 << 30) in error.expected
    assert peak < 64 << 20


def test_a_huge_file_with_a_small_declared_size_is_not_read(out: Path) -> None:
    with open(out / "plan.json", "r+b") as file:
        file.truncate(1 << 40)
    assert str(1 << 40) in str(refused(out, "plan.json"))


def test_a_future_format_says_to_upgrade(out: Path) -> None:
    forge(out, {**document(out), "format_version": "2.0"})
    with pytest.raises(BundleIncompatibleError, match=r"2\.0.*expected 1\.x.*upgrade"):
        read_bundle(out)


def test_altered_file_with_its_hash_put_right_changes_the_digest(out: Path) -> None:
    """Not detectable by a checksum: whoever rewrites everything gets a valid bundle, but a different one."""
    before = read_bundle(out).digest
    data = b"evil model"
    (out / "dense/model.onnx").write_bytes(data)
    changed = document(out)
    for entry in changed["files"]:
        if entry["path"] == "dense/model.onnx":
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(out, changed)
    assert read_bundle(out).digest != before


@pytest.mark.parametrize("kind", ["missing", "file", "fifo", "empty folder", "nul"])
def test_no_bundle_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.vpe"
    if kind == "file":
        path.write_bytes(b"PK")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "nul":
        path = tmp_path / "x\0.vpe"
    for read in (read_bundle, read_manifest, verify_bundle):
        with pytest.raises(BundleError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_an_unreadable_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == "plan.json":  # chmod has no effect on root, who may run the tests
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BundleError, match="Permission denied"):
        read_bundle(out)


def test_no_descriptor_is_left_open(out: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(20):
        read_bundle(out)
    (out / "engine/more/weights.bin").write_bytes(b"v" * 5000)
    for _ in range(20):
        refused(out, "weights.bin")
    (out / "extra").mkdir()
    refused(out, "extra")
    assert count() == before
