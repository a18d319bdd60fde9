"""The TensorRT plugins without TensorRT or a GPU: the functions that an engine calls, and the launches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.plugins.calls import calls, launched, node_of
from tests.kernels.plugins.isolation import FOLDER, driver, isolated, need_plugins, plugins
from tests.pairwise import thinned
from vp_kernels.attention.kernel import launch_attention
from vp_kernels.density_merge.op import density_merge
from vp_kernels.onnx import function_names
from vp_kernels.plugins.harness import FLOAT32, INT32, Node, PluginError

pytestmark = pytest.mark.built
CALLS = calls()
FIRST = {number for number, case in enumerate(CALLS) if case.operator not in [each.operator for each in CALLS[:number]]}


def ran(made: Node, inputs: list[Tensor]) -> list[Tensor]:
    driver().memory = lambda: made.memory
    try:
        return made.run(*inputs)
    except PluginError as error:
        raise AssertionError("; ".join(driver().trouble) or str(error)) from error


@isolated
def test_every_operator_type_has_a_creator() -> None:
    found = plugins().creators()
    assert sorted(each["name"] for each in found) == sorted(function_names())
    assert {(each["version"], each["namespace"], each["kind"]) for each in found} == {
        ("1", "vp", "PLUGIN CREATOR_V3ONE")
    }


def goals(number: int) -> set[Hashable]:
    """By default every operator type, and every kind of values of each operator."""
    case = CALLS[number]
    return {case.op_type, (case.operator.__name__, case.note)}


@pytest.mark.parametrize(
    "number", thinned([(number,) for number in range(len(CALLS))], goals), ids=lambda number: CALLS[number].name
)
@isolated
def test_same_answers_as_the_python_launcher(number: int) -> None:
    """Bitwise: the same kernels, arguments and memory; and within the accuracy bounds of the operator itself."""
    case = CALLS[number]
    if case.operator is density_merge:  # the slowest; its images have no per-image features
        case = replace(case, tensors={name: tensor[:2].contiguous() for name, tensor in case.tensors.items()})
    node = node_of(case)
    with plugins().create(node.op_type, node.attributes) as made, made.serialised() as loaded, loaded.clone() as clone:
        # Anything a node loses is missing in its clone's clone too; test the node itself once per operator.
        nodes = (made, clone) if number in FIRST else (clone,)
        answers = [ran(each, node.inputs) for each in nodes]
    wanted = launched(case)
    for found in answers:
        assert [(each.dtype, list(each.shape)) for each in found] == node.outputs
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    for one, other in zip(answers[0], case.expected(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4, equal_nan=True, check_dtype=False)
    assert plugins().log() == ""


@pytest.mark.parametrize("importance", ["none", "class", "mean"])
@isolated
def test_half_precision(importance: str) -> None:
    """The kernel that holds all keys at once; one program per image and head, and two query tiles shared by two."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 30, 3, 2, 64).half()
    word = {"none": "Plain"}.get(importance, importance.capitalize())
    with plugins().create(f"Attention{word}", {"tokens": 30, "heads": 2, "head_dim": 64}) as made:
        found = ran(made, [qkv])
    wanted = [each for each in launch_attention(qkv, None, importance) if each.numel()]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert {launch.entry["kernel"] for launch in driver().launches} >= {"attention_whole"}


