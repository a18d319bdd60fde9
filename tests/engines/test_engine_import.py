"""Cost of `import vp_engines`: an embedding server must not pay for unused parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.bundle_samples import write_sample

HEAVY = ["torch", "onnx", "onnxruntime", "openvino", "tensorrt", "timm", "pydantic", "PIL", "numpy", "torchvision"]


def loaded_after(code: str) -> list[str]:
    """Heavy packages imported in a fresh interpreter after `code`."""
    report = f"import sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout)
    return names


@pytest.mark.parametrize(
    "code",
    [
        "import vp_engines",
        "import vp_engines.backends",
        "import vp_engines.errors",
        "import vp_engines; dir(vp_engines)",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert loaded_after(code) == []


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded_after("import vp_engines.manifest") == ["pydantic"]


def test_inspecting_a_bundle_needs_pydantic_alone(tmp_path: Path) -> None:
    write_sample(tmp_path / "a.vpe")
    code = f"import vp_engines; vp_engines.read_manifest({str(tmp_path / 'a.vpe')!r})"
    assert loaded_after(code) == ["pydantic"]


def test_preprocessing_does_not_load_torch() -> None:
    assert loaded_after("import vp_engines.preprocess, vp_engines.engine, PIL.Image") == ["pydantic", "PIL", "numpy"]


def test_import_is_quick() -> None:
    """Under 0.3 s of CPU time, best of five; waiting on a busy machine does not count."""
    code = "import time; start = time.process_time(); import vp_engines; print(time.process_time() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(run.stdout) for run in runs) < 0.3


def test_lazy_names_are_the_real_ones() -> None:
    import vp_engines
    from vp_engines.bundle import read_manifest
    from vp_engines.engine import Engine, load

    assert vp_engines.load is load
    assert vp_engines.Engine is Engine
    assert vp_engines.read_manifest is read_manifest
    assert set(vp_engines.__all__) <= set(dir(vp_engines))
    for name in vp_engines.__all__:
        assert getattr(vp_engines, name) is not None
    assert vp_engines.__version__[0].isdigit()


def test_unknown_names_are_attribute_errors() -> None:
    import vp_engines

    with pytest.raises(AttributeError, match="nonsense"):
        vp_engines.nonsense  # noqa: B018
