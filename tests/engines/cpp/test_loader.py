"""The C++ loader: its own tests under sanitizers, its command, and its installed package, compared with Python."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vp_engines
from tests import optional
from tests.embedding import blocks, replaced, words
from tests.engines.backends import tiny_vit
from tests.engines.backends.tiny_vit import CLASSES, INPUTS, OUTPUTS, SIZE
from tests.engines.bundle_samples import document, fields, forge
from tests.engines.cpp.builds import build_light, build_sanitized, call, install, missing
from tests.waiting import LONG
from vp_engines.backends.aoti import AotInductorBackend
from vp_engines.backends.base import BuildOptions, BuildSource
from vp_engines.bundle import write_bundle
from vp_engines.errors import VpError

SAME = 1e-5  # for logits of about 1: the order of sums depends on the threads
pytestmark = [pytest.mark.slow, pytest.mark.built]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if lacking := missing():
        optional.missing(f"the C++ loader cannot be built without {lacking}: make cpp-deps", "VP_REQUIRE_CPP")


@pytest.fixture(scope="module")
def sanitized(tools: None) -> Path:
    return build_sanitized()


@pytest.fixture(scope="module")
def installed(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("prefix"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aoti bundle of the tiny ViT; the dense model is the same package, since each takes half a minute."""
    folder = tmp_path_factory.mktemp("aoti")
    engine = folder / "engine"
    engine.mkdir()
    source = BuildSource("fp32", INPUTS, OUTPUTS, program=tiny_vit.export(tiny_vit.make_vit()))
    built = AotInductorBackend().build(source, engine, BuildOptions())
    package = (engine / built.artefact).read_bytes()
    variants = {
        key: {"artefact": f"{place}/model.pt2", "files": [f"{place}/model.pt2"], "requirements": built.requirements}
        for key, place in (("reduced", "engine"), ("dense", "dense"))
    }
    given = fields(
        engine={"name": "aoti", "version": str(torch.__version__), "precision": "fp32", "device": "cpu"},
        variants=variants,
        inputs=[{"name": "images", "dtype": "float32", "shape": ["batch", 3, SIZE, SIZE]}],
        outputs=[{"name": "logits", "dtype": "float32", "shape": ["batch", CLASSES]}],
        classes=[f"class {number}" for number in range(CLASSES)],
    )
    given["preprocessing"]["input_size"] = [3, SIZE, SIZE]
    given["model"]["num_classes"] = CLASSES
    files: dict[str, Any] = {"plan.json": b"{}", "engine/model.pt2": package, "dense/model.pt2": package}
    write_bundle(folder / "tiny.vpe", files=files, **given)
    return folder / "tiny.vpe"


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to corrupt."""
    return Path(shutil.copytree(sound, tmp_path / "tiny.vpe"))


@pytest.fixture
def vp_run(sanitized: Path) -> Run:
    """`vp-run ARGUMENTS` of the sanitized build; fails on any sanitizer report."""

    def run(*arguments: str | Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        program = sanitized / "engines" / "cpp" / "vp-run"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=1"}
        done = subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, timeout=LONG, env=environment
        )
        assert "Sanitizer" not in done.stderr, done.stderr[-6000:]
        assert "runtime error" not in done.stderr, done.stderr[-6000:]
        assert done.returncode == exit_code, done.stderr[-6000:]
        return done

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.f32"
    path.write_bytes(tiny_vit.some_images(3).tobytes())
    return path


@pytest.fixture
def refused(vp_run: Run, images: Path) -> Callable[..., str]:
    """The error line of vp-run for a bundle that Python also rejects."""

    def run(bundle: Path, *arguments: str, exit_code: int = 2, python: bool = True) -> str:
        done = vp_run(bundle, "--input", images, *arguments, exit_code=exit_code)
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        if python:
            with pytest.raises(VpError) as caught:
                vp_engines.load(bundle)
            assert caught.value.exit_code == exit_code
        return lines[0]

    return run


def test_its_own_tests(sanitized: Path) -> None:
    call("ctest", "--test-dir", sanitized, "--output-on-failure")


def test_same_answers_as_python(vp_run: Run, installed: Path, sound: Path, tmp_path: Path) -> None:
    images = tiny_vit.some_images(8, seed=5)
    (tmp_path / "in").write_bytes(images.tobytes())
    with vp_engines.load(sound) as engine:
        wanted = engine.run(images)["logits"]
        singly = np.concatenate([engine.run(images[i : i + 1])["logits"] for i in range(len(images))])
    assert wanted.std() > 0.1

    def answers(*arguments: str) -> np.ndarray:
        printed = vp_run(sound, "--input", tmp_path / "in", "--output", tmp_path / "out", *arguments).stdout
        logits = np.fromfile(tmp_path / "out", np.float32).reshape(8, CLASSES)
        rows = [line.split("\t") for line in printed.splitlines()]
        assert [(int(row[0]), int(row[1])) for row in rows] == [(i, int(logits[i].argmax())) for i in range(8)]
        assert rows[0][3] == f"class {rows[0][1]}"
        return logits

    np.testing.assert_allclose(answers("--threads", "1"), wanted, atol=SAME, rtol=0)
    np.testing.assert_allclose(answers("--variant", "dense", "--shape", "8,3,32,32"), wanted, atol=SAME, rtol=0)
    # Eight threads on one handle, one run at a time; then three at a time.
    np.testing.assert_allclose(answers("--parallel", "8"), singly, atol=SAME, rtol=0)
    np.testing.assert_allclose(answers("--parallel", "8", "--runners", "3"), singly, atol=SAME, rtol=0)
    # As built by users, without sanitizers.
    command = [installed / "bin" / "vp-run", sound, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    call(*command)
    np.testing.assert_allclose(np.fromfile(tmp_path / "out", np.float32), wanted.ravel(), atol=SAME, rtol=0)


def test_first_runs_of_many_threads_come_to_an_end(vp_run: Run, sound: Path, tmp_path: Path) -> None:
    """With more threads than models, torch's own lock deadlocks in the first run about every other time."""
    (tmp_path / "in").write_bytes(tiny_vit.some_images(8).tobytes())
    for _ in range(4):
        assert len(vp_run(sound, "--input", tmp_path / "in", "--parallel", "8").stdout.splitlines()) == 8


