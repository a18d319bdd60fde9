"""Write docs/results/gpu.md from the rows measured so far; missing rows are listed as missing."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.kernels import BARS
from benchmarks.gpu.models import CHOOSING_BAR, ONE_IMAGE_BAR, STATIC_BAR

Entry = Mapping[str, Any]
NOTHING = "not measured"
COMMANDS = (
    "python -m benchmarks.gpu --parts machine kernels-check kernels-time --quick --cache build/gpu.json",
    "python -m benchmarks.gpu --parts models --quick --engines aoti aoti-graph --cache build/gpu.json",
    "python -m benchmarks.gpu --parts kernels-time --cache build/gpu.json",
    "python -m benchmarks.gpu --parts kernels-check --cache build/gpu.json",
    "python -m benchmarks.gpu --parts models --models deit_small_patch16_224 deit_base_patch16_224 --dtypes bf16 "
    "--batches 256 1 --cache build/gpu.json",
    "python -m benchmarks.gpu --report-only --cache build/gpu.json --out docs/results/gpu.md",
)
ATTENTION_HEAD = ["N", "B", "H", "dtype", "kernel", "us", "best torch form", "its us", "ratio", "share of copy", "bars"]
FORMS_HEAD = ["operator", "shape", "us", "share of copy", "ratio to the best torch form", "torch forms, us", "bars"]
DENSE_HEAD = ["model", "dtype", "batch", "best", "ms", "img/s", "all, ms"]
REDUCED_HEAD = [
    "model", "dtype", "batch", "reducer", "kernels", "engine", "MAC ratio", "ms", "img/s", "speed-up over best dense",
    "efficiency", "speed-up on the same engine", "bar",
]  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, followed by an empty one."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def render(rows: Mapping[str, Entry], *, note: str = "", synthetic: bool = False) -> str:
    """Render the page.

    Args:
        rows: Of a results file.
        note: Reason for a page without figures.
        synthetic: The rows are made up (by a test); stated in the first line.
    """
    parts: dict[str, list[Entry]] = {}
    for row in rows.values():
        parts.setdefault(str(row["part"]), []).append(row)
    missing = note or NOTHING
    lines = ["# Kernels and reduced models on an NVIDIA GPU", ""]
    if synthetic:
        lines += ["**SYNTHETIC: these rows are made up to test this page; nothing here was measured.**", ""]
    if any(row.get("device") == "cpu" for row in parts.get("kernels-check", [])):
        lines += ["**Rows of this page were checked in Triton's interpreter on a CPU, not on a GPU.**", ""]
    lines += _head(parts, missing)
    lines += _ceilings(parts.get("machine", []), missing)
    lines += _bars(parts, missing)
    lines += _checks(parts.get("kernels-check", []), missing)
    lines += _kernel_times(parts.get("kernels-time", []), missing)
    if parts.get("plugins"):
        lines += _plugins(parts["plugins"])
    if parts.get("tune"):
        lines += _tuned(parts["tune"])
    lines += _models(parts.get("models", []), missing)
    return "\n".join(lines).rstrip() + "\n"


def _head(parts: Mapping[str, list[Entry]], missing: str) -> list[str]:
    measured = [row for part in ("machine", "kernels-check", "kernels-time", "models") for row in parts.get(part, [])]
    days = sorted({str(row["date"])[:10] for row in measured})
    runs = [str(row["command"]) for row in parts.get("run", [])]
    commands = list(dict.fromkeys(runs)) or list(COMMANDS)
    said = "Commands" if runs else "Not run yet. Commands that fill this page, on a machine with a GPU"
    text = [f"{said}:", "", *(f"    {command}" for command in commands), ""]
    machine = next((row for row in parts.get("machine", []) if "device" in row), None)
    if machine is None:
        text += [f"Machine: {missing}.", ""]
    else:
        driver = machine.get("smi", {}).get("driver_version", "unknown")
        versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "cuda", "triton", "timm"))
        text += [prose(f"Machine: {machine['device']}, driver {driver}; {versions}. Date: {', '.join(days)}."), ""]
    text.append(
        prose(
            "Kernels are timed in CUDA graphs of 20 launches over buffers that together exceed the L2 cache; models by "
            "whole runs, with float32 images on the GPU. All variants of a row alternate round by round in an order "
            "drawn anew; figures are medians, brackets hold quartiles. Weights are random (latency does not depend on "
            "them), images are noise."
        )
    )
    return [*text, ""]


def _ceilings(rows: Sequence[Entry], missing: str) -> list[str]:
    cells = []
    for row in rows:
        if "copy_bytes_per_s" not in row:
            continue
        products = row["gemm_flops"]
        cells.append(
            [row["device"], f"{row['copy_bytes_per_s'] / 1e12:.2f} TB/s",
             *(f"{products[name] / 1e12:.0f} TFLOP/s" for name in ("bf16", "fp16")),
             _clock(row.get("clocks_before", {})), _clock(row.get("clocks_after", {}))]
        )  # fmt: skip
    head = ["device", "copy, read + written", "bf16 8192^3", "fp16 8192^3", "clocks before", "clocks after"]
    return ["## Ceilings, as measured", "", *_or(missing, head, cells)]


def _clock(found: Entry) -> str:
    if not found:
        return "unknown"
    why = ", ".join(found.get("reasons", [])) or "nothing"
    return f"SM {found.get('sm', 0):.0f}, memory {found.get('mem', 0):.0f} MHz; limited by {why}"


def _or(missing: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table; without rows, its heading and the reason."""
    return table(head, cells) if cells else [*table(head, [])[:-1], "", f"{_capital(missing)}.", ""]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def bars(rows: Mapping[str, Entry]) -> list[tuple[str, list[str], list[str]]]:
    """(bar, rows that meet it, rows that do not), for every bar, whether measured or not."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for operator in BARS:
        found |= {title: ([], []) for title in _titles(operator)}
    found[f"static plan: efficiency at least {STATIC_BAR} at batch 256"] = ([], [])
    found[f"reducers: efficiency at least {CHOOSING_BAR:.2f} at batch 256"] = ([], [])
    found[f"batch 1: at least {ONE_IMAGE_BAR}x over dense on the same engine"] = ([], [])
    for row in rows.values():
        if row["part"] == "kernels-time" and "judged" in row:
            ratio, share = BARS[row["operator"]]
            titles = _titles(row["operator"])
            for name, judged in row["judged"].items():
                for title, value, met in zip(titles, _values(judged, ratio, share), judged["met"], strict=True):
                    if met is not None:
                        found[title][0 if met else 1].append(f"{row['key']} {name} {value}")
        if row["part"] == "models" and row.get("met") is not None:
            title = next(t for t in found if t.startswith(_kind(row)))
            value = row["same_speedup"] if row["batch"] == 1 else row["efficiency"]
            found[title][0 if row["met"] else 1].append(f"{row['key']} {value:.3f}")
    return [(title, good, bad) for title, (good, bad) in found.items()]


def _titles(operator: str) -> list[str]:
    """Bars of an operator, in the order of a row's verdicts."""
    ratio, share = BARS[operator]
    titles = [] if ratio is None else [f"{operator}: at least {ratio:g}x the best torch form"]
    return titles if share is None else [*titles, f"{operator}: at least {share:.0%} of the copy bandwidth"]


