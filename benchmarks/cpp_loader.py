"""Overhead of the C++ loader: a run against torch's AOTI runner, opening against sha256sum and a bare load.

    python benchmarks/cpp_loader.py --out docs/results/cpp.md

Uses an aoti bundle of the flowers ViT-S/16 with its dense baseline, exported once into build/. Both sides of a
comparison run in one process, interleaved, in alternating order; figures are medians.
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
BUNDLES = ROOT / "build" / "bench-cpp"
RUN_BAR, OPEN_BAR = 50.0, 1.3  # microseconds over the bare runner; multiple of sha256sum plus load


def built() -> Path:
    """Path of the measuring program (engines/cpp/bench), which must have been built."""
    options = ["-DVP_ENGINE_BENCH=ON", "-DVP_ENGINE_AOTI=ON", "-DBUILD_TESTING=OFF"]
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "engines" / "cpp" / "vp-bench"


def exported(name: str, *options: object) -> Path:
    """Export a bundle, unless it exists."""
    bundle = BUNDLES / name
    if not bundle.is_dir():
        BUNDLES.mkdir(parents=True, exist_ok=True)
        common = ["--method", "random", "--keep-rate", "0.63", "--engine", "aoti", "--out", bundle]
        command = [sys.executable, "-c", "from vp_exporter.cli import vp_export; vp_export()", *options, *common]
        subprocess.run(list(map(str, command)), check=True)
    return bundle


def measured(*arguments: object, threads: int) -> dict[str, np.ndarray]:
    """Seconds of each round: "bare" and "ours"."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True, env=environment)
    return {name: np.array(times) for name, times in json.loads(done.stdout).items()}


def run_row(program: Path, bundle: Path, batch: int, rounds: int) -> list[str]:
    """One row of the table of runs."""
    times = measured(program, "run", bundle, batch, rounds, threads=1)
    bare, ours = (1e6 * np.median(times[name]) for name in ("bare", "ours"))
    low, middle, high = 1e6 * np.percentile(times["ours"] - times["bare"], [25, 50, 75])
    difference = f"{middle:+.1f} us ({low:+.1f} to {high:+.1f})"
    return [bundle.stem, str(batch), str(rounds), f"{bare:.0f} us", f"{ours:.0f} us", difference]


def report(program: Path, tiny: Path, bundle: Path, rounds: int, opens: int) -> list[str]:
    """Lines of the results file."""
    runs = [run_row(program, tiny, batch, 10 * rounds) for batch in (1, 8)]
    runs += [run_row(program, bundle, 1, rounds)]
    times = measured(program, "open", bundle, opens, threads=THREADS)
    bare, ours = (1e3 * np.median(times[name]) for name in ("bare", "ours"))
    megabytes = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e6
    return [
        "# What the C++ loader costs",
        "",
        f"`{command_line('cpp_loader').replace('cpp_loader.md', 'cpp.md')}`",
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
            "differences of neighbouring runs, with its quartiles; one thread. `tiny` is timm's `test_vit`: its runs "
            "are short enough to see microseconds beside them; beside a ViT-S they drown in the noise of the machine."
        ),
        "",
        *table(["bundle", "batch", "rounds", "bare", "ours", "difference (quartiles)"], runs),
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
    parser.add_argument("--rounds", type=int, default=200, help="runs of the ViT-S; ten times as many of the tiny")
    parser.add_argument("--opens", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    arguments = parser.parse_args()
    if not (BUNDLES / "vit_s.vpe").is_dir():
        need_shared()
    tiny = exported("tiny.vpe", "--model", "test_vit", "--random-init", "--no-dense")
    vit_s = exported("vit_s.vpe", "--model", MODEL, "--weights", WEIGHTS)
    text = "\n".join(report(built(), tiny, vit_s, arguments.rounds, arguments.opens)).rstrip() + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
