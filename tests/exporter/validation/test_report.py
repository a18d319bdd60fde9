import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.exporter.validation.test_verdict import UNLABELLED, accuracy, row
from vp_exporter.cli import show
from vp_exporter.validation import charts
from vp_exporter.validation.accuracy import Parity
from vp_exporter.validation.report import Report, ReportData
from vp_exporter.validation.verdict import Budget, judge

NASTY = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "link", "img", "br", "hr", "input"}


def report_data(accuracy_=None, latency=None, budget=None, **changes):
    accuracy_ = accuracy() if accuracy_ is None else accuracy_ or None  # False: not measured
    latency = [row(1), row(8, 1.6, 1.55)] if latency is None else latency
    kept = [(0, range(16)), (1, range(16)), (2, range(2, 16, 2)), (3, range(2, 16, 2)), (4, [4, 6])]
    data = ReportData(
        model={"name": "vit_tiny", "image_size": (32, 32), "mean": np.float32(0.5)},
        engine={"name": "ort", "version": "1.30.0"},
        plan={"method": "vpruner", "budget": {"macs": 0.6}, "fingerprint": "ab" * 32},
        tokens=[{"block": b, "attention": len(k) + 1, "mlp": len(k) + 1} for b, k in kept],
        prefix_tokens=1,
        macs={"dense": 4.6e9, "reduced": 2.3e9},
        verdict=judge(accuracy_, latency, budget or Budget(max_drop=1, min_speedup=1.2)),
        accuracy=accuracy_,
        latency=latency,
        grid=(4, 4),
        kept_stages=kept,
        samples=[np.random.default_rng(i).integers(0, 256, (300, 200, 3), dtype=np.uint8) for i in range(8)],
        environment={"cpu": "A CPU", "date": "2026-11-21T00:00:00+00:00"},
        notes=["a note"],
        warnings=["a warning"],
    )
    return replace(data, **changes)


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every tag is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def having(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page(data):
    return Page(Report(data).to_html())


def test_verdict_first_then_the_four_figures():
    text = page(report_data()).text
    places = [
        text.index(word)
        for word in ("Passed Within budget", "Speed-up 1.60×", "Top-1 change −0.40", "98.00%", "100%", "Checks")
    ]
    assert places == sorted(places)
    assert "from 94.00% to 93.60%" in text
    assert "1.50× at batch 1" in text


def test_nothing_is_fetched_and_nothing_runs():
    html = Report(report_data()).to_html()
    assert not re.search(r"https?:|url\(|@import|@font-face", html)
    result = page(report_data())
    assert not result.having("script")
    assert not result.having("link")
    for tag, attributes in result.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, value)
    assert any("default-src 'none'" in meta.get("content", "") for meta in result.having("meta"))


def test_every_text_is_escaped():
    bad = {NASTY: NASTY, "name": NASTY, "list": [NASTY]}
    data = report_data(
        accuracy(nonfinite_reduced=1, nonfinite_images=(NASTY,)),
        model=bad,
        engine=bad,
        plan=bad,
        environment=bad,
        notes=[NASTY],
        warnings=[NASTY],
    )
    html = Report(data).to_html()
    assert "<script" not in html
    result = Page(html)
    assert result.text.count("<script>alert('x')</script> & \"quoted\"") >= 12  # shown as text
    assert {tag for tag, _ in result.tags} == {tag for tag, _ in page(report_data()).tags}


def test_without_accuracy_it_says_so_loudly():
    data = report_data(False, budget=Budget(min_speedup=1.2))
    result = page(data)
    assert "Accuracy not validated" in result.text
    assert "nothing is known of how this engine answers" in result.text
    assert "Agreement with dense not validated" in result.text
    assert Report(data).to_dict()["accuracy"] is None
    assert Report(data).to_dict()["accuracy_validated"] is False
    # A failed verdict must not hide it.
    failed = page(report_data(False, budget=Budget(min_speedup=1.9)))
    assert "Failed" in failed.text
    assert "Accuracy not validated" in failed.text


def test_without_labels_and_without_latency():
    text = page(report_data(accuracy(**UNLABELLED), latency=[], budget=Budget(min_agreement=90))).text
    assert "No labels" in text
    assert "Top-1 change unknown" in text
    assert "Latency was not measured." in text
    assert "Speed-up not measured" in text


