"""Pages in a real browser, if one is installed: overflowing content, and brightness."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")

# Elements that overflow a frame, or are only visible by scrolling sideways. The script runs in the frame's parent,
# since the page forbids scripts.
SCRIPT = """
const frame = document.querySelector('iframe'), found = {out: [], cut: [], width: 0};
const name = e => e.tagName + '.' + (e.getAttribute('class') || '') + ' ' + (e.textContent || '').trim().slice(0, 40);
frame.addEventListener('load', () => {
  const page = frame.contentDocument, edge = page.documentElement.clientWidth;
  found.width = edge;
  for (const e of page.body.querySelectorAll('*')) {
    if (e.closest('svg.aside, .cards thead, defs') || !e.getClientRects().length) continue;
    const box = e.getBoundingClientRect();
    if (box.right > edge + 0.5 || box.left < -0.5) found.out.push(name(e));
    if (!e.closest('svg') && e.scrollWidth > e.clientWidth + 1 && e.clientWidth) found.cut.push(name(e));
  }
  if (page.documentElement.scrollWidth > edge) found.out.push('the page itself');
  document.querySelector('pre').textContent = JSON.stringify(found);
});
frame.srcdoc = JSON.parse(document.getElementById('page').textContent);
"""


def _run(folder: Path, *words: str) -> str:
    assert CHROMIUM is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
             f"--user-data-dir={folder / 'profile'}")  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, *words], capture_output=True, text=True, errors="replace", timeout=300, check=True
    )
    return done.stdout


def misfits(page: str, width: int, folder: Path) -> dict[str, Any]:
    """Elements that do not fit a page `width` pixels wide: {"out": [...], "cut": [...], "width": ...}.

    Args:
        folder: Empty folder for the browser.
    """
    safe = json.dumps(page).replace("<", "\\u003c")
    outer = (
        f'<!doctype html><meta charset="utf-8"><iframe style="border:0" width="{width}" height="800"></iframe>'
        "<pre></pre>"
        f'<script id="page" type="application/json">{safe}</script><script>{SCRIPT}</script>'
    )
    path = folder / "outer.html"
    path.write_text(outer, encoding="utf-8")
    shown = _run(folder, "--virtual-time-budget=5000", "--window-size=1600,1000", "--dump-dom", path.as_uri())
    return dict(json.loads(html.unescape(shown.split("<pre>")[1].split("</pre>")[0])))


def screenshot(page: str, width: int, height: int, folder: Path, *, dark: bool) -> np.ndarray:
    """Screenshot in light or dark mode, uint8 [H, W, 3]."""
    path, picture = folder / "page.html", folder / "page.png"
    path.write_text(page, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(folder, scheme, f"--window-size={width},{height}", f"--screenshot={picture}", path.as_uri())
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))
