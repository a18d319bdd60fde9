"""Options and the errors for invalid ones. Does not need Ray."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.bundle_samples import write_sample
from tests.engines.serving.triton.samples import write_linear
from tests.ports import free_ports
from vp_engines.bundle import read_manifest
from vp_engines.errors import EngineUnavailableError, InputError
from vp_engines.serving.ray.__main__ import main, parser
from vp_engines.serving.ray.options import Listen, RayOptions, ServingError, check_port, share_cores


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"replicas": 0}, "replicas is 0; expected a whole number from 1"),
        ({"threads": "two"}, "threads is 'two'; expected a whole number from 1"),
        ({"threads": True}, "threads is True; expected a whole number from 1"),
        ({"variant": "thin"}, "variant is 'thin'; expected one of reduced, dense"),
        ({"device": "tpu"}, "device is 'tpu'; expected one of cpu, cuda"),
        ({"wait_ms": -1}, "wait_ms is -1; expected a number from 0"),
        ({"wait_ms": float("nan")}, "wait_ms is nan; expected"),
        ({"gpus": 1.5}, "gpus is 1.5; expected a part of one GPU, or a whole number"),
        ({"retries": -1}, "retries is -1; expected a whole number from 0"),
        ({"replica": 2}, "the option 'replica'; expected one of name, variant"),
    ],
)
def test_a_wrong_option_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        RayOptions.of(given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"port": 0}, "the port is 0; expected 1 to 65535"),
        ({"route": "deit"}, "the route 'deit'; expected a path such as /deit"),
        ({"route": "/a/"}, "the route '/a/'"),
        ({"proxies": "some"}, "proxies is 'some'; expected one of every, head"),
        ({"address": ""}, "the address is empty"),
        ({"start_s": 0}, "start_s is 0"),
    ],
)
def test_a_wrong_place_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        Listen(**given)


def test_options_survive_the_way_to_another_machine() -> None:
    options = RayOptions(name="a", replicas=3, threads=2, device="cpu", wait_ms=0)
    assert RayOptions.of(options.mapping()) == options
    assert RayOptions.of({"name": "7", "replicas": "3", "wait_ms": "0.5"}) == RayOptions("7", replicas=3, wait_ms=0.5)


def test_names_and_batches_are_held_to_the_bundle(tmp_path: Path) -> None:
    manifest = write_sample(tmp_path / "tiny.vpe")
    with pytest.raises(InputError, match=r"the model name 'tiny żółw'; expected letters.*give another with `name`"):
        RayOptions().checked(manifest)
    with pytest.raises(InputError, match="max_batch is 65; expected 1 to 64"):
        RayOptions(name="tiny", max_batch=65).checked(manifest)
    assert RayOptions(name="tiny").checked(manifest) == "tiny"
    assert RayOptions().checked(read_manifest(write_linear(tmp_path / "linear.vpe"))) == "linear"


@pytest.mark.parametrize(
    ("cores", "given", "threads"),
    [
        ([8], {"replicas": 2}, 4),
        ([8], {"replicas": 3}, 2),
        ([2], {"replicas": 2, "threads": 1}, 1),
        ([16, 16], {"replicas": 2, "per_node": 1}, 16),
        ([16, 16], {"replicas": 2}, 16),
        ([0, 8, 4], {"replicas": 2}, 4),
    ],
)
def test_cores_are_shared_out(cores: list[float], given: dict[str, Any], threads: int) -> None:
    assert share_cores(cores, RayOptions(**given)) == threads


@pytest.mark.parametrize(
    ("cores", "given", "line"),
    [
        ([2], {"replicas": 3}, "3 replicas of 1 threads on nodes with 2 cores; expected at most 2 of them"),
        ([2, 4], {"threads": 4}, "2 replicas of 4 threads on nodes with 2 and 4 cores; expected at most 1 of them"),
        ([64], {"replicas": 2, "per_node": 1}, "expected at most 1 of them"),
        ([], {}, "on nodes with no cores"),
    ],
)
def test_too_few_cores_are_one_line(cores: list[float], given: dict[str, Any], line: str) -> None:
    with pytest.raises(ServingError, match=line):
        share_cores(cores, RayOptions(**given))


def test_a_port_in_use() -> None:
    (port,) = free_ports()
    check_port("127.0.0.1", port)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(
            ServingError, match=f"cannot listen on 127.0.0.1:{port}: address already in use; expected a free"
        ),
    ):
        check_port("127.0.0.1", port)
    with pytest.raises(ServingError, match="another `host`"):
        check_port("no.such.host.invalid", port)


def test_the_command_line_has_every_option() -> None:
    given = vars(parser().parse_args(["a.vpe"]))
    names = set(RayOptions.__dataclass_fields__) | set(Listen.__dataclass_fields__)
    assert set(given) == names | {"bundle"}
    assert RayOptions(**{name: given[name] for name in RayOptions.__dataclass_fields__}) == RayOptions()
    assert Listen(**{name: given[name] for name in Listen.__dataclass_fields__}) == Listen()


def test_every_refusal_of_the_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> tuple[int, str]:
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse
            code = int(str(error.code))
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        return code, said.err

    bundle = str(write_linear(tmp_path / "linear.vpe"))
    (port,) = map(str, free_ports())
    monkeypatch.setitem(sys.modules, "ray", None)
    code, line = refused(bundle, "--port", port, "--threads", "1", "--replicas", "1")
    assert (code, "Ray Serve is not installed" in line, "pip install 'vp-export[ray]'" in line) == (3, True, True)
    assert refused(bundle, "--replicas", "many")[0] == 2
    assert refused(bundle, "--replicas", "0") == (2, "error: replicas is 0; expected a whole number from 1\n")
    assert refused(str(tmp_path / "none.vpe"))[0] == 2
    assert refused(bundle, "--name", "a/b")[0] == 2
    altered = Path(shutil.copytree(bundle, tmp_path / "altered.vpe"))
    (altered / "plan.json").write_text("{} ")
    code, line = refused(str(altered))
    assert (code, line.startswith("error: 'plan.json' has 3 bytes; expected 2")) == (2, True)


def test_no_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from vp_engines.serving.ray.options import require_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineUnavailableError, match=r"vp-export\[ray\]"):
        require_ray()
