"""The wheel, and the commands after each install line in README and docs, run with nothing but what the line installs.

`make test-wheel` does the same with environments created by pip.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.environments import ROOT, SOURCES, Environment, build_wheel, fresh, linked
from tests.install_lines import Line, install_lines

FRESH = os.environ.get("VP_FRESH") == "1"
LINES = install_lines()
FIRST = "README.md-export+cpu"  # its first command creates the bundle used by all others
TORCH = {"export", "search", "aoti"}  # the extras that install it
COMMANDS = ("vp-export", "vp-inspect", "vp-validate", "vp-search", "vp-profile", "vp-serve", "vp-doctor")
# A model of the same family that takes seconds, with random weights: nothing is downloaded.
MODEL = "vit_tiny_patch16_224" + "".join(
    f" --model-arg {each}" for each in ("img_size=64", "depth=2", "embed_dim=64", "num_heads=2")
)
SMALLER = {
    "--model deit_small_patch16_224 --weights my.safetensors": f"--model {MODEL} --random-init --num-classes 3",
    "deit_small_patch16_224": MODEL,
    "--pretrained": "--random-init --num-classes 3",
    "NAME.vpe": "deit_s.vpe",
    "--r 13": "--r 3",
    "--model M --weights W": f"--model {MODEL} --random-init --num-classes 3",
    "--target-macs 0.65": "--target-macs 0.75",  # as far as two blocks go
    "--min-speedup 1.4": "--min-speedup 0.001",  # tests the install, not the speed of this machine
    "--max-drop 0.5": "--max-drop 100",
}
QUICK = {
    "vp-export": "--seconds 0.1",
    "vp-validate": "--seconds 0.1",
    "vp-profile": "--seconds 0.1",
    "vp-search": "--images 16 --search-batch 4 --evaluations 2 --min-tokens 2",
}
Make = Callable[[tuple[str, ...]], Environment]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Environments by their extras, each created once."""
    made: dict[tuple[str, ...], Environment | None] = {}

    def make(extras: tuple[str, ...]) -> Environment:
        if extras not in made:
            made[extras] = (fresh if FRESH else linked)(tmp_path_factory.mktemp("env") / "venv", wheel, extras)
        found = made[extras]
        if found is None:
            pytest.skip(f"what {extras} brings is not installed here: make test-wheel")
        return found

    return make


