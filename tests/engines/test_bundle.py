"""Writing and reading bundles atomically, even if processes die or the disk is full."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.engines.bundle_samples import FILES, document, fields, forge, write_sample
from vp_engines import atomic
from vp_engines.bundle import check_target, read_bundle, read_manifest, update_bundle, verify_bundle, write_bundle
from vp_engines.errors import BundleCorruptError, BundleError, BundleIncompatibleError

HERE = Path(__file__).parent


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    manifest = write_sample(out)
    bundle = read_bundle(out)
    assert bundle.manifest == manifest == read_manifest(out)
    assert bundle.contents == FILES
    assert bundle.digest == manifest.digest()
    assert [p.name for p in tmp_path.iterdir()] == ["a.vpe"]


def test_files_are_copied_from_paths(tmp_path: Path) -> None:
    big = os.urandom((3 << 20) + 17)
    (tmp_path / "big.bin").write_bytes(big)
    write_bundle(tmp_path / "a.vpe", files={**FILES, "big.bin": tmp_path / "big.bin"}, **fields())
    assert read_bundle(tmp_path / "a.vpe").contents["big.bin"] == big


def test_only_what_is_wanted_is_kept_and_the_rest_is_still_verified(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    write_sample(out)
    assert set(read_bundle(out, keep=lambda p: p.startswith("engine/")).contents) == {
        "engine/model.onnx",
        "engine/more/weights.bin",
    }
    assert verify_bundle(out).contents == {}
    (out / "dense/model.onnx").write_bytes(b"dense MODEL")
    with pytest.raises(BundleCorruptError, match=r"dense/model\.onnx"):
        read_bundle(out, keep=lambda p: p.startswith("engine/"))


def test_time_and_tool_have_defaults(tmp_path: Path) -> None:
    given = fields()
    del given["created"], given["tool"]
    manifest = write_bundle(tmp_path / "a.vpe", files=FILES, **given)
    assert manifest.tool.name == "vp-export"
    assert manifest.created.endswith("Z")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    write_sample(tmp_path / "a.vpe")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.vpe").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "a.vpe/plan.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_nothing_is_replaced_without_force(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    write_sample(out)
    before = tree(tmp_path)
    with pytest.raises(BundleError, match="`force=True`"):
        write_sample(out, name="second")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_and_leaves_nothing_of_the_old(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    out = tmp_path / "a.vpe"
    write_sample(out, files={"old.txt": b"old"})
    write_sample(out, name="second", force=True)
    assert read_bundle(out).manifest.name == "second"
    assert not (out / "old.txt").exists()
    assert os.listdir(tmp_path) == ["a.vpe"]


def test_force_replaces_a_broken_bundle(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    write_sample(out)
    (out / "plan.json").unlink()
    write_sample(out, force=True)
    verify_bundle(out)


def test_force_does_not_remove_what_is_no_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "an extension"}')
    file = tmp_path / "file.vpe"
    file.write_text("x")
    write_sample(tmp_path / "real.vpe")
    link = tmp_path / "link.vpe"
    link.symlink_to("real.vpe")
    before = tree(tmp_path)
    for out in (folder, file, link, tmp_path):
        with pytest.raises(BundleError, match="not a bundle"):
            write_sample(out, force=True)
    assert tree(tmp_path) == before


def test_missing_folders_above_are_made(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "down" / "a.vpe"
    check_target(out)
    assert os.listdir(tmp_path) == []
    write_sample(out)
    assert verify_bundle(out).path == out


def test_target_can_be_checked_beforehand(tmp_path: Path) -> None:
    check_target(tmp_path / "a.vpe")
    (tmp_path / "file").write_text("")
    for below in ("a.vpe", "missing/a.vpe"):
        with pytest.raises(BundleError, match=r"file is not a folder; expected a folder for a.vpe"):
            check_target(tmp_path / "file" / below)
    write_sample(tmp_path / "a.vpe")
    with pytest.raises(BundleError, match="`force=True`"):
        check_target(tmp_path / "a.vpe")
    check_target(tmp_path / "a.vpe", force=True)


@pytest.mark.parametrize("path", ["../evil", "/abs", "a\\b", "manifest.json", "MANIFEST.JSON", "Plan.json"])
def test_bad_paths_are_not_written(tmp_path: Path, path: str) -> None:
    with pytest.raises(BundleError):
        write_sample(tmp_path / "a.vpe", files={path: b"x"})
    assert os.listdir(tmp_path) == []
    assert not (tmp_path.parent / "evil").exists()


def test_a_wrong_field_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="classes"):
        write_sample(tmp_path / "a.vpe", classes=["only one", 2])
    assert os.listdir(tmp_path) == []


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"gone\.bin.*nothing was left behind"):
        write_bundle(tmp_path / "a.vpe", files={**FILES, "x": tmp_path / "gone.bin"}, **fields())
    assert os.listdir(tmp_path) == []


# Runs in a child process that forks once per step. `trace` counts the modifying system calls of a write; run n kills
# itself just before the n-th of them, without cleaning up.
KILLER = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bundle_samples
from vp_engines import atomic, bundle

root, force, exchange = Path(sys.argv[2]), sys.argv[3] == "force", sys.argv[4] == "exchange"
steps = 0

def trace(module, name, limit):
    real = getattr(module, name)
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, step)

# A killed process loses nothing that it has written, fsynced or not: skip the slow part, keep the step.
os.fsync = lambda fd: None

def attempt(folder, limit):
    for name in ("fsync", "mkdir", "rename", "unlink", "rmdir", "open", "listdir"):
        trace(os, name, limit)
    if not exchange:
        atomic._exchange = lambda one, other: False
    trace(atomic, "_exchange", limit)
    bundle_samples.write_sample(folder / "a.vpe", name="new", force=force)

limit = 0
while True:
    limit += 1
    folder = root / str(limit)
    folder.mkdir()
    if force:
        bundle_samples.write_sample(folder / "a.vpe", name="old", files={"old.txt": b"old"})
    child = os.fork()
    if child == 0:
        attempt(folder, limit)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
print(json.dumps({"steps": limit, "last": status}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("force", "exchange"), [("fresh", "exchange"), ("force", "exchange"), ("force", "two renames")]
)
def test_killed_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, force: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(HERE), str(tmp_path), force, exchange],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["last"] == 0, done.stderr
    assert report["steps"] > 20  # or the hooks are no longer called
    seen = set()
    for folder in tmp_path.iterdir():
        out = folder / "a.vpe"
        if not out.exists() and force == "force":
            # Only without renameat2, between the two renames: the old bundle is at its hidden name.
            assert exchange == "two renames"
            seen.add("aside")
            with atomic.building(out):
                pass
        name = read_bundle(out).manifest.name if out.exists() else "none"
        seen.add(name)
        if name == "old":
            assert read_bundle(out).contents["old.txt"] == b"old"
        write_sample(out, name="next", force=True)  # the next write recovers and cleans up
        assert read_bundle(out).manifest.name == "next"
        assert os.listdir(folder) == ["a.vpe"]
    expected = {"fresh": {"none", "new"}, "force": {"old", "new"}}[force]
    if force == "force" and exchange == "two renames":
        expected = expected | {"aside"}
    assert seen == expected


def test_all_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def note_rename(one: Path, other: Path) -> None:
        events.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write_sample(tmp_path / "a.vpe")
    done = events.index("rename")
    before = [Path(event).relative_to(tmp_path).parts[1:] for event in events[:done]]
    names = ["/".join(parts) for parts in before]
    assert sorted(names) == sorted([*FILES, "manifest.json", "", "dense", "engine", "engine/more"])
    assert set(names[: len(FILES)]) == set(FILES)
    assert names[len(FILES)] == "manifest.json"  # after every file that it lists
    assert events[done + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize("limit", [1, 300, 5000, 9000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A file-size limit makes write() fail within a file, like a full disk or a quota."""
    out = tmp_path / "a.vpe"
    write_sample(out, name="old")
    before = tree(tmp_path)
    script = f"""
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(HERE)!r})
        import bundle_samples
        from vp_engines import BundleError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            bundle_samples.write_sample(Path({str(out)!r}), name="new", force=True)
        except BundleError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert f"cannot write {out}" in done.stdout
    assert "File too large" in done.stdout
    assert "nothing was left behind" in done.stdout
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["a.vpe"]


def test_no_space_at_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BundleError, match=r"No space left on device; nothing was left behind"):
            write_sample(tmp_path / "a.vpe")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_sample(tmp_path / "a.vpe")
    assert os.listdir(tmp_path) == []


def test_what_a_live_writer_builds_is_not_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.vpe"
    monkeypatch.setattr(atomic, "LOCK_SECONDS", 0.2)
    with atomic.building(out) as folder:
        with pytest.raises(BundleError, match="another process is writing"):
            write_sample(out)
        write_sample(tmp_path / "b.vpe")  # another name is not blocked
        assert folder.is_dir()
    assert os.listdir(tmp_path) == ["b.vpe"]


def test_a_lock_that_was_removed_before_it_was_taken_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous writer removes the lock file between our open and flock: the lock we get is worthless."""
    lock, flock = tmp_path / ".a.vpe.lock", fcntl.flock
    removed = []

    def remove_then_lock(fd: int, how: int) -> None:
        if not removed:
            removed.append(lock.unlink())
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with atomic.building(tmp_path / "a.vpe"):
        assert lock.exists()
    assert removed
    assert os.listdir(tmp_path) == []


