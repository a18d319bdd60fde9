"""Messages name arguments, such as `max_batch` or `dense=False`; only commands name options, such as --max-batch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from vp_engines.command_line import in_options
from vp_exporter.cli import console, doctor, export, inspect, profile, search, serve, validate  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
OPTION = re.compile(r"(?:^|[\s(\"'])--[a-z]")
# Commands that are quoted in full, for users to run.
QUOTED = re.compile(r"pip install --(upgrade|force-reinstall)|ray start --head|python -m vp_kernels\.aot (--out|--sm)")
COMMANDS = {  # modules that are a command line, or write that of another process
    "exporter/vp_exporter/doctor.py": "vp-doctor lists commands",
    "exporter/vp_exporter/profiling/memory.py": "the process that is measured",
    "engines/vp_engines/command_line.py": "its docstring shows what it makes of a message",
    "engines/vp_engines/serving/ray/__main__.py": "python -m vp_engines.serving.ray",
    "engines/vp_engines/serving/ray/options.py": "a name for Ray that no model's name can hold",
    "kernels/vp_kernels/aot/command.py": "python -m vp_kernels.aot",
    "kernels/vp_kernels/aot/compile.py": "what cuobjdump and ptxas are started with",
    "kernels/vp_kernels/plugins/embed.py": "python -m vp_kernels.plugins.embed",
}
# Arguments available from Python only: commands never raise these messages.
PYTHON_ONLY = {"backbone", "preprocessing", "pretrained_cfg", "crop_mode"}


def modules() -> Iterator[Path]:
    for folder in ("exporter/vp_exporter", "engines/vp_engines", "kernels/vp_kernels"):
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "cli" not in path.parts)


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """String literals, including those in f-strings and docstrings."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def options_in(source: str) -> list[str]:
    """Strings in a module that mention options."""
    texts = [QUOTED.sub("", node.value) for node in literals(ast.parse(source))]
    return [text for text in texts if OPTION.search(text)]


def test_no_text_of_the_library_speaks_in_options() -> None:
    found = {path.relative_to(ROOT).as_posix(): options_in(path.read_text()) for path in modules()}
    assert len(found) > 150
    assert {name: texts for name, texts in found.items() if texts and name not in COMMANDS} == {}
    assert {name for name, texts in found.items() if texts} == set(COMMANDS), "an exception that is none any more"


@pytest.mark.parametrize(
    "text",
    [
        '"--data needs a classifier"',
        "f'{x}; leave out --data'",
        '"""Doc.\n\n    As --data.\n    """',
        '("a" "(--mean)")',
    ],
)
def test_a_text_that_does_is_found(text: str) -> None:
    assert options_in(text)
    assert not options_in(text.replace("--", "- "))


def command_options() -> set[str]:
    """Every option of every command."""
    apps = [export.app, inspect.app, profile.app, search.app, serve.app, validate.app]
    found: set[str] = set()
    for app in apps:
        command = typer.main.get_command(app)
        for each in [command, *getattr(command, "commands", {}).values()]:
            for parameter in each.params:
                found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def test_each_argument_in_a_message_is_an_option_of_a_command() -> None:
    """Names in backticks in an exception, note or warning correspond to an existing option."""
    known, seen = command_options(), 0
    for path in modules():
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if not name.endswith("Error") and name not in ("warn", "note"):
                continue
            for part in (*call.args, *(keyword.value for keyword in call.keywords)):
                text = "".join(
                    str(node.value) if isinstance(node, ast.Constant) else "X"
                    for node in (part.values if isinstance(part, ast.JoinedStr) else [part])
                )
                for quoted in re.findall(r"`[a-z_]+(?:=[^`]*)?`", text):
                    seen += 1
                    option = console.in_options(quoted).split()[0]
                    assert option in known or quoted.strip("`").split("=")[0] in PYTHON_ONLY, f"{path}: {quoted}"
    assert seen > 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`max_batch` is 0", "--max-batch is 0"),
        ("leave out `dense=False`", "leave out --no-dense"),
        ("pass `force=True` to replace it", "pass --force to replace it"),
        ("expected `data=DIR`", "expected --data DIR"),
        ("`kernels='portable'`", "--kernels portable"),
        ("`vp.export` needs onnx", "vp-export needs onnx"),
        ("`vp.profile(out=...)` needs matplotlib", "vp-profile --out needs matplotlib"),
        ("`pip install x` and `[1, 2]`", "`pip install x` and `[1, 2]`"),
    ],
)
def test_arguments_become_options(text: str, expected: str) -> None:
    assert in_options(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`batch_sizes=4` with dense", "--batch 4 with dense"),
        ("leave out `use_ema=False`", "leave out --no-ema"),
        ("is given method argument `tokens_out`", "is given --method-arg tokens_out"),
        ("give model argument `global_pool=avg`", "give --model-arg global_pool=avg"),
        ("check `args`", "check --model-arg"),
    ],
)
def test_options_that_are_named_otherwise(text: str, expected: str) -> None:
    assert console.in_options(text) == expected