def test_status_words():
    assert "Measured Measured, with no budget" in page(report_data(budget=Budget())).text
    assert "Failed Failed the accuracy budget" in page(report_data(budget=Budget(max_drop=0))).text


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (lambda: report_data(), "passed", "Passed"),
        (lambda: report_data(budget=Budget()), "measured", "Measured"),
        (lambda: report_data(latency=[row(1, 0.75, 0.72)], budget=Budget()), "measured", "Measured"),
        (lambda: report_data(latency=[row(1, 0.75, 0.72)], budget=Budget(max_drop=2)), "measured", "Measured"),
        (lambda: report_data(budget=Budget(max_drop=0)), "failed", "Failed"),
        (lambda: report_data(False, budget=Budget()), "unvalidated", "Accuracy not validated"),
    ],
)
def test_every_status_has_its_colour_and_word(data, status, words, capsys):
    """On the page and on the terminal, only "passed" is green."""
    found = data()
    result = page(found)
    (section,) = [each for each in result.having("section") if "verdict" in each.get("class", "").split()]
    assert section["class"].split() == ["verdict", status]
    assert f"{words} {found.verdict.headline}" in result.text
    css = re.sub(r"\s+", " ", Report(found).to_html())
    assert f".{status} {{ --tone: var(--{status}); --wash: var(--{status}-wash); }}" in css
    assert Report(found).to_dict()["verdict"]["status"] == status
    stdout = show.stdout
    show.stdout = Console(force_terminal=True, color_system="standard", width=200)
    try:
        show.report(found, brief=True)
    finally:
        show.stdout = stdout
    colour = {"passed": 32, "failed": 31, "measured": 36, "unvalidated": 33}[status]
    assert capsys.readouterr().out.startswith(f"\x1b[1;{colour}m{status}\x1b[0m: ")


def test_none_is_not_counted():
    """Rows of zeros are left out."""
    text = page(report_data()).text
    assert "0 not finite" not in text
    assert "Images with NaN" not in text
    bad = page(report_data(accuracy(nonfinite_reduced=2, kl=None))).text
    assert "2 not finite" in bad
    assert "Images with NaN or infinite outputs 0 2" in bad


def test_dropped_patches_are_seen_on_every_photograph():
    """Dark on bright photographs, hatched with a white border on dark ones; independent of the page's colours."""
    html = Report(report_data()).to_html()
    rules = dict(re.findall(r"\.(dropped|hatch|border) \{(.*?)\}", html))
    fill, opacity = re.search(r"fill: (#\w{6}); fill-opacity: ([.\d]+)", rules["dropped"]).groups()
    # A white patch below it is far darker than a white one beside it.
    shade = (1 - float(opacity)) * 255 + float(opacity) * int(fill[1:3], 16)
    assert shade < 90
    for name in ("hatch", "border"):
        assert "stroke: #fff" in rules[name]
    assert not any("var(" in rule for rule in rules.values())
    (stage,) = charts.stages([(1, [0, 1, 3])], (2, 2))  # of a square of four the lower left one is gone
    assert (stage.hatch_path, stage.border_path) == ("M0 2l1-1", "M0 1h1M1 1v1")


def test_json_is_plain_and_complete(tmp_path):
    parity = Parity(64, 1e-5, 1e-6, 1e-6, 64, 0)
    data = report_data(accuracy(parity=parity), plan={"method": "x", "score": float("nan"), "seeds": np.arange(2)})
    paths = Report(data).write(tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.html"]

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(paths[0].read_text(encoding="utf-8"), parse_constant=refuse)
    assert (content["format"], content["version"]) == ("vp-report", 2)
    assert set(content) == {
        *("format", "version", "verdict", "accuracy_validated", "accuracy", "latency", "macs", "tokens"),
        *("dense_tokens", "prefix_tokens", "grid", "kept_stages", "model", "plan", "engine", "environment"),
        *("notes", "warnings", "baseline", "preprocessing"),
    }
    assert content["macs"] == {"dense": 4.6e9, "reduced": 2.3e9, "ratio": 2.0}
    assert content["plan"] == {"method": "x", "score": None, "seeds": [0, 1]}
    assert content["kept_stages"][4] == {"block": 4, "kept": [4, 6]}
    assert content["accuracy"]["top1_difference"]["value"] == -0.4
    assert content["accuracy"]["parity"]["max_abs"] == 1e-5
    assert content["latency"][1]["speedup"] == {"value": 1.6, "low": 1.55, "high": 1.6500000000000001}
    assert content["latency"][1]["outcome"] == "faster"
    assert content["verdict"]["status"] == "passed"
    assert paths[1].read_text(encoding="utf-8") == Report(data).to_html()


def test_an_error_leaves_no_half_report(tmp_path):
    broken = report_data(macs={"dense": 1.0})
    with pytest.raises(KeyError):
        Report(broken).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_accessible():
    result = page(report_data())
    pictures = [a for a in result.having("svg") if a.get("aria-hidden") != "true"]
    assert pictures
    assert all(a.get("role") == "img" and a.get("aria-label") for a in pictures)
    assert result.having("html")[0]["lang"] == "en"
    assert all(a.get("scope") in ("col", "row") for a in result.having("th"))
    assert len(result.having("h1")) == 1
    ids = [a["id"] for _, a in result.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in result.having("use")} == set(ids)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_and_dark():
    """WCAG 2: at least 4.5 to 1 for text."""
    html = Report(report_data()).to_html()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S)]
    assert len(schemes) == 2
    for colours in schemes:
        pairs = [("ink", "page"), ("ink", "surface"), ("muted", "page"), ("muted", "surface")]
        for status in ("passed", "failed", "measured", "unvalidated"):
            pairs += [(status, f"{status}-wash"), ("ink", f"{status}-wash"), (status, "surface")]
        for front, back in pairs:
            light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_at_most_six_small_samples():
    images = page(report_data()).having("image")
    assert len(images) == 6
    for attributes in images:
        content = base64.b64decode(attributes["href"].removeprefix("data:image/jpeg;base64,"), validate=True)
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "JPEG"
            assert max(image.size) == 160