def test_describe_says_what_python_says(vp_run: Run, bundle: Path) -> None:
    """With thousands of numbers in the requirements: the digest only matches if C++ writes each as Python does."""
    rng = random.Random(7)
    numbers: list[float] = [rng.uniform(-1, 1) * 10 ** rng.randint(-320, 300) for _ in range(5000)]
    numbers += [float(10**e) for e in range(23)] + [2**-e for e in range(1074)] + [rng.randrange(-(2**63), 2**64)]
    changed = document(bundle)
    changed["variants"]["reduced"]["requirements"]["numbers"] = numbers
    changed["name"] = 'żółw "\\\u2028🐢'
    forge(bundle, changed)
    digest = vp_engines.bundle.verify_bundle(bundle).digest
    told = json.loads(vp_run(bundle, "--describe").stdout)
    assert told["digest"] == digest
    for key in ("name", "engine", "inputs", "outputs", "preprocessing", "classes"):
        assert told[key] == changed[key]


def test_no_file_is_left_behind(vp_run: Run, sound: Path, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    vp_run(sound, "--input", images)
    assert list((tmp_path / "tmp").iterdir()) == []


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"class 7", b"class 8"))


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def rewrite(change: Callable[[dict[str, Any]], Any], bundle: Path) -> None:
    changed = document(bundle)
    change(changed)
    forge(bundle, changed)