def _kind(row: Entry) -> str:
    return "batch 1" if row["batch"] == 1 else "static plan" if row["reducer"] == "static" else "reducers"


def _values(judged: Entry, ratio: float | None, share: float | None) -> list[str]:
    shown = [f"{judged['ratio'] or 0:.2f}x"] * (ratio is not None)
    return shown + [f"{judged['share'] or 0:.0%}"] * (share is not None)


def _bars(parts: Mapping[str, list[Entry]], missing: str) -> list[str]:
    rows = {str(row["part"]) + str(row["key"]): row for several in parts.values() for row in several}
    lines = ["## Bars", ""]
    for title, good, bad in bars(rows):
        if not good and not bad:
            lines.append(f"- **{title}**: {missing}")
            continue
        verdict = "met" if not bad else "NOT MET"
        text = f"- **{title}**: {verdict} ({len(good)} of {len(good) + len(bad)} rows)"
        lines.append(text + (f". Missed by: {'; '.join(bad)}" if bad else ""))
    return [*lines, ""]


def _checks(rows: Sequence[Entry], missing: str) -> list[str]:
    lines = ["## Correctness", "", prose(
        "Every kernel at awkward token counts, head dims, dtypes, batches (1, 3, 64; 8 in place of 64 above 257 "
        "tokens) and modes, against its torch form in fp64 on the same device: every element is within what the "
        "rounding of each step explains (tests/kernels/bounds.py); indices are equal; two runs have the same bits; "
        "memory from the allocator is poisoned before. An image whose answer jumps when what decides is moved by a "
        "rounding error (2e-6) is excused and counted."
    ), ""]  # fmt: skip
    head, cells = ["operator", "cases", "calls", "failed calls", "cases not run through", "images excused"], []
    operators = list(dict.fromkeys(str(row["group"]) for row in rows))
    for operator in operators:
        mine = [row for row in rows if row["group"] == operator]
        total = Counter[str]()
        for row in mine:
            total.update({key: int(row.get(key, 0)) for key in ("compared", "failed", "excused", "images")})
        broken = sum("error" in row for row in mine)
        excused = f"{total['excused']} of {total['images']}" if total["images"] else ""
        cells.append([operator, str(len(mine)), str(total["compared"]), f"**{total['failed']}**" if total["failed"]
                      else "0", f"**{broken}**" if broken else "0", excused])  # fmt: skip
    lines += _or(missing, head, cells)
    bad = [[str(row["key"]), "all", str(row["error"])] for row in rows if "error" in row]
    for row in rows:
        bad += [[str(row["key"]), each["call"], each["what"]] for each in row.get("failures", [])]
    if bad:
        shown = [[_cell(text) for text in row] for row in bad[:60]]
        lines += ["### Failures", "", *table(["case", "call", "what"], shown)]
        lines += [f"{len(bad) - 60} more are in the results file.", ""] if len(bad) > 60 else []
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:240]


