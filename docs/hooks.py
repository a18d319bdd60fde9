"""Pages of the site that are not files of this folder: README and the other files for a repository's visitors, and the
reference of the commands, read from the commands themselves."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}
COMMANDS = ("export", "search", "validate", "inspect", "profile", "serve")
DOCTOR = """## vp-doctor

Shows what works on this machine: engines, commands, versions, CPU features, GPUs, and the line that installs what does
not. Paste its text into a bug report. It needs none of our dependencies, since it has to run where they are broken.

    vp-doctor [OPTIONS]

| option | |
|---|---|
| `--json` | Print the result as JSON on stdout. |
| `--version` | Show the version and stop. |"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, page in COPIED.items():
        files.append(File.generated(config, page, content=as_page((ROOT / source).read_text())))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def as_page(text: str) -> str:
    """A file of the repository's root, with links as seen from `docs/`."""
    text = re.sub(r'(\]\(|(?:src|srcset)=")docs/', r"\1", text)
    for source, page in COPIED.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|CITATION\.cff|examples/[^)]*)\)", r"\1", text)  # not part of the site


def commands_page() -> str:
    """Every command with its arguments and options, in Markdown."""
    parts = [
        "# Commands",
        "Generated from the commands; `COMMAND --help` prints the same. Every install brings all of them. A command "
        "that lacks a package says so before it starts, names the line that installs it and exits with 3.",
    ]
    for name in COMMANDS:
        command = command_of(name)
        subcommands = getattr(command, "commands", None)
        if not subcommands:
            parts += [f"## vp-{name}", *describe(command, f"vp-{name}")]
            continue
        parts += [f"## vp-{name}", command.help]
        for word, each in subcommands.items():
            parts += [f"### vp-{name} {word}", *describe(each, f"vp-{name} {word}")]
    parts.append(DOCTOR)
    return "\n\n".join(parts) + "\n"


def command_of(name: str) -> Any:
    """The parser of vp-NAME."""
    from typer.main import get_command

    return get_command(import_module(f"vp_exporter.cli.{name}").app)


def describe(command: Any, name: str) -> list[str]:
    """Usage, arguments and options of one command."""
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    required = [f"{each.opts[0]} {metavar(each)}" for each in options if each.required]
    words = [name, *(argument_name(each) for each in arguments), *required]
    parts = [cell(command.help), f"    {' '.join([*words, '[OPTIONS]'])}"]
    if arguments:
        rows = [f"| `{argument_name(each)}` | {cell(each.help)} |" for each in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    rows = []
    for each in options:
        names = ", ".join(f"`{word}`" for word in (*each.opts, *each.secondary_opts))
        value = "" if each.is_flag else f" `{metavar(each)}`"
        rows.append(f"| {names}{value} | {cell(each.help)}{default(each)} |")
    parts.append("\n".join(["| option | |", "|---|---|", *rows]))
    if command.epilog:
        parts.append(cell(command.epilog))
    return parts


def argument_name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return f"[{name}]" if not argument.required else name


def metavar(option: Any) -> str:
    words = {int: "N", float: "X", list[int]: "N", list[float]: "X"}
    return option.metavar or words.get(option.type_descriptor.annotation, "TEXT")


def default(option: Any) -> str:
    value = option.default
    if option.required:
        return " Required."
    if value is None or value is False or callable(value) or value in ([], ()):
        return ""
    return f" Default: `{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`."


def cell(text: str | None) -> str:
    """One line, safe in a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(commands_page())