# The small device first, since a loaded kernel stays loaded.
@pytest.mark.parametrize("shared", [48 << 10, 227 << 10])
@isolated
def test_shared_memory_above_48_kb(shared: int) -> None:
    """The limit is raised for the kernel, once, if the device supports that much (the driver checks both)."""
    qkv = torch.randn(1, 197, 3, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    driver().c.fakeShared(shared)
    with plugins().create("AttentionPlain", {"tokens": 197, "heads": 1, "head_dim": 64}) as made:
        if shared < 64 << 10:
            with pytest.raises(
                PluginError, match=r"takes \d+ bytes of shared memory; expected at most the device's 49152"
            ):
                made.run(qkv)
            return
        (found,) = ran(made, [qkv])
    assert torch.equal(found, launch_attention(qkv)[0])
    (launch,) = driver().launches
    assert launch.entry["shared"]["raise_limit"]


@isolated
def test_any_batch() -> None:
    """The batch is the only dynamic axis: the same node at several sizes in sequence."""
    with plugins().create("SelectByScore", {"k": 3}) as made:
        for batch in (1, 4, 2):
            scores = torch.rand(batch, 20)
            (found,) = ran(made, [scores])
            assert torch.equal(found, scores.topk(3).indices)


@isolated
def test_formats() -> None:
    """Linear tensors only; tokens of any float type, all the same; scores in fp32, indices in int64."""
    types = [torch.float16, torch.int64, torch.float16, torch.float16, torch.float16, torch.float16]
    with plugins().create("GatherNorm", {"eps": 1e-6}) as made:
        for token in (torch.float32, torch.float16, torch.bfloat16):
            good = [token if each == torch.float16 else each for each in types]
            assert all(made.supports(at, 4, good) for at in range(6))
        for at, wrong in (
            (0, torch.int8),
            (1, torch.int32),
            (2, torch.float32),
            (3, torch.bfloat16),
            (5, torch.float32),
        ):
            assert not made.supports(at, 4, [*types[:at], wrong, *types[at + 1 :]])
        assert not made.supports(0, 4, types, layout=2)  # HWC8
    with plugins().create("MatchMergeSize", {"tokens": 9, "r": 2, "prefix": 1}) as made:
        mixed = [torch.float32, torch.float16, torch.float32, torch.float32, torch.float32]
        assert all(made.supports(at, 3, mixed) for at in range(5))  # the metric has its own type
        assert not made.supports(2, 3, [*mixed[:2], torch.float16, *mixed[3:]])


BAD_FIELDS: list[tuple[str, dict[str, float], dict[str, int], str]] = [
    ("Select", {}, {}, "no field k; expected"),
    ("Select", {"k": 3, "j": 1}, {}, "a field j; expected only those of Select"),
    ("Select", {"k": 0}, {}, "k = 0.000000; expected 1.000000 to 1024"),
    ("Select", {"k": 2000}, {}, "k = 2000.000000; expected"),
    ("Select", {"k": 2.5}, {}, "k = 2.500000; expected a whole number"),
    ("Select", {"k": 3}, {"k": 6}, "field k of type 6; expected a whole number or a float32"),
    ("GatherNorm", {"eps": float("nan")}, {}, "eps = nan; expected"),
    ("DensityMerge", {"tokens": 9, "width": 16, "tokens_out": 5, "clusters": 2, "pairs": 0, "prefix": 1}, {},
     "clusters = 2.000000; expected 0.000000 to 0"),
]  # fmt: skip


@pytest.mark.parametrize(("op_type", "fields", "kinds", "line"), BAD_FIELDS)
@isolated
def test_bad_fields(op_type: str, fields: dict[str, float], kinds: dict[str, int], line: str) -> None:
    with pytest.raises(PluginError, match=rf"^vp::{op_type} \(node\): .*{line}") as caught:
        plugins().create(op_type, fields, kinds=kinds)
    assert str(caught.value).count("\n") == 0


@isolated
def test_fields_of_other_types() -> None:
    """Parsers may pass integers in any type; a list is not a number."""
    for kind in (INT32, FLOAT32):
        with plugins().create("Select", {"k": 3}, kinds={"k": kind}):
            pass
    with pytest.raises(PluginError, match="field k of 2 values; expected one value"):
        plugins().create("Select", {"k": 3}, length=2)


@isolated
def test_shapes_that_no_kernel_takes() -> None:
    """Reported when an engine is configured, with what to compile."""
    with plugins().create("GatherNorm", {"eps": 1e-6}) as made:
        inputs = [torch.rand(1, 5, 100), torch.tensor([0, 1]), torch.rand(100), torch.rand(100)]
        with pytest.raises(
            PluginError, match=r"gather_norm in fp32 at D = 100, which no kernel for .* 9\.0 takes; compile"
        ):
            made.run(*inputs)
        inputs = [each.bfloat16() if each.is_floating_point() else each for each in inputs]
        with pytest.raises(
            PluginError, match=r"no gather_norm in bf16 with HAS_RESIDUAL=0 .* for compute capability 9\.0"
        ):
            made.run(*inputs)
        with pytest.raises(PluginError, match=r"weight and bias of another width; expected \[D\]"):
            made.run(torch.rand(1, 5, 192), torch.tensor([0]), torch.rand(64), torch.rand(64))
        driver().c.fakeDevice(80)
        with pytest.raises(
            PluginError, match=r"no kernel for compute capability 8\.0, only for 9\.0; compile .* --sm 80"
        ):
            made.run(torch.rand(1, 5, 192), torch.tensor([0]), torch.rand(192), torch.rand(192))
    with (
        plugins().create("Select", {"k": 30}) as made,
        pytest.raises(PluginError, match="k = 30; expected at most the 20"),
    ):
        made.run(torch.rand(1, 20))
    assert not driver().launches


@isolated
def test_a_failing_launch_is_one_line() -> None:
    with plugins().create("Select", {"k": 3}) as made:
        driver().c.fakeFailure(719)
        with pytest.raises(PluginError, match=r"^vp::Select: launching 64: CUDA_ERROR_LAUNCH_FAILED$"):
            made.run(torch.rand(1, 20))


@isolated
def test_each_kernel_is_loaded_once() -> None:
    scores = torch.rand(2, 20)
    with plugins().create("Select", {"k": 3}) as made, made.clone() as clone:
        ran(made, [scores])
        before = driver().c.fakeLoads()
        for each in (made, clone):
            ran(each, [scores])
    assert driver().c.fakeLoads() == before


NO_DRIVER = """
import sys, torch
from pathlib import Path
from vp_kernels.plugins.harness import PluginError, Plugins
folder = Path(sys.argv[1])
plugins = Plugins(folder / "libvp_plugin_harness.so", folder / "libvp_plugins.so")
print(len(plugins.creators()), "libcuda.so" in Path("/proc/self/maps").read_text())
with plugins.create("Select", {"k": 3}) as node:
    try:
        node.run(torch.rand(1, 20))
    except PluginError as error:
        print(error)
"""


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a driver")
def test_nothing_is_loaded_until_used() -> None:
    """Without a driver, plugins can be listed and nodes created; a run reports what is missing."""
    need_plugins()
    done = subprocess.run(
        [sys.executable, "-c", NO_DRIVER, str(FOLDER)],
        capture_output=True, text=True, check=True, env={**os.environ, "LD_LIBRARY_PATH": ""},
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first == f"{len(function_names())} False"
    assert second == "vp::Select: no NVIDIA driver here (libcuda.so.1); expected one to run kernels"
