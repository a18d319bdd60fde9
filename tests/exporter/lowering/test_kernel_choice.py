"""The lowering for an engine, and that the faster of two builds is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporter.rewrite.test_fused_block import both
from tests.exporter.tiny import tiny_vit
from vp_engines.backends import get_backend
from vp_engines.backends.aoti import AotInductorBackend
from vp_engines.backends.base import BuildOptions, BuildResult, BuildSource, Runner
from vp_exporter.errors import UnsupportedModelError
from vp_exporter.lowering.kernel_choice import Candidates, build_best, candidates
from vp_exporter.validation import latency

_, NARROW = tiny_vit()
_, WIDE = tiny_vit(heads=2)
CUDA, CPU = BuildOptions(device="cuda"), BuildOptions(device="cpu")


def test_portable_is_always_possible() -> None:
    for engine in ("ort", "aoti", "openvino", "trt-rtx"):
        chosen = candidates("portable", get_backend(engine), CPU, NARROW, 16)
        assert {each.kernels for each in chosen.values()} == {("portable",)}


def test_auto_measures_where_kernels_run() -> None:
    backend = AotInductorBackend()
    if not backend.runs_kernels(CUDA).ok:
        pytest.skip("triton is not installed")
    assert {each.kernels for each in candidates("auto", backend, CUDA, WIDE, 32).values()} == {("portable", "vp")}
    # The dense baseline is the best one, whatever was requested for the reduced model.
    asked = candidates("vp", backend, CUDA, WIDE, 32)
    assert asked["reduced"].kernels == ("vp",)
    assert asked["dense"].kernels == ("portable", "vp")


def test_auto_says_why_not() -> None:
    on_cpu = candidates("auto", AotInductorBackend(), CPU, WIDE, 32)["reduced"]
    assert on_cpu == Candidates(("portable",), "kernels: portable (the vp kernels need a CUDA device)")
    narrow = candidates("auto", AotInductorBackend(), CUDA, NARROW, 16)["reduced"]
    assert narrow.kernels == ("portable",)
    assert "heads of 16 channels" in narrow.why


def test_vp_without_kernels_says_so() -> None:
    chosen = candidates("vp", get_backend("ort"), CPU, WIDE, 32)
    assert chosen["reduced"].kernels == ("vp",)
    assert "in standard operators" in chosen["reduced"].why
    assert chosen["dense"] == Candidates(("portable",))
    with pytest.raises(UnsupportedModelError, match="heads of 16 channels"):
        candidates("vp", get_backend("ort"), CPU, NARROW, 16)


class Answers(Runner):
    """Always returns the same result."""

    def __init__(self, value: float) -> None:
        super().__init__((), ())
        self.value, self.closed_once = value, False

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"logits": np.full((len(images), 1), self.value)}

    def _close(self) -> None:
        self.closed_once = True


class TwoBuilds(AotInductorBackend):
    """Builds a file that names the form."""

    def __init__(self) -> None:
        self.runners: list[Answers] = []

    def build(self, source: BuildSource, out: Path, options: BuildOptions) -> BuildResult:
        (out / "engine.bin").write_text(str(source.program))
        return BuildResult("engine.bin", ("engine.bin",), {"made from": source.program})

    def open(self, artefact: str, files: Any, *rest: Any) -> Runner:
        self.runners.append(Answers(0.0))
        return self.runners[-1]


@pytest.mark.parametrize(
    ("vp_ms", "bad", "kept", "reason"),
    [
        (0.5, (0, 0), "vp", "vp is 2.00 times as fast as portable, batch 1, 8"),
        (2.0, (0, 0), "portable", "vp is 0.50 times as fast as portable, batch 1, 8"),
        (0.5, (0, 1), "portable", "vp gives NaN or infinite outputs"),
        (2.0, (1, 0), "vp", "portable gives NaN or infinite outputs"),
        (2.0, (1, 1), "portable", "vp is 0.50 times as fast as portable, batch 1, 8"),
    ],
)
def test_the_faster_build_is_kept(
    vp_ms: float, bad: tuple[int, int], kept: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(dense: Runner, reduced: Runner, *, batches: Any, **rest: Any) -> list[latency.LatencyRow]:
        times = np.tile([1e6, vp_ms * 1e6], (20, 1))
        return [latency.summarise(times, batch=batch, mac_ratio=None, nonfinite=bad) for batch in batches]

    monkeypatch.setattr("vp_exporter.lowering.kernel_choice.compare", compare)
    backend = TwoBuilds()
    result, kernels, why = build_best(
        backend,
        Candidates(("portable", "vp")),
        lambda kernels: BuildSource("fp32", (), (), program=kernels),
        tmp_path,
        CPU,
        what="the engine",
        batches=(1, 8),
        image_shape=(3, 64, 64),
    )
    assert kernels == kept
    assert why == f"kernels: {kept} ({reason})"
    assert result.requirements == {"made from": kept}
    assert [path.name for path in tmp_path.iterdir()] == ["engine.bin"]
    assert (tmp_path / "engine.bin").read_text() == kept
    assert all(runner.closed_once for runner in backend.runners)


@pytest.mark.slow
def test_both_builds_run_on_aoti(tmp_path: Path) -> None:
    """The whole path of a GPU build, on the CPU, where the operators run their torch implementations."""
    from vp_exporter.lowering import export_program, signature

    portable, _ = both([("evit", {"tokens_out": 40, "fuse": True})])
    backend = AotInductorBackend()

    lowered: dict[str, BuildSource] = {}

    def lower(kernels: Any) -> BuildSource:
        ready = portable.for_export("fp32", "sdpa", kernels)
        lowered[kernels] = BuildSource("fp32", *signature(ready), program=export_program(ready))
        return lowered[kernels]

    result, kernels, why = build_best(
        backend,
        Candidates(("portable", "vp")),
        lower,
        tmp_path,
        CPU,
        what="the engine",
        batches=(1,),
        image_shape=(3, 64, 64),
    )
    assert kernels in why
    source = lowered[kernels]
    files = {name: (tmp_path / name).read_bytes() for name in result.files}
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64), dtype=np.float32)
    with backend.open(
        result.artefact, files, source.inputs, source.outputs, result.requirements, _run_options()
    ) as runner:
        found = runner.run(images)["logits"]
    import torch

    with torch.no_grad():
        expected = portable(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


def _run_options() -> Any:
    from vp_engines.backends.base import RunOptions

    return RunOptions("cpu")