def _kernel_times(rows: Sequence[Entry], missing: str) -> list[str]:
    good = [row for row in rows if "judged" in row]
    lines = ["## Kernels: attention", "", prose(
        "Against torch's fused attention (flash, efficient and cudnn; the fastest that runs), which reads strided "
        "views of the packed projection and whose output is made [B, N, H * d]. d = 64. Bytes: qkv read once, output "
        "and importance written. torch's own attention gives no importance: with it, ours does more."
    ), ""]  # fmt: skip
    cells = []
    for row in good:
        if row["operator"] == "attention":
            where = [str(row["shape"][key]) for key in ("N", "B", "H", "dtype")]
            for name, judged in row["judged"].items():
                rival = judged["rival"]
                theirs = _us(row["times"][rival]) if rival else ""
                cells.append([*where, name, _us(row["times"][name]), rival or "none runs", theirs, *_judged(judged)])
    lines += _or(missing, ATTENTION_HEAD, cells)
    lines += ["## Kernels: the others", "", prose(
        "Against plain torch, in CUDA graphs as well, so without the gaps between its many launches. The ratio is to "
        "the fastest uncompiled form; compiled ones are shown."
    ), ""]  # fmt: skip
    cells = []
    for row in good:
        if row["operator"] != "attention":
            shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
            for name, judged in row["judged"].items():
                others = ", ".join(f"{n} {_us(t)}" for n, t in row["times"].items() if n not in row["judged"])
                ratio, share, bar = _judged(judged)
                cells.append([row["operator"], shape, _us(row["times"][name]), share, ratio, others, bar])
    lines += _or(missing, FORMS_HEAD, cells)
    refused = [f"- {row['key']}: {name}: {_cell(why)}" for row in rows for name, why in row.get("refused", {}).items()]
    failed = [f"- {row['key']}: {_cell(str(row['error']))}" for row in rows if "error" in row]
    if refused or failed:
        lines += ["### Did not run", "", *failed, *refused, ""]
    return lines


