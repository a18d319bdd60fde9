"""What the C++ loader costs over torch's own: a run over the bare AOTI runner, opening over sha256sum and bare load.

    python benchmarks/cpp_loader.py --out docs/results/cpp.md

The bundle is the flowers ViT-S/16 for aoti, with its dense twin, exported once into build/. Both sides of each
comparison run in one process, interleaved, each first every other time; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import MODEL, THREADS, WEIGHTS, command_line, machine, need_shared, prose, table

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cpp" / "bench"
BUNDLE = ROOT / "build" / "bench-cpp" / "vit_s.vpe"
RUN_BAR, OPEN_BAR = 50.0, 1.3  # microseconds over the bare runner; times sha256sum and load


def built() -> Path:
    """The program that measures (engines/cpp/bench)."""
    options = ["-DVP_ENGINE_BENCH=ON", "-DVP_ENGINE_AOTI=ON", "-DBUILD_TESTING=OFF"]
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "engines" / "cpp" / "vp-bench"


def exported() -> Path:
    """The bundle, exported where it is not there yet."""
    if not BUNDLE.is_dir():
        BUNDLE.parent.mkdir(parents=True, exist_ok=True)
        code = "from vp_exporter.cli import vp_export; vp_export()"
        options = ["--model", MODEL, "--weights", WEIGHTS, "--method", "random", "--keep-rate", "0.63"]
        subprocess.run([sys.executable, "-c", code, *options, "--engine", "aoti", "--out", BUNDLE], check=True)
    return BUNDLE


def measured(*arguments: object) -> dict[str, np.ndarray]:
    """Seconds of each round: "bare" and "ours"."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True, env=environment)
    return {name: np.array(times) for name, times in json.loads(done.stdout).items()}


def report(program: Path, bundle: Path, rounds: int, opens: int) -> list[str]:
    """Lines of the results file."""
    runs = []
    for batch in (1, 8):
        times = measured(program, "run", bundle, batch, rounds if batch == 1 else max(rounds // 8, 10))
        bare, ours = (1e6 * np.median(times[name]) for name in ("bare", "ours"))
        paired = 1e6 * np.median(times["ours"] - times["bare"])
        cells = [str(batch), str(len(times["ours"])), f"{bare:.0f} us", f"{ours:.0f} us", f"{paired:+.1f} us"]
        runs.append([*cells, f"{ours / bare:.4f}"])
    times = measured(program, "open", bundle, opens)
    bare, ours = (1e3 * np.median(times[name]) for name in ("bare", "ours"))
    megabytes = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e6
    return [
        "# What the C++ loader costs",
        "",
        f"`{command_line('cpp_loader')}`",
        "",
        prose(machine()),
        "",
        f"Bars: a run under {RUN_BAR:.0f} us over the bare runner; opening within {OPEN_BAR} times sha256sum and load.",
        "",
        "## One run",
        "",
        prose(
            "Bare: `AOTIModelPackageLoader::run` on a tensor that is there already, its output left where it is. Ours: "
            "`vp_engine_run` from and to the caller's memory, with every check. The difference is the median of the "
            "differences of neighbouring runs."
        ),
        "",
        *table(["batch", "rounds", "bare", "ours", "difference", "ratio"], runs),
        "## Opening",
        "",
        prose(
            f"A bundle of {megabytes:.0f} MB: the ViT-S/16 and its dense twin. Bare: `sha256sum` of every file, then "
            "`AOTIModelPackageLoader` on the package. Ours: `vp_engine_open` and `vp_engine_close`."
        ),
        "",
        *table(
            ["rounds", "bare", "ours", "ratio"],
            [[str(opens), f"{bare:.0f} ms", f"{ours:.0f} ms", f"{ours / bare:.2f}"]],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400, help="runs at batch 1")
    parser.add_argument("--opens", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    arguments = parser.parse_args()
    if not BUNDLE.is_dir():
        need_shared()
    text = "\n".join(report(built(), exported(), arguments.rounds, arguments.opens)).rstrip() + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
