"""The model on the vp operators against the portable model, which is compared with the oracles elsewhere (reducers/).

On the CPU the operators run their torch implementations, so this tests the wiring. Kernels are tested in tests/kernels.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.exporter.reducers.cases import own_files
from tests.exporter.reducers.test_export import EVERY_REDUCER as EVERY
from tests.exporter.reducers.test_export import OTHER_FIELDS, images_of, make, near_ties
from tests.exporter.rewrite.test_reduced_vit import images_for
from tests.exporter.tiny import KINDS, random_plan, tiny_vit
from vp_exporter.errors import UnsupportedModelError
from vp_exporter.lowering import export_program
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import REDUCERS, step_from_dict
from vp_exporter.rewrite import fused_block
from vp_exporter.rewrite.reduced_vit import ReducedViT

HEADS = 2  # of 32 channels, the minimum for the operators
MIXED = [("evit", {"tokens_out": 55, "fuse": True}), ("tome", {"r": 5}), ("evit", {"tokens_out": 30, "fuse": True})]
TRACKED = [("tome", {"r": 9}), ("gtp", {"r": 4, "alpha": 0.3, "graph": "spatial"}), ("topk", {"tokens_out": 30})]


def both(steps: Any, **arguments: Any) -> tuple[ReducedViT, ReducedViT]:
    """The portable model and the one on the operators."""
    model = make(steps, num_heads=HEADS, **arguments)
    return model.reduced, ReducedViT(model.vit, model.description, model.plan, "vp")


def count(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Number of calls of each vp operator in the exported program."""
    program = torch.export.export(model, (images,), strict=False)
    names = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("vp.")]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize(
    ("steps", "proportional"),
    [(EVERY, True), (EVERY, False), (OTHER_FIELDS, True), (OTHER_FIELDS, False), (MIXED, True), (TRACKED, True)],
    ids=["every", "every-plain", "other", "other-plain", "mixed", "tracked"],
)
def test_every_reducer(steps: Any, proportional: bool) -> None:
    model = make(steps, num_heads=HEADS, proportional=proportional)
    portable, fused = model.reduced, ReducedViT(model.vit, model.description, model.plan, "vp")
    images = images_of(3)
    with torch.no_grad():
        wanted, found = portable(images), fused(images)
        assert near_ties(model, images, found, wanted, 2e-4) <= 1
        same = (found - wanted).abs().amax(1) <= 2e-4
        for block, (mine, theirs) in enumerate(
            zip(fused.block_tokens(images), portable.block_tokens(images), strict=True)
        ):
            close = {"atol": 2e-4, "rtol": 2e-4, "msg": lambda m, b=block: f"block {b}: {m}"}
            torch.testing.assert_close(mine[same], theirs[same], **close)


def test_every_reducer_is_here() -> None:
    assert {name for name, _ in (*EVERY, *OTHER_FIELDS, *MIXED)} | {"static"} == set(REDUCERS) - own_files()