@pytest.fixture(scope="module")
def folder(environment: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume: images, a mask, a plan, and README's first bundle under two names."""
    top = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    for name in ("val", "calib"):
        for label in "abc":
            (top / name / label).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(0, 255, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(top / name / label / f"{index}.png")
    mask = np.ones((2, 16))
    mask[:, ::4] = 0
    np.save(top / "mask.npy", mask)
    made = environment(("export", "cpu"))
    plan = (
        "import numpy as np, timm; from pathlib import Path; from vp_exporter.plan.masks import plan_from_mask;"
        "from vp_exporter.model.describe import describe; from vp_exporter.plan import PlanModel;"
        "vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2, embed_dim=64, num_heads=2);"
        "model = PlanModel.of(describe(vit, 'vit_tiny_patch16_224'));"
        "plan_from_mask(np.load('mask.npy'), model).save(Path('plan.json'))"
    )
    done = made.run(f"python -c {shlex.quote(plan)}", top)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in LINES if line.id == FIRST]
    _run(made, line.commands[:1], top)  # writes deit_s.vpe
    shutil.copytree(top / "deit_s.vpe", top / "deit_s_tome.vpe")
    return top


def _small(command: str) -> str:
    for old, new in SMALLER.items():
        command = command.replace(old, new)
    return f"{command} {QUICK.get(command.split()[0], '')}".strip()


def _run(made: Environment, commands: Sequence[str], cwd: Path) -> None:
    """Run commands, all of which must succeed. In a fresh environment, each is run by a shell, as a user would."""
    small = [_small(command) for command in commands]
    each = [made.run(one, cwd) for one in small] if FRESH else made.run_each(small, cwd)
    for command, done in zip(small, each, strict=False):  # run_each stops at the first that fails
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert len(each) == len(commands)


def test_everything_is_in_the_wheel(wheel: Path) -> None:
    wanted = set()
    for source in SOURCES:
        for path in (ROOT / source).rglob("*"):
            parts = path.relative_to(ROOT / source).parts
            if "__pycache__" in parts or parts[0] != f"vp_{source}":
                continue  # C++ is built from a clone
            if path.suffix in (".py", ".j2") or path.name == "py.typed":
                wanted.add("/".join(parts))
    archive = zipfile.ZipFile(wheel)
    assert wanted == {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"vp_kernels/plugins/embed.py", "vp_exporter/searching/report/page.html.j2"} <= wanted
    (tops,) = [name for name in archive.namelist() if name.endswith("top_level.txt")]
    assert archive.read(tops).decode().split() == ["vp_engines", "vp_exporter", "vp_kernels"]  # no folder of C++


def test_every_line_names_extras_that_there_are() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert {line.page for line in LINES} >= {"README.md", "embedding.md", "howto/export.md", "ray.md"}
    for line in LINES:
        assert set(line.extras) <= extras, line.id


def test_every_command_stands_under_a_line() -> None:
    names = {command.split()[0] for line in LINES for command in line.commands}
    assert {name for name in names if name.startswith("vp-")} == set(COMMANDS)


@pytest.mark.slow
def test_a_bare_install(wheel: Path, tmp_path: Path) -> None:
    made = fresh(tmp_path / "venv", wheel, ()) if FRESH else linked(tmp_path / "venv", wheel, ())
    assert made is not None
    for command in COMMANDS:
        done = made.run(f"{command} --help", tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), command
    for words, extra in (
        ("vp-export --model m --random-init --method tome --r 3 --out a.vpe", "export,cpu"),
        ("vp-search --model m --random-init --data d --target-macs 0.6 --out p.json", "search"),
        ("vp-profile a.vpe --out p", "profile"),
        ("vp-serve triton a.vpe --out m", "serve"),
        ("vp-inspect --method tome --r 3 --model m", "export"),
    ):
        done = made.run(words, tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
        assert done.stderr.endswith(f"pip install 'vp-export[{extra}]'\n")
    found = json.loads(made.run("vp-doctor --json", tmp_path).stdout)
    assert {name for name, works in found["commands"].items() if works["ok"]} == {"vp-inspect"}


def again(line: Line) -> list[pytest.MarkDecorator]:
    """tests/engines/serving/ray starts a cluster: only try one of these lines."""
    return [pytest.mark.exhaustive] if "ray" in line.extras and line.page != "howto/serve.md" and not FRESH else []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("line", [pytest.param(line, id=line.id, marks=again(line)) for line in LINES])
def test_what_stands_under_an_install_line(
    line: Line, environment: Make, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = environment(line.extras)
    if not TORCH & set(line.extras):
        _check_light(made, line, tmp_path)
    if "ray" in line.extras or not line.commands:
        return  # tests/engines/serving/ray starts a cluster
    given = request.getfixturevalue("folder")
    shutil.copytree(given, tmp_path / "here")
    commands = line.commands[line.id == FIRST :]  # the very first has been run
    for command in commands:
        if out := re.search(r"--out (\S+\.json)", command):  # pages share file names
            (tmp_path / "here" / out[1]).unlink(missing_ok=True)
        if out := re.search(r"--out (\S+\.vpe)", command):
            shutil.rmtree(tmp_path / "here" / out[1], ignore_errors=True)
    _run(made, commands, tmp_path / "here")


def _check_light(made: Environment, line: Line, cwd: Path) -> None:
    """vp-doctor on a server: all commands after the line work, without torch."""
    found = json.loads(made.run("vp-doctor --json", cwd).stdout)
    assert {package["module"]: package["version"] for package in found["packages"]}["torch"] == ""
    for command in line.commands:
        name = " ".join(command.split()[: 2 if command.startswith("vp-serve") else 1])
        if name in found["commands"]:
            assert found["commands"][name] == {"ok": True, "why_not": ""}, name
    for extra in set(line.extras) & set(found["engines"]):
        assert "installed" not in found["engines"][extra]["run"]["why_not"]
