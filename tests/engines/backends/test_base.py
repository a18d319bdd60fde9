"""Shared by all backends: registry, input checks, closing, availability."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import LONG
from vp_engines.backends import ENGINES, get_backend
from vp_engines.backends.base import (
    BuildOptions,
    BuildSource,
    Runner,
    TensorSpec,
    check_input,
    first_line,
    require,
    version_tuple,
)
from vp_engines.errors import EXIT_ENGINE_UNAVAILABLE, BuildError, EngineUnavailableError, InputError, VpError
from vp_engines.extras import installed

SPEC = TensorSpec("images", "float32", ("batch", 3, 4, 4))
MODULES = {
    "ort": "onnxruntime",
    "openvino": "openvino",
    "aoti": "torch",
    "trt": "tensorrt",
    "trt-rtx": "tensorrt_rtx",
}
MODULES = {name: MODULES.get(name) or get_backend(name).packages[0] for name in ENGINES}


class Slow(Runner):
    """Runs until told to stop, and counts the threads inside."""

    concurrent = False

    def __init__(self) -> None:
        super().__init__((SPEC,), (TensorSpec("sum", "float32", ("batch",)),))
        self.inside = self.most = self.closes = 0
        self.entered, self.go = threading.Event(), threading.Event()

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        self.go.wait(LONG)
        self.inside -= 1
        return {"sum": images.sum((1, 2, 3))}

    def _close(self) -> None:
        self.closes += 1
        assert self.inside == 0


def test_registry_knows_every_engine_by_its_own_name() -> None:
    assert {"ort", "openvino", "aoti", "trt", "trt-rtx"} <= set(ENGINES)
    for name in ENGINES:
        assert get_backend(name).name == name
    with pytest.raises(VpError, match="unknown engine 'tflite'; expected one of ort, openvino, aoti, trt, trt-rtx"):
        get_backend("tflite")


@pytest.mark.parametrize("name", ENGINES)
def test_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    backend = get_backend(name)
    for purpose in ("build", "run"):
        ready = backend.available(purpose)  # type: ignore[arg-type]
        assert not ready.ok
        assert MODULES[name] in ready.reason
        assert f"vp-export[{backend.extra}]" in ready.reason
        assert "\n" not in ready.reason
    with pytest.raises(EngineUnavailableError, match=rf"vp-export\[{backend.extra}\]") as caught:
        backend.version()
    assert caught.value.exit_code == EXIT_ENGINE_UNAVAILABLE


@pytest.mark.parametrize("name", ENGINES)
def test_build_refuses_what_was_not_lowered_for_it(name: str, tmp_path: Path) -> None:
    backend = get_backend(name)
    with pytest.raises(BuildError, match="not lowered"):
        backend.build(BuildSource(backend.precisions[0], (SPEC,), ()), tmp_path, BuildOptions())
    with pytest.raises(BuildError, match="has no int8; expected one of"):
        backend.build(BuildSource("int8", (SPEC,), ()), tmp_path, BuildOptions())  # type: ignore[arg-type]


def test_import_of_a_backend_imports_no_runtime() -> None:
    code = (
        "import sys; from vp_engines.backends import ENGINES, get_backend;"
        "[get_backend(name).available() for name in ENGINES]"
        f"; bad = {set(MODULES.values()) | {'onnx', 'polygraphy', 'numpy'}!r} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_input_names_what_is_wrong() -> None:
    good = np.zeros((2, 3, 4, 4), np.float32)
    assert check_input(good, SPEC) is good
    assert check_input(good.transpose(0, 1, 3, 2), SPEC).flags.c_contiguous
    with pytest.raises(InputError, match="is a list"):
        check_input([1.0], SPEC)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dtype float16"):
        check_input(good.astype(np.float16), SPEC)
    for shape in ((3, 4, 4), (2, 3, 4, 5), (0, 3, 4, 4), (2, 1, 4, 4)):
        with pytest.raises(InputError, match="has shape"):
            check_input(np.zeros(shape, np.float32), SPEC)


def test_runner_that_is_not_concurrent_runs_one_thread_at_a_time_and_closes_after_it() -> None:
    runner = Slow()
    images = np.ones((1, 3, 4, 4), np.float32)
    errors: list[Exception] = []

    def work() -> None:
        try:
            runner.run(images)
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    threads[0].start()
    assert runner.entered.wait(LONG)
    closer = threading.Thread(target=runner.close)
    for thread in (*threads[1:], closer):
        thread.start()
    runner.go.set()
    for thread in (*threads, closer):
        thread.join(LONG)
        assert not thread.is_alive()
    assert runner.most == 1
    assert runner.closes == 1
    assert all("closed" in str(error) for error in errors)  # for calls after close


def test_runner_closes_on_leaving_its_context() -> None:
    with Slow() as runner:
        runner.go.set()
        assert runner.run(np.ones((2, 3, 4, 4), np.float32))["sum"].tolist() == [48, 48]
    assert runner.closes == 1
    with pytest.raises(InputError, match="closed; load the bundle again"):
        runner.run(np.ones((2, 3, 4, 4), np.float32))


def test_small_helpers() -> None:
    assert version_tuple("2.11.0+cu130") == (2, 11, 0)
    assert version_tuple("1.7.1.116") == (1, 7, 1, 116)
    assert version_tuple("None") == ()
    assert first_line("\n  what\nwhere") == "what"
    assert first_line("") == "no message"
    assert installed("json")
    assert not installed("no_such_package_anywhere")
    with pytest.raises(EngineUnavailableError, match=r"engine 'x' needs no_such_package_anywhere.*vp-export\[y\]"):
        require("no_such_package_anywhere", "x", "y")


def test_an_engine_without_a_profiler_says_so() -> None:
    with pytest.raises(EngineUnavailableError, match="Slow has no profiler; profile another engine"):
        Slow().recorded()
