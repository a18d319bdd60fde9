"""Commands and Python blocks in README and the documentation.

Commands are parsed by their own parsers, Python must compile, names imported from our packages must exist, and cheap
blocks are run. test_wheel.py also runs commands after an install line, tests/engines docs/embedding.md, and
tests/extending docs/extending.md. A block that no test runs states why in a comment before it:
`<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.install_lines import PAGES, install_lines

ROOT = Path(__file__).resolve().parents[1]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
RUN_ELSEWHERE = {"docs/embedding.md", "docs/extending.md"}  # whole pages, see above
EVERY = [ROOT / "CONTRIBUTING.md", *PAGES, ROOT / "examples" / "digits" / "README.md"]


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    kind: str
    text: str
    why_not: str | None = None


def blocks() -> list[Block]:
    """Fenced and indented blocks of every page."""
    found = []
    for path in EVERY:
        page, text = path.relative_to(ROOT).as_posix(), path.read_text()
        found += [Block(page, each["kind"], each["text"], each["why"]) for each in FENCE.finditer(text)]
        rest = FENCE.sub("", text)
        found += [Block(page, "indented", each[0]) for each in INDENTED.finditer(rest)]
    return found


BLOCKS = blocks()


def commands() -> list[tuple[str, str]]:
    """(page, command) for each command that starts a program or module of ours, or make."""
    ours = re.compile(r"(?!vp-run)(vp-\w+|make|torchrun|python -m (vp|benchmarks)|python (benchmarks|examples)/)")
    found = []
    for block in BLOCKS:
        if block.kind not in ("bash", "indented"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = line.strip().partition("; ")[0]
            if ours.match(words):
                found.append((block.page, words))
    inline = re.compile(r"`((?:(?!vp-run)vp-\w+ |make |python -m vp|torchrun )[^`]+)`")
    for path in EVERY:
        for text in inline.findall(FENCE.sub("", path.read_text())):
            found.append((path.relative_to(ROOT).as_posix(), " ".join(text.split()).partition("; ")[0]))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_one_that_there_is(page: str, command: str) -> None:
    """Every option exists and accepts the given value."""
    words = shlex.split(command, comments=True)
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word.rstrip(",") for word in words[1:] if re.fullmatch(r"[a-z-]+,?", word)} <= targets
        return
    if words[0].startswith("vp-"):
        name, given = words[0].removeprefix("vp-"), words[1:]
    elif words[1] == "-m" and words[2].startswith("vp_exporter.cli."):
        name, given = words[2].removeprefix("vp_exporter.cli."), words[3:]
    else:
        script = words[1] if words[1] != "-m" else words[2].replace(".", "/")
        roots = ("", "exporter", "kernels", "engines")
        assert any((ROOT / root / script / end).exists() for root in roots for end in ("", "__main__.py")) or any(
            (ROOT / root / f"{script}.py").exists() for root in roots
        ), f"{page}: {script}"
        return
    if name == "doctor":
        assert set(given) <= {"--json", "--help", "--version"}
    else:
        check_options(HOOKS["command_of"](name), given)


def check_options(command: object, given: list[str]) -> None:
    """Check that every word starting with a dash is an option of the command, with a value of its type.

    Incomplete commands ("...", a bare `vp-export --opset 18`) are checked as far as possible.
    """
    commands = getattr(command, "commands", None)
    if commands:
        if given and not given[0].startswith("-"):
            check_options(commands[given[0]], given[1:])
        return
    known = {}
    for parameter in command.params:  # type: ignore[attr-defined]
        if parameter.param_type_name == "option":
            known |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], parameter)
    known["--help"] = None
    words = iter(given)
    for word in words:
        if not word.startswith("-") or word == "...":
            continue
        option, _, value = word.partition("=")
        assert option in known, f"{option}: one of {', '.join(known)}"
        parameter = known[option]
        if parameter is None or parameter.is_flag:
            continue
        value = value or next(words, "...")
        kind = parameter.type_descriptor.annotation
        if kind in (int, float) and value not in ("...", "N", "X"):
            kind(value)


PYTHON = [block for block in BLOCKS if block.kind == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_compiles_and_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    ours: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.startswith("vp_"):
                    ours[each.asname or each.name] = import_module(each.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vp_"):
            for each in node.names:
                assert hasattr(import_module(str(node.module)), each.name), each.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert hasattr(ours[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.slow
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model of the same family that takes seconds, random weights and images."""
    import timm

    create = timm.create_model
    small = {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create("vit_tiny_patch16_224", **small))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("val/a/0.png", "val/b/1.png", "val/c/2.png", "cat.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (72, 80, 3), dtype=np.uint8)).save(name)
    found: dict[str, object] = {"images": np.zeros((1, 3, 64, 64), np.float32)}
    done: set[str] = set()
    for block in PYTHON:
        if block.page in RUN_ELSEWHERE or block.why_not or block.text in done:
            continue
        done.add(block.text)
        exec(compile(block.text.replace('data="val/")', 'data="val/", seconds=0.1)'), block.page, "exec"), found)
    assert found["done"].report.verdict.status == "measured"  # type: ignore[attr-defined]
    assert Path("deit_s.vpe/report.html").exists()
    assert found["run"].operations  # type: ignore[attr-defined]
    assert len(done) >= 3


def test_json_blocks_are_json() -> None:
    import json

    for block in BLOCKS:
        if block.kind == "json":
            json.loads(block.text)


def test_what_is_not_run_says_why() -> None:
    """A shell block is run by test_wheel.py (after an install line) or another test, or states why not."""
    run = {(line.page, command) for line in install_lines() for command in line.commands}
    for block in BLOCKS:
        page = block.page.removeprefix("docs/")
        if block.kind != "bash" or block.page in RUN_ELSEWHERE or block.why_not:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = " ".join(shlex.split(line, comments=True))
            if words and not words.startswith(("pip install", "curl ", "make ")):
                assert any(page == at and shlex.split(words) == shlex.split(known) for at, known in run), (page, words)