def test_siblings_of_other_names_are_left_alone(tmp_path: Path) -> None:
    keep = [
        ".a.vpe.tmp-short",
        ".b.vpe.tmp-0123456789abcdef",
        "xa.vpe.tmp-0123456789abcdef",
        ".aXvpe.tmp-0123456789abcdef",
    ]
    for name in [*keep, ".a.vpe.tmp-0123456789abcdef"]:
        (tmp_path / name).mkdir()
    write_sample(tmp_path / "a.vpe")
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, "a.vpe"])


def test_concurrent_exports_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    write_sample(out, name="first")
    errors: list[BaseException] = []
    stop = threading.Event()

    def export(number: int) -> None:
        try:
            for _ in range(5):
                write_sample(out, name=f"n{number}", files={"who.txt": b"%d" % number}, force=True)
        except BaseException as error:
            errors.append(error)

    def watch() -> None:
        try:
            while not stop.is_set():
                bundle = read_bundle(out)  # always complete, even while it is being replaced
                if bundle.manifest.name != "first":
                    assert bundle.contents["who.txt"].decode() == bundle.manifest.name[1:]
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=export, args=(n,)) for n in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in [watcher, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    watcher.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["a.vpe"]


def test_of_two_exports_without_force_one_wins(tmp_path: Path) -> None:
    results: list[str] = []

    def export(number: int) -> None:
        try:
            write_sample(tmp_path / "a.vpe", name=f"n{number}")
            results.append(f"n{number}")
        except BundleError as error:
            assert "`force=True`" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=export, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_manifest(tmp_path / "a.vpe").name] == results