def _us(timing: Entry) -> str:
    return f"{timing['median'] * 1e6:.1f} ({timing['low'] * 1e6:.1f}-{timing['high'] * 1e6:.1f})"


def _judged(judged: Entry) -> list[str]:
    ratio = "" if judged["ratio"] is None else f"{judged['ratio']:.2f}"
    share = "" if judged["share"] is None else f"{judged['share']:.0%}"
    words: Callable[[bool | None], str] = lambda met: "" if met is None else "met" if met else "**NOT MET**"  # noqa: E731
    return [ratio, share, ", ".join(filter(None, map(words, judged["met"])))]


def _plugins(rows: Sequence[Entry]) -> list[str]:
    lines = ["## TensorRT plugins", "", prose(
        "Every operator type through its plugin: `enqueue` called directly, without TensorRT (docs/plugins.md). The "
        "answers have the bits of Python's launchers and are near those of the operators in torch."
    ), ""]  # fmt: skip
    cells = [
        [str(row["group"]), str(row.get("compared", "")), _cell(str(row.get("error") or row.get("say", "")))]
        for row in rows
    ]
    return lines + table(["operator", "nodes", "found"], cells)


def _tuned(rows: Sequence[Entry]) -> list[str]:
    cells = [
        [row["operator"], str(row["key"]), _us(row["times"]["chosen"]) if "chosen" in row["times"] else "failed",
         row["best"], _us(row["times"][row["best"]]), f"{row['gain']:.2f}"]
        for row in rows if "best" in row
    ]  # fmt: skip
    head = ["operator", "shape", "chosen, us", "best candidate", "its us", "gain"]
    return ["## Other tiles", "", *table(head, cells)]


def _models(rows: Sequence[Entry], missing: str) -> list[str]:
    lines = ["## Dense models", ""]
    cells = []
    for row in rows:
        if "best_of_engine" in row:
            best = row["times"][row["best"]]["median"]
            every = ", ".join(f"{name} {timing['median'] * 1e3:.3f}" for name, timing in row["times"].items())
            every += "".join(f"; {name} failed ({_cell(why)})" for name, why in row["refused"].items())
            cells.append([row["model"], row["dtype"], str(row["batch"]), row["best"], f"{best * 1e3:.3f}",
                          f"{row['batch'] / best:,.0f}", every])  # fmt: skip
    lines += _or(missing, DENSE_HEAD, cells)
    lines += ["## Reduced models", "", prose(
        "Efficiency = (time of the best dense model, of any engine and form) / (time of the reduced one) / (dense MACs "
        "/ reduced MACs), from rounds in which both alternate. MACs are what count_macs counts: not the reducers' own "
        "arithmetic."
    ), ""]  # fmt: skip
    cells = []
    for row in rows:
        if "efficiency" in row:
            mine = row["times"]["reduced"]["median"]
            verdict = "" if row["met"] is None else "met" if row["met"] else "**NOT MET**"
            same = "" if row["same_speedup"] is None else f"{row['same_speedup']:.3f}"
            cells.append([row["model"], row["dtype"], str(row["batch"]), row["reducer"], row["form"], row["engine"],
                          f"{row['macs']:.3f}", f"{mine * 1e3:.3f}", f"{row['batch'] / mine:,.0f}",
                          f"{row['speedup']:.3f}", f"**{row['efficiency']:.3f}**", same,
                          verdict + ("" if row.get("finite", True) else " LOGITS NOT FINITE")])  # fmt: skip
    lines += _or(missing, REDUCED_HEAD, cells)
    failed = [f"- {row['key']}: {_cell(str(row['error']))}" for row in rows if "error" in row]
    return lines + (["### Did not run", "", *failed, ""] if failed else [])