def requirement(bundle: Path, **values: Any) -> None:
    rewrite(lambda told: told["variants"]["reduced"]["requirements"].update(values), bundle)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "altered engine": (lambda b: flip(b / "engine/model.pt2"), "'engine/model.pt2' has sha256"),
    "altered dense engine": (lambda b: flip(b / "dense/model.pt2", 9000), "'dense/model.pt2' has sha256"),
    "altered manifest": (lambda b: alter(b / "manifest.json"), "manifest.json: has the digest"),
    "truncated": (lambda b: os.truncate(b / "engine/model.pt2", 5000), "'engine/model.pt2' has 5000 bytes; expected"),
    "missing": (lambda b: (b / "plan.json").unlink(), "'plan.json' is missing"),
    "extra": (lambda b: (b / "engine/extra.so").write_bytes(b""), "'engine/extra.so' is not in the manifest"),
    "symlink": (lambda b: replace_by_link(b / "plan.json"), "'plan.json' is a symbolic link"),
    "traversal": (
        functools.partial(rewrite, lambda told: told["files"][0].update(path="../../etc/passwd")),
        "files.0.path: unsafe path '../../etc/passwd'",
    ),
    "newer format": (
        functools.partial(rewrite, lambda told: told.update(format_version="2.0")),
        "format version 2.0; expected 1.x; upgrade",
    ),
    "deep JSON": (lambda b: (b / "manifest.json").write_bytes(b"[" * 1_000_000), "manifest.json: is nested too deeply"),
    "huge JSON": (lambda b: os.truncate(b / "manifest.json", 1 << 40), "manifest.json is 1099511627776 bytes long"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json is missing: this folder is not a bundle"),
    "no bundle": (shutil.rmtree, "is not there; expected the folder of a bundle"),
    "another CPU": (lambda b: requirement(b, cpu_flags=["avx9000"]), "another machine: a CPU with avx9000; export it"),
    "another torch": (lambda b: requirement(b, torch="1.13.0"), "torch 1.13.0, here 2."),
    "another platform": (lambda b: requirement(b, platform="linux-mips"), "platform linux-mips, here linux-"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled(refused: Callable[..., str], bundle: Path, what: str) -> None:
    spoil, message = SPOILED[what]
    spoil(bundle)
    assert message in refused(bundle)


def engine_of(bundle: Path, name: str) -> None:
    rewrite(lambda told: told["engine"].update(name=name), bundle)


def test_other_engines_and_other_gpus(refused: Callable[..., str], bundle: Path) -> None:
    requirement(bundle, device="cuda", compute_capability="9.0", cuda="13.0")
    if not torch.cuda.is_available():
        assert "compiled for a GPU and torch finds none here" in refused(bundle, exit_code=3)
    engine_of(bundle, "ort")  # which Python would run
    assert "'ort' of the bundle cannot run here: another engine" in refused(bundle, exit_code=3, python=False)
    engine_of(bundle, "trt")
    line = refused(bundle, exit_code=3, python=False)
    assert "'trt' of the bundle cannot run here: vp_engine was built without TensorRT; configure it with" in line
    engine_of(bundle, "abacus")
    assert "for the engine 'abacus'; expected aoti or trt; upgrade vp_engine" in refused(bundle)


def test_wrong_tensors(vp_run: Run, sound: Path, images: Path) -> None:
    def line(*arguments: str) -> str:
        done = vp_run(sound, "--input", images, *arguments, exit_code=2)
        assert done.stderr.count("\n") == 1
        return done.stderr

    wanted = "expected float32 of shape [batch, 3, 32, 32]"
    assert f"input 'images' has shape [3, 3, 16, 16]; {wanted}" in line("--shape", "3,3,16,16")
    assert f"input 'images' has shape [3, 3072]; {wanted}" in line("--shape", "3,3072")
    assert f"input 'images' has shape [0, 3, 32, 32]; {wanted}" in line("--shape", "0,3,32,32")
    assert "has 36864 bytes; expected 24576 for the shape [2, 3, 32, 32]" in line("--shape", "2,3,32,32")
    assert f"has dtype float64; {wanted}; convert it to float32" in line("--dtype", "float64")
    assert "there is no input 'pixels'; expected 'images'" in line("--name", "pixels")
    images.write_bytes(b"12345")
    assert "has 5 bytes; expected a multiple of 12288" in line()


def test_what_was_verified_is_what_is_loaded(refused: Callable[..., str], bundle: Path) -> None:
    """Correct hashes of noise: only loading can fail, so only the hashes protect against a flipped bit."""
    import hashlib

    noise = np.random.default_rng(0).bytes(5000)
    (bundle / "engine/model.pt2").write_bytes(noise)

    def sign(told: dict[str, Any]) -> None:
        for entry in told["files"]:
            if entry["path"] == "engine/model.pt2":
                entry.update(size=len(noise), sha256=hashlib.sha256(noise).hexdigest())

    rewrite(sign, bundle)
    assert "torch cannot load 'engine/model.pt2'" in refused(bundle)


def test_package_for_somebody_elses_project(installed: Path, sound: Path, tmp_path: Path) -> None:
    source = Path(__file__).parent / "consumer"
    told = call("cmake", "-S", source, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={installed}")
    assert "backends: aoti" in told
    call("cmake", "--build", tmp_path)
    with vp_engines.load(sound) as engine:
        wanted = engine.run(np.ones((1, 3, SIZE, SIZE), np.float32))["logits"][0, 0]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(call, tmp_path / "consumer", sound), pool.submit(call, tmp_path / "consumer_cpp")]
    assert abs(float(runs[0].result()) - wanted) < 2e-6
    assert runs[1].result() == "aoti\n"
    exported = call("nm", "-D", "--defined-only", next(installed.glob("lib*/libvp_engine.so")))
    names = {line.split()[-1] for line in exported.splitlines()}
    assert "vp_engine_run" in names
    # The linker leaves a few string constructors of libstdc++, as in every library.
    assert [name for name in names if not name.startswith(("vp_engine_", "_ZNSt", "_ZSt"))] == []


def test_the_page_on_embedding(installed: Path, sound: Path, tmp_path: Path) -> None:
    """Program and commands of docs/embedding.md; `installed` was built by the commands there."""
    server = blocks("C and C++", "bash")[1]
    (tmp_path / "server").mkdir()
    (project,), (program,) = blocks("C and C++", "cmake"), blocks("C and C++", "c")
    (tmp_path / "server" / "CMakeLists.txt").write_text(project)
    sizes = {"224": str(SIZE), "1000": str(CLASSES), "deit_s.vpe": str(sound)}
    (tmp_path / "server" / "main.c").write_text(replaced(program, sizes))
    assert "/opt/vp_engine" in server
    for line in server.splitlines():
        places = {"/opt/vp_engine": str(installed)} if "/opt/vp_engine" in line else {}
        done = subprocess.run(words(line, places), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with vp_engines.load(sound) as engine:
        wanted = engine.run(np.zeros((1, 3, SIZE, SIZE), np.float32))["logits"][0, 0]
    assert abs(float(done.stdout) - wanted) < 2 * SAME


def test_without_libtorch_it_still_verifies(tools: None, sound: Path, images: Path) -> None:
    program = build_light() / "engines" / "cpp" / "vp-run"
    assert json.loads(call(program, sound, "--describe"))["digest"] == vp_engines.bundle.verify_bundle(sound).digest
    done = subprocess.run([program, sound, "--input", images], capture_output=True, text=True)
    assert done.returncode == 3
    assert "vp_engine was built without libtorch; configure it with -DVP_ENGINE_AOTI=ON" in done.stderr
    assert "torch" not in call("ldd", program)
