"""Plots can be drawn for any numbers; the page contains them, needs no network and escapes its input."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from tests.exporter.browser import needs_browser, screenshot
from vp_engines.errors import PackageMissingError
from vp_exporter.errors import SearchError
from vp_exporter.searching.report import pictures
from vp_exporter.searching.report.comparison import judge_search
from vp_exporter.searching.report.page import write_page
from vp_exporter.utils import plotting

BLUE, ORANGE, GREY = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xE9, 0xEC, 0xEF)


def opened(png: bytes) -> np.ndarray:
    """Decode a PNG of plausible size: uint8 [H, W, 3]."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert 900 <= image.width <= 940
    assert 150 <= image.height <= 2000
    assert len(png) < 500_000
    return np.asarray(image)


def share(image: np.ndarray, colour: tuple[int, ...]) -> float:
    return float((image == np.array(colour, dtype=np.uint8)).all(axis=2).sum())


def trace(count: int) -> list[dict[str, Any]]:
    return [
        {"stage": f"stage {i % 2}", "evaluation": i + 1, "loss": 1 / (i + 1), "best": 1 / (i + 1)} for i in range(count)
    ]


def sample() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    row = {"name": "greedy", "macs_share": 0.5, "kl": 0.25, "agreement": 91.5, "evaluations": 1200, "seconds": 90.0}
    return {
        "title": "Done",
        "model": "tiny",
        "method": "vpruner",
        "budget": "50% of the work",
        "facts": [["Seeds", 7]],
        "stages": [{**row, "accepted": True}, {**row, "name": "ppo", "kl": None, "accepted": False}],
        "baselines": [{"name": "centre", "macs_share": 0.5, "kl": 0.8, "agreement": 70.0}],
        "importance": rng.lognormal(size=(3, 16)),
        "life": rng.integers(1, 4, 16),
        "tokens": {"counts": {"vpruner": [17, 12, 9]}, "dense": 17},
        "trace": trace(9),
        "front": [row],
        "key_scales": rng.lognormal(size=(3, 16)),
        "warnings": ["one broken image"],
    }


@pytest.mark.parametrize(("depth", "grid"), [(1, (1, 1)), (1, (4, 4)), (24, (8, 20)), (12, (10, 3)), (3, (37, 50))])
def test_maps_of_every_shape(depth: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    patches = grid[0] * grid[1]
    life = rng.integers(1, depth + 1, patches)
    opened(pictures.importance_maps(rng.lognormal(size=(depth, patches)), grid))
    opened(pictures.kept_sets(life, grid, depth))
    opened(pictures.key_bias_map(rng.lognormal(size=(depth, patches)), grid))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-300, float("nan"), float("inf")])
def test_maps_of_odd_numbers(value: float) -> None:
    opened(pictures.importance_maps(np.full((2, 9), value), (3, 3)))
    opened(pictures.key_bias_map(np.full((2, 9), value), (3, 3)))
    mixed = np.full((2, 9), 0.5)
    mixed[0, 0] = value
    opened(pictures.importance_maps(mixed, (3, 3)))
    opened(pictures.key_bias_map(mixed, (3, 3)))


def test_importance_has_one_scale_for_all_blocks() -> None:
    """Equal numbers look alike in each block; a block of larger ones looks brighter."""
    same = opened(pictures.importance_maps(np.array([[1.0, 100.0], [1.0, 100.0]]), (1, 2)))
    other = opened(pictures.importance_maps(np.array([[1.0, 1.0], [100.0, 100.0]]), (1, 2)))
    dark, bright = (tuple(int(v) for v in colormaps["cividis"](end, bytes=True)[:3]) for end in (0.0, 1.0))
    for image in (same, other):
        assert share(image, dark) == pytest.approx(share(image, bright), rel=0.05)
    half = same.shape[1] // 4  # between the first and the second of (at least) four columns
    assert share(same[:, :half], dark) > 1000
    assert share(same[:, :half], bright) > 1000
    assert share(other[:60, :half], bright) == 0


def test_kept_sets_show_only_distinct_ones_in_their_colours() -> None:
    mask = np.ones((6, 16))
    mask[2:, :4] = 0
    mask[4:, 4:12] = 0
    image = opened(pictures.kept_sets(mask, (4, 4)))
    life = (mask > 0).sum(axis=0)
    assert np.array_equal(image, opened(pictures.kept_sets(life, (4, 4))))
    # three maps: 16 + 12 + 4 kept, 4 + 8 leaving, 4 gone before; the legend adds one small patch each
    blue, orange, grey = (share(image, colour) for colour in (BLUE, ORANGE, GREY))
    assert blue / orange == pytest.approx(32 / 12, rel=0.06)
    assert orange / grey == pytest.approx(12 / 4, rel=0.12)
    with_more = opened(pictures.kept_sets(np.concatenate([mask, mask[-1:]]), (4, 4)))
    assert share(with_more, BLUE) == blue