@pytest.mark.parametrize("kind", KINDS)
def test_static_plan(kind: str) -> None:
    vit, description = tiny_vit(kind, heads=HEADS)
    plan = random_plan(PlanModel.of(description), scales=True)
    images = images_for(description)
    with torch.no_grad():
        expected = ReducedViT(vit, description, plan)(images)
        fused = ReducedViT(vit, description, plan, "vp")
        torch.testing.assert_close(fused(images), expected, atol=5e-5, rtol=5e-5)
        torch.testing.assert_close(fused.for_export()(images), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_plan(kind: str) -> None:
    vit, description = tiny_vit(kind, heads=HEADS)
    steps = tuple(step_from_dict({"block": block, "reducer": "tome", "r": 3}) for block in (0, 2))
    plan = ReductionPlan(PlanModel.of(description), steps, proportional_attention=True)
    images = images_for(description)
    with torch.no_grad():
        expected = ReducedViT(vit, description, plan)(images)
        torch.testing.assert_close(ReducedViT(vit, description, plan, "vp")(images), expected, atol=2e-4, rtol=2e-4)


def test_for_export_changes_the_form() -> None:
    portable, fused = both(EVERY)
    assert portable.for_export(kernels="vp").kernels == "vp"
    assert fused.for_export().kernels == "vp"
    assert fused.for_export(kernels="portable").kernels == "portable"


def test_operators_stand_in_the_program() -> None:
    """Reducers with an operator of their own use it; merges of the others are one operator too."""
    steps = [(name, fields) for name, fields in EVERY if name != "gtp"]  # it makes earlier steps track positions
    _, fused = both(steps)
    found = count(fused, images_of(2))
    attentions = len(steps)
    assert found["vp.attention.default"] == attentions
    names = [name for name, _ in steps]
    assert found["vp.match_merge.default"] == names.count("tome") + names.count("ppt")
    assert found["vp.density_merge.default"] == names.count("bat")
    assert found["vp.merge_rows.default"] == names.count("diffrate") + names.count("pitome")
    assert found["vp.select.default"] + found.get("vp.select_fuse.default", 0) >= names.count("topk")
    vit, description = tiny_vit(heads=HEADS)
    static = ReducedViT(vit, description, random_plan(PlanModel.of(description), first=False), "vp")
    assert count(static, images_for(description))["vp.gather_norm.default"] == 2


def test_select_fuse_is_used_where_no_sizes_are() -> None:
    _, fused = both([("evit", {"tokens_out": 40, "fuse": True})], proportional=False)
    assert count(fused, images_of(2)) == {
        "vp.attention.default": 1,
        "vp.gather_norm.default": 1,
        "vp.select_fuse.default": 1,
    }


@pytest.mark.slow
def test_exported_program_takes_other_batches() -> None:
    portable, fused = both(EVERY)
    program = export_program(fused.for_export())
    images = images_of(5)
    with torch.no_grad():
        assert near_ties(make(EVERY, num_heads=HEADS), images, program.module()(images), portable(images), 2e-4) <= 1


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    _, fused = both(EVERY)
    images = images_of(2)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert near_ties(make(EVERY, num_heads=HEADS), images, compiled(images), fused(images), 2e-4) <= 1


def test_gradients_reach_parameters_and_tuned_scales() -> None:
    vit, description = tiny_vit(heads=HEADS)
    plan = random_plan(PlanModel.of(description), scales=True)
    images = images_for(description)
    gradients = []
    for kernels in ("portable", "vp"):
        model = ReducedViT(vit, description, plan, kernels)  # type: ignore[arg-type]
        model.zero_grad()
        bias = model.blocks[1].key_bias
        assert bias is not None
        bias.requires_grad_(True)
        model(images).square().sum().backward()
        weight = vit.blocks[0].attn.qkv.weight.grad
        assert weight is not None
        gradients.append((weight.clone(), bias.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_limits_are_those_of_the_operators() -> None:
    from vp_kernels.attention import op
    from vp_kernels.launch import MAX_TOKENS

    assert fused_block.HEAD_DIMS == op.HEAD_DIMS
    assert fused_block.MAX_TOKENS == MAX_TOKENS


def test_refuses_other_heads() -> None:
    vit, description = tiny_vit()
    with pytest.raises(
        UnsupportedModelError, match=r"heads of 16 channels; expected 32, 64, 80, 96, 128 .*`kernels=portable`"
    ):
        ReducedViT(vit, description, None, "vp")


@pytest.mark.slow
def test_the_portable_form_never_loads_the_kernels() -> None:
    code = (
        "import sys\n"
        "from tests.exporter.tiny import tiny_vit\n"
        "from vp_exporter.rewrite.reduced_vit import ReducedViT\n"
        "import torch\n"
        "vit, description = tiny_vit()\n"
        "ReducedViT(vit, description)(torch.zeros(1, 3, *description.image_size))\n"
        "print([name for name in sys.modules if name.startswith('vp_kernels.')])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
