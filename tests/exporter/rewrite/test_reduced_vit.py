"""ReducedViT against an oracle: the dense model with removed tokens masked out of attention.

The oracle is timm's own forward, block by block, with an additive attention mask; it shares no code with ReducedViT.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.exporter.tiny import DEPTH, KINDS, random_mask, random_plan, tiny_vit
from tests.pairwise import pairwise
from vp_exporter.errors import PlanError
from vp_exporter.model.describe import describe
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.masks import plan_from_mask
from vp_exporter.rewrite.reduced_vit import ReducedViT


def masked_dense(vit: torch.nn.Module, mask: np.ndarray, images: torch.Tensor) -> tuple[list, torch.Tensor]:
    """Run timm's whole model with dropped tokens masked: key bias -inf where the mask is 0, log(mask) elsewhere.

    Returns the remaining tokens after every block, and the output with pooling over them.
    """
    prefix = vit.num_prefix_tokens
    with torch.no_grad():
        x = vit.patch_embed(images)
        x = vit._pos_embed(x)
        x = x[0] if isinstance(x, tuple) else x  # Eva also returns its rotary embedding
        x = vit.norm_pre(x)
        layers = []
        for block, row in zip(vit.blocks, mask, strict=True):
            bias = torch.cat([torch.zeros(prefix), torch.from_numpy(row).log().float()])
            x = block(x, attn_mask=bias[None, None, None, :])
            alive = [*range(prefix), *(prefix + np.flatnonzero(row)).tolist()]
            layers.append(x[:, alive])
        survivors = vit.norm(layers[-1])
        return layers, vit.forward_head(survivors)


def images_for(description, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *description.image_size, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_twin_equals_timm(kind: str) -> None:
    vit, description = tiny_vit(kind)
    images = images_for(description)
    with torch.no_grad():
        torch.testing.assert_close(ReducedViT(vit, description)(images), vit(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "where", "values"), pairwise(KINDS, ["drop-before-embedding", "embed-all"], ["mask", "tuned-mask"])
)
def test_oracle(kind: str, where: str, values: str) -> None:
    vit, description = tiny_vit(kind)
    model = PlanModel.of(description)
    mask = random_mask(model, scales=values == "tuned-mask", first=where == "drop-before-embedding")
    reduced = ReducedViT(vit, description, plan_from_mask(mask, model))
    images = images_for(description)
    layers, output = masked_dense(vit, mask, images)
    with torch.no_grad():
        for block, (mine, theirs) in enumerate(zip(reduced.block_tokens(images), layers, strict=True)):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, b=block: f"block {b}: {m}")
        torch.testing.assert_close(reduced(images), output, atol=1e-5, rtol=1e-5)
        # The folded copy, which is lowered, must be the same function.
        torch.testing.assert_close(reduced.for_export()(images), output, atol=2e-5, rtol=2e-5)
        for form in ("explicit", "packed"):
            torch.testing.assert_close(reduced.for_export("fp32", form)(images), output, atol=2e-5, rtol=2e-5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_oracle_on_any_mask(data: st.DataObject) -> None:
    vit, description = tiny_vit()
    model = PlanModel.of(description)
    leaves = data.draw(st.lists(st.integers(0, DEPTH), min_size=model.patches, max_size=model.patches))
    leaves[data.draw(st.integers(0, model.patches - 1))] = DEPTH  # at least one patch stays
    mask = (np.arange(DEPTH)[:, None] < np.asarray(leaves)[None, :]).astype(float)
    images = images_for(description, batch=1)
    _, output = masked_dense(vit, mask, images)
    with torch.no_grad():
        reduced = ReducedViT(vit, description, plan_from_mask(mask, model))(images)
    torch.testing.assert_close(reduced, output, atol=1e-5, rtol=1e-5)


def test_parameters_are_shared() -> None:
    vit, description = tiny_vit()
    reduced = ReducedViT(vit, description, random_plan(PlanModel.of(description)))
    assert {id(p) for p in reduced.parameters()} == {id(p) for p in vit.parameters()}
    images = images_for(description)
    with torch.no_grad():
        before = reduced(images)
        vit.blocks[0].mlp.fc1.weight.mul_(1.5)
        assert not torch.allclose(before, reduced(images))


def test_for_export_leaves_the_model_alone() -> None:
    vit, description = tiny_vit("layerscale-no-embed-class")
    before = copy.deepcopy(vit.state_dict())
    ReducedViT(vit, description, random_plan(PlanModel.of(description))).for_export("fp16")
    assert vit.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(vit.state_dict().values(), before.values(), strict=True))


def test_dropped_patches_do_not_matter() -> None:
    """Patches dropped before block 0 are never read: NaN in their pixels must not reach the output."""
    vit, description = tiny_vit()
    model = PlanModel.of(description)
    mask = np.ones((model.depth, model.patches))
    mask[:, 5] = 0
    reduced = ReducedViT(vit, description, plan_from_mask(mask, model))
    images = images_for(description)
    row, column = divmod(5, description.grid[1])
    images[:, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = float("nan")
    assert torch.isfinite(reduced(images)).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_export_keeps_the_batch_dynamic(batch: int) -> None:
    from vp_exporter.lowering import export_program

    vit, description = tiny_vit()
    reduced = ReducedViT(vit, description, random_plan(PlanModel.of(description), scales=True))
    program = export_program(reduced.for_export())
    images = images_for(description, batch)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), reduced(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    vit, description = tiny_vit()
    reduced = ReducedViT(vit, description, random_plan(PlanModel.of(description), scales=True))
    compiled = torch.compile(reduced, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            images = images_for(description, batch)
            torch.testing.assert_close(compiled(images), reduced(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_error_is_at_most_twice_torch(precision: str) -> None:
    """The reduced model's error against fp32 is at most twice that of timm's own model cast to the same dtype."""
    vit, description = tiny_vit()
    images = images_for(description, 8)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    reduced = ReducedViT(vit, description, random_plan(PlanModel.of(description)))
    with torch.no_grad():
        torch_error = (copy.deepcopy(vit).to(dtype)(images.to(dtype)).float() - vit(images)).abs().max()
        error = (reduced.for_export(precision)(images) - reduced(images)).abs().max()
    assert error <= 2 * torch_error


def test_wrong_model_is_refused() -> None:
    _, description = tiny_vit()
    plan = random_plan(PlanModel.of(description))
    other = timm.create_model("vit_tiny_patch16_224", depth=DEPTH, embed_dim=64, num_heads=4, img_size=96)
    with pytest.raises(PlanError, match=r"image_size \[64, 64\].*expected \[96, 96\]"):
        ReducedViT(other, describe(other, "vit_tiny_patch16_224"), plan)


def test_no_steps_is_the_dense_model() -> None:
    vit, description = tiny_vit()
    plan = ReductionPlan(PlanModel.of(description))
    images = images_for(description)
    with torch.no_grad():
        assert torch.equal(ReducedViT(vit, description, plan)(images), ReducedViT(vit, description)(images))
