"""Draw the README's picture: a digit, complete and with the kept patches only, with cost and accuracy.

    python examples/digits/picture.py --out docs/images/digits.svg

The figures are those of docs/results/digits.md; the digit and the mask are the demo's.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import sys
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the example is a folder of scripts, not an installed package

import data  # noqa: E402

RESULTS = HERE.parents[1] / "docs" / "results" / "digits.md"
DIGIT = 3  # label; the first test image with it is drawn
SIDE, PATCHES = 168, 14  # pixels of a drawn digit; patches along its side
STYLE = """
  text { font: 15px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .card { fill: #f6f8fa; stroke: #d1d9e0 } .small { font-size: 13px } .big { font-weight: 600 }
  .dropped { fill: #dfe3e8 } .grid { stroke: #8c959f; stroke-opacity: 0.6; stroke-width: 0.5 }
  .dense { fill: #8c959f } .reduced { fill: #2da44e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .card { fill: #161b22; stroke: #3d444d } .dropped { fill: #3d444d }
    .reduced { fill: #3fb950 }
  }
"""


def figures(page: str) -> dict[str, float]:
    """Figures in the picture, read from the results page."""
    cells = {
        name: [float(value) for value in re.findall(r"[\d.]+", row)]
        for name, row in re.findall(r"^\| ([^|]+?) \|((?:[^|]*\|){2})", page, re.MULTILINE)
    }
    patches, top1 = cells["patches in every block"], cells["top-1 on 1,000 held-out digits"]
    return {
        "dense patches": patches[0], "patches": patches[1], "dense top-1": top1[0], "top-1": top1[1],
        "macs": cells["MACs"][-1], "faster": cells["time of a batch of 8"][-1],
    }  # fmt: skip


def digit_image() -> str:
    """A test digit as a data URI, at original resolution."""
    images, labels = data.load_part("test")
    stream = io.BytesIO()
    Image.fromarray(images[labels == DIGIT][0]).save(stream, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def panel(x: int, image: str, title: str, dropped: np.ndarray) -> str:
    """A digit with the patch grid; `dropped` patches [14, 14] are covered."""
    step = SIDE / PATCHES
    cover = "".join(f"M{c * step:g} {r * step:g}h{step:g}v{step:g}h-{step:g}z" for r, c in np.argwhere(dropped))
    lines = "".join(f"M0 {i * step:g}H{SIDE}M{i * step:g} 0V{SIDE}" for i in range(PATCHES + 1))
    return (
        f'<g transform="translate({x} 58)"><text class="big" y="-16">{escape(title)}</text>'
        f'<image width="{SIDE}" height="{SIDE}" style="image-rendering: pixelated" href="{image}"/>'
        + (f'<path class="dropped" d="{cover}"/>' if cover else "")
        + f'<path class="grid" fill="none" d="{lines}"/></g>'
    )


def bar(y: int, kind: str, share: float, text: str) -> str:
    return f'<rect class="{kind}" y="{y}" width="{220 * share:.1f}" height="16" rx="3"/>' + (
        f'<text class="small" x="{220 * share + 8:.1f}" y="{y + 13}">{escape(text)}</text>'
    )


def draw(mask: np.ndarray, page: str) -> str:
    """The picture as SVG.

    Args:
        mask: [blocks, patches], 1 keeps.
        page: Content of docs/results/digits.md.
    """
    said, image = figures(page), digit_image()
    kept = mask[0].reshape(PATCHES, PATCHES).astype(bool)
    assert kept.sum() == said["patches"]
    rows = [
        f'<text y="14">time of a batch of 8: {said["faster"]:g}x faster</text>',
        bar(24, "dense", 1.0, "dense"),
        bar(45, "reduced", 1 / said["faster"], "reduced"),
        '<text y="98">top-1 on 1,000 held-out digits</text>',
        bar(108, "dense", said["dense top-1"] / 100, f"{said['dense top-1']:g}%"),
        bar(129, "reduced", said["top-1"] / 100, f"{said['top-1']:g}%"),
        f'<text class="small" y="168">{said["macs"]:g}x fewer MACs; realised efficiency '
        f"{said['faster'] / said['macs']:.2f}</text>",
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 256" width="760" height="256" role="img">'
        f"<title>A digit with all {said['dense patches']:g} patches and with the {said['patches']:g} that survive: "
        f"{said['faster']:g}x faster, {said['dense top-1']:g}% and {said['top-1']:g}% top-1</title>"
        f"<style>{STYLE}</style>"
        '<rect class="card" x="0.5" y="0.5" width="759" height="255" rx="8"/>'
        + panel(24, image, f"dense: {said['dense patches']:g} patches", np.zeros_like(kept))
        + panel(228, image, f"reduced: {said['patches']:g} patches", ~kept)
        + f'<g transform="translate(440 58)">{"".join(rows)}</g></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(draw(np.load(HERE / "mask.npy"), RESULTS.read_text()))


if __name__ == "__main__":
    main()