def test_patches_without_samples_and_plans_without_fixed_patches():
    result = page(report_data(samples=[]))
    assert "Which patches survive" in result.text
    assert not result.having("image")
    assert "Which patches survive" not in page(report_data(kept_stages=[])).text


def drawn(path):
    """Cells (row, column) under an SVG path of one-unit-high rectangles."""
    cells = [
        (int(y), int(x) + i)
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path)
        for i in range(int(width))
    ]
    assert len(re.findall("M", path)) == len(re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path))
    return cells


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14)])
def test_dropped_patches_are_drawn_where_they_are(grid):
    rng = np.random.default_rng(0)
    count = grid[0] * grid[1]
    for keep in (0, count // 2, count - 1):
        kept = rng.permutation(count)[:keep]
        (stage,) = charts.stages([(3, kept)], grid)
        cells = drawn(stage.dropped_path)
        assert len(cells) == len(set(cells)) == count - keep
        assert {r * grid[1] + c for r, c in cells} == set(range(count)) - set(kept.tolist())
        assert (stage.block, stage.kept) == (3, keep)


def test_only_changing_stages_and_not_too_many():
    shown = charts.stages(report_data().kept_stages, (4, 4))
    assert [(stage.block, stage.kept) for stage in shown] == [(2, 7), (4, 2)]  # block 0 keeps all; 1 and 3 repeat
    many = charts.stages([(b, range(16 - b)) for b in range(13)], (4, 4))
    assert len(many) == 6
    assert (many[0].block, many[-1].block) == (1, 12)


@pytest.mark.parametrize("depth", [1, 12, 40])
def test_token_chart_heights_follow_the_counts(depth):
    tokens = [{"block": b, "attention": 197 - 4 * b, "mlp": 195 - 4 * b} for b in range(depth)]
    chart = charts.token_chart(tokens, 197)
    for kind in ("attention", "mlp"):
        heights = [bar.height for bar in chart.bars if bar.kind == kind]
        scale = heights[0] / tokens[0][kind]
        assert heights == pytest.approx([scale * one[kind] for one in tokens])
    assert all(bar.x >= 0 and bar.x + bar.width <= chart.width + 1e-6 and bar.y >= 0 for bar in chart.bars)
    assert all(bar.y + bar.height == pytest.approx(chart.bottom) for bar in chart.bars)
    assert len(chart.blocks) <= 24


def test_latency_chart_is_to_scale():
    chart = charts.latency_chart([row(1), row(8)])
    dense, reduced = chart.panels[0].lines
    assert (dense.median - chart.left) / (reduced.median - chart.left) == pytest.approx(15 / 10)
    assert (dense.p99 - chart.left) / (dense.median - chart.left) == pytest.approx(17 / 15)
    assert not dense.clipped
    slow = row(1)
    stray = charts.latency_chart([replace(slow, dense=replace(slow.dense, p99_ms=900.0))]).panels[0].lines[0]
    assert stray.clipped
    assert stray.median <= stray.p90 <= stray.p99 < chart.width
    assert "900" in stray.label


def test_small_numbers():
    assert [charts.milliseconds(x) for x in (0.01234, 0.1234, 1.234, 12.34, 1234.5, 0)] == [
        *("0.012", "0.123", "1.23", "12.3", "1234", "0")
    ]
    assert [charts._ticks(top) for top in (1, 5, 17, 197, 1025)] == [
        [0, 1],
        [0, 2, 4],
        [0, 5, 10, 15],
        [0, 50, 100, 150],
        [0, 500, 1000],
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"kept_stages": [(0, [16])]},
        {"kept_stages": [(0, [-1])]},
        {"tokens": []},
        {"samples": [np.zeros((4, 4, 3), np.float32)]},
        {"samples": [np.zeros((4, 4), np.uint8)]},
    ],
)
def test_parts_that_do_not_fit(changes):
    with pytest.raises(ValueError, match=r"report needs|lie outside|sample is"):
        report_data(**changes)