def test_untuned_blocks_are_left_out() -> None:
    scales = np.ones((13, 16))
    scales[3] = 2.0
    one = opened(pictures.key_bias_map(scales, (4, 4)))
    scales[4:] = 2.0
    assert opened(pictures.key_bias_map(scales, (4, 4))).shape[0] > one.shape[0]


@pytest.mark.parametrize("count", [0, 1, 2, 20_000])
def test_progress(count: int) -> None:
    opened(pictures.progress(trace(count)))


def test_lines_of_odd_numbers_and_names() -> None:
    names = ["$x^", "_hidden", "\\frac{$", "名前\n", "a" * 300, ""]
    odd = [0.0, float("nan"), float("inf"), -1.0, 1e-9, 0.1]
    rows = [
        {"stage": n, "evaluation": i, "loss": v, "best": v} for i, (n, v) in enumerate(zip(names, odd, strict=True))
    ]
    opened(pictures.progress(rows))
    opened(pictures.front([{"name": n, "macs_share": 0.5, "kl": v} for n, v in zip(names, odd, strict=True)]))
    opened(pictures.front([{"name": f"{i}", "macs_share": 0.1, "baseline": i % 2, "kl": 1} for i in range(20)]))
    opened(pictures.front([]))
    opened(pictures.tokens_per_block({name: [5, 4] for name in names}, 5))
    opened(pictures.tokens_per_block({"one": [3]}, 5))
    opened(pictures.tokens_per_block({"deep": list(range(100, 52, -1))}, 101))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.importance_maps(np.ones((1, 1)), (1, 1)),
        lambda: pictures.kept_sets(np.ones(1, dtype=int), (1, 1)),
        lambda: pictures.tokens_per_block({}, 1),
        lambda: pictures.progress([]),
        lambda: pictures.front([]),
        lambda: pictures.key_bias_map(np.ones((1, 1)), (1, 1)),
        plotting.require_matplotlib,
    ],
)
def test_without_matplotlib(draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        PackageMissingError, match=r"matplotlib, which is not installed; pip install 'vp-export\[profile\]'$"
    ):
        draw()


def test_the_page_and_its_files(tmp_path: Path) -> None:
    result = sample()
    files = write_page(tmp_path, result)
    assert sorted(tmp_path.iterdir()) == sorted(files)  # no partly written files
    names = {path.stem for path in files if path.suffix == ".png"}
    assert names == {"kept", "tokens", "front", "progress", "importance", "key_scales"}
    for name in names:
        opened((tmp_path / f"{name}.png").read_bytes())
    html = (tmp_path / "search.html").read_text()
    assert not re.search(r"https?:|<script|<link|url\(|@import", html, re.IGNORECASE)
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    for text in ("50.0%", "0.2500", "91.50%", "1,200", "rejected", "one broken image", "Seeds", "3 min", "centre"):
        assert text in html
    data = json.loads((tmp_path / "search.json").read_text())
    assert (data["format"], data["version"]) == ("vp-search", 1)
    assert data["life"] == result["life"].tolist()
    assert data["importance"] == result["importance"].tolist()


SECTIONS = {
    "stages": ">Stages<",
    "baselines": ">Baselines<",
    "importance": ">Importance of patches<",
    "life": ">Which patches survive<",
    "tokens": ">Tokens per block<",
    "trace": ">How the search went<",
    "front": ">Accuracy against work<",
    "key_scales": ">Tuned key scales<",
    "warnings": ">Warnings<",
    "facts": ">Facts<",
}


@pytest.mark.parametrize("given", [*SECTIONS, None])
def test_missing_sections_are_left_out(tmp_path: Path, given: str | None) -> None:
    write_page(tmp_path, {key: value for key, value in sample().items() if key == given})
    html = (tmp_path / "search.html").read_text()
    assert [key for key, heading in SECTIONS.items() if heading in html] == ([given] if given else [])


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    hostile = "</style><script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    result = dict.fromkeys(("title", "model", "method", "budget"), hostile)
    row = {"name": hostile}
    write_page(
        tmp_path, {**result, "facts": [[hostile, hostile]], "stages": [row], "baselines": [row], "warnings": [hostile]}
    )
    html = (tmp_path / "search.html").read_text()
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("</style>") == 1
    assert html.count("&lt;script&gt;") >= 9
    assert json.loads((tmp_path / "search.json").read_text())["model"] == hostile


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    write_page(
        tmp_path, {"stages": [{"name": "a", "kl": float("nan"), "agreement": float("inf")}], "extra": np.float32(1)}
    )
    data = json.loads((tmp_path / "search.json").read_text(), parse_constant=pytest.fail)
    assert data["stages"][0]["kl"] is None
    assert data["extra"] == 1.0
    assert "nan" not in (tmp_path / "search.html").read_text().lower().split("<body>")[1]


def test_grids(tmp_path: Path) -> None:
    write_page(tmp_path, {"life": np.ones(12, dtype=int), "grid": (3, 4)})
    given = (tmp_path / "kept.png").read_bytes()
    write_page(tmp_path, {"life": np.ones(12, dtype=int)})  # not a square: one row
    assert (tmp_path / "kept.png").read_bytes() != given
    with pytest.raises(ValueError, match="a grid of 3 x 5 does not hold 12 patches"):
        write_page(tmp_path, {"life": np.ones(12, dtype=int), "grid": (3, 5)})