def test_update_changes_what_is_asked_and_keeps_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    old = write_sample(out)
    verdict = {"status": "passed", "accuracy": "measured", "latency": "measured", "summary": "1.4 x faster"}
    new = update_bundle(
        out, files={"report.json": b"new", "report.html": b"<p>", "empty.txt": None}, validation=verdict
    )
    bundle = read_bundle(out)
    assert bundle.manifest == new
    assert new.validation.status == "passed"
    assert new.model_dump(exclude={"files", "validation"}) == old.model_dump(exclude={"files", "validation"})
    expected = {**FILES, "report.json": b"new", "report.html": b"<p>"}
    del expected["empty.txt"]
    assert bundle.contents == expected
    assert os.listdir(tmp_path) == ["a.vpe"]


def test_update_refuses_a_corrupt_bundle_and_leaves_it(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    write_sample(out)
    (out / "engine/model.onnx").write_bytes(b"x" * len(FILES["engine/model.onnx"]))
    before = tree(tmp_path)
    with pytest.raises(BundleCorruptError, match=r"engine/model\.onnx"):
        update_bundle(out, files={"report.json": b"new"})
    assert tree(tmp_path) == before


def test_update_follows_a_link_to_the_bundle_and_writes_through_no_hard_link(tmp_path: Path) -> None:
    write_sample(tmp_path / "a.vpe")
    os.link(tmp_path / "a.vpe/report.json", tmp_path / "copy.json")
    (tmp_path / "latest.vpe").symlink_to("a.vpe")
    update_bundle(tmp_path / "latest.vpe", files={"report.json": b"new"})
    assert (tmp_path / "latest.vpe").is_symlink()
    assert read_bundle(tmp_path / "a.vpe").contents["report.json"] == b"new"
    assert (tmp_path / "copy.json").read_bytes() == FILES["report.json"]


def test_update_of_a_newer_minor_version_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.vpe"
    write_sample(out)
    forge(out, {**document(out), "format_version": "1.9", "novelty": 1})
    assert read_bundle(out).contents == FILES
    with pytest.raises(BundleIncompatibleError, match="rewrite"):
        update_bundle(out, files={})


def test_update_of_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not there"):
        update_bundle(tmp_path / "a.vpe", files={})
    assert os.listdir(tmp_path) == []