def test_a_folder_that_is_not_there_is_made_and_a_file_in_its_place_is_told(tmp_path: Path) -> None:
    assert all(path.exists() for path in write_page(tmp_path / "new" / "page", {}))
    (tmp_path / "file").touch()
    with pytest.raises(SearchError, match=r"cannot write .*: Not a directory; expected a folder"):
        write_page(tmp_path / "file" / "page", {})


def rows_of(html: str) -> dict[str, str]:
    """Rows of the page's tables by the name in their first cell, with the row's own tag."""
    found = {}
    for tag, body in re.findall(r"<tr([^>]*)>(.*?)</tr>", html, re.DOTALL):
        name = re.search(r'<th scope="row">(.*?)( <span|</th>)', body)
        if name:
            found[name[1]] = tag + body
    return found


OWN = {"name": "greedy", "macs_share": 0.5, "kl": 0.25, "agreement": 91.5}
CENTRE, GRID_ROW = ({**OWN, "name": name, "kl": kl} for name, kl in (("centre", 0.8), ("grid", 0.5)))


@pytest.mark.parametrize(
    ("own", "baseline", "outcome", "heading", "style", "sentence"),
    [
        (0.2, 0.3, "better", "Better than every baseline", "passed", "The search beat the best baseline: KL 0.2"),
        (0.3, 0.2, "worse", "A baseline is better", "failed", "The best baseline is better than what was searched"),
        (0.2, 0.2, "unproven", "No gain proven", "measured", "No gain over the best baseline is proven"),
    ],
)
def test_the_page_begins_with_a_verdict(
    own: float, baseline: float, outcome: str, heading: str, style: str, sentence: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    pair = [mean + 0.02 * rng.standard_normal(200) for mean in (own, baseline)]
    verdict = judge_search("grid", *pair)
    assert verdict.difference is not None
    assert (verdict.outcome, verdict.images) == (outcome, 200)
    assert verdict.difference.value == pytest.approx(pair[0].mean() - pair[1].mean())
    write_page(tmp_path, {"stages": [OWN], "baselines": [CENTRE, GRID_ROW], "verdict": verdict.to_dict()})
    html = (tmp_path / "search.html").read_text()
    assert html.index(f'<section class="verdict {style}"') < html.index("<dl") < html.index("<table>")
    assert f"<h2>{heading}</h2>" in html
    assert sentence in html
    assert "on 200 held-out images" in html
    assert json.loads((tmp_path / "search.json").read_text())["verdict"]["outcome"] == outcome


def test_the_winner_and_the_best_baseline_are_marked(tmp_path: Path) -> None:
    stages = [OWN, {**OWN, "name": "ppo", "winner": True}, {**OWN, "name": "tuning", "kl": 0.3, "accepted": False}]
    write_page(tmp_path, {"stages": stages, "baselines": [CENTRE, GRID_ROW]})
    rows = rows_of((tmp_path / "search.html").read_text())
    assert {name: 'class="winner"' in row for name, row in rows.items() if name in ("greedy", "ppo", "tuning")} == {
        "greedy": False, "ppo": True, "tuning": False,
    }  # fmt: skip
    assert '<span class="mark">winner</span>' in rows["ppo"]
    assert '<span class="mark">best baseline</span>' in rows["grid"]
    assert "mark" not in rows["centre"]


def test_means_alone_claim_nothing_beyond_chance(tmp_path: Path) -> None:
    """Rows of an older search: the last accepted stage is the winner, without an interval."""
    write_page(tmp_path, {"stages": [OWN, {**OWN, "name": "ppo", "accepted": False}], "baselines": [CENTRE, GRID_ROW]})
    html = (tmp_path / "search.html").read_text()
    assert "No gain proven" in html
    assert "KL 0.2500 against 0.5000 nats of grid, the best baseline (−50%)" in html
    assert "no interval was measured" in html
    assert 'class="winner"' in rows_of(html)["greedy"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens", "front", "progress"])
def test_charts_do_not_glare_in_dark_mode(name: str, tmp_path: Path) -> None:
    """A chart alone on the page: dark background, light ink, both present."""
    key = {"tokens": "tokens", "front": "front", "progress": "trace"}[name]
    write_page(tmp_path, {key: sample()[key]})
    html = (tmp_path / "search.html").read_text()
    shades = {}
    for dark in (False, True):
        folder = tmp_path / str(dark)
        folder.mkdir()
        picture = screenshot(html, 960, 520, folder, dark=dark).mean(axis=2)
        shades[dark] = picture[picture.shape[0] // 2 :]  # below the headings
    assert float(np.median(shades[False])) > 240
    assert float(np.median(shades[True])) < 50
    assert float((shades[True] > 215).mean()) < 0.05
    # Ink stands out: compare the darkest in light mode with the lightest in dark mode.
    assert float(np.quantile(shades[False], 0.002)) < 110
    assert float(np.quantile(shades[True], 0.998)) > 140
