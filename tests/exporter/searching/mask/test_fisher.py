"""Gate gradients against central differences of timm's model in float64, and the importance against plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.exporter.tiny import DEPTH, tiny_vit
from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.mask import fisher
from vp_exporter.searching.mask.fisher import dead_from, gate_gradients, importance
from vp_exporter.searching.scoring import Scorer
from vp_exporter.utils.distributed import Workers

IMAGES, BATCH = 6, 2


def scorer_of(
    vit: nn.Module,
    description: ModelSpec,
    *,
    batch: int = BATCH,
    labels: bool = True,
    workers: Workers | None = None,
) -> Scorer:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 3, *description.image_size, generator=generator)
    named = torch.randint(description.num_classes, (IMAGES,), generator=generator) if labels else None
    calibration = Calibration.of_tensors(
        images, named, vit, description, batch_size=batch, held_share=0.5, workers=workers
    )
    return Scorer(vit, description, calibration, workers)


def gated_logits(twin: nn.Module, image: Tensor, block: int, gates: Tensor) -> Tensor:
    """Logits float64 [V, C] of timm's own forward, with exp(logit) of key j in one block multiplied by gates[v, j]."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "attn_mask": gates.log()[:, None, None, :]}

    handle = twin.blocks[block].attn.register_forward_pre_hook(before, with_kwargs=True)
    try:
        return twin(image.double().expand(len(gates), -1, -1, -1))
    finally:
        handle.remove()


@torch.no_grad()
def slow_gradient(twin: nn.Module, description: ModelSpec, image: Tensor, loss) -> np.ndarray:
    """Central differences of one image's loss: [depth, patches]."""
    tokens, first, h = description.prefix_tokens + description.patches, description.prefix_tokens, 1e-4
    result = np.zeros((description.depth, description.patches))
    for block in range(description.depth):
        gates = torch.ones(2 * description.patches, tokens, dtype=torch.float64)
        for patch in range(description.patches):
            gates[2 * patch, first + patch] += h
            gates[2 * patch + 1, first + patch] -= h
        losses = [float(loss(row)) for row in gated_logits(twin, image, block, gates)]
        for patch in range(description.patches):
            result[block, patch] = (losses[2 * patch] - losses[2 * patch + 1]) / (2 * h)
    return result


def double_twin(kind: str) -> nn.Module:
    twin, _ = tiny_vit(kind)
    twin = twin.double()
    for block in twin.blocks:
        block.attn.fused_attn = False
    return twin


def cross_entropy(target: int, temperature: float = 1.0):
    return lambda row: (row / temperature).exp().sum().log() - row[target] / temperature


@pytest.mark.parametrize(
    "kind",
    [
        "class-token",
        "distilled",
        "average-pool",
        "average-pool-fc-norm-class-token",
        "registers-swiglu",
        "qk-norm",
        "eva",
    ],
)
def test_gradients_of_the_label_loss_are_its_central_differences(kind: str) -> None:
    vit, description = tiny_vit(kind)
    scorer = scorer_of(vit, description)
    found = gate_gradients(scorer, [1], targets="labels")
    assert found.shape == (BATCH, DEPTH, description.patches)
    assert found.dtype == torch.float32
    images, labels = scorer.calibration.images(1), scorer.calibration.labels(1)
    assert labels is not None
    for at in range(BATCH):
        loss = cross_entropy(int(labels[at]))
        expected = slow_gradient(double_twin(kind), description, images[at : at + 1], loss)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(found[at].numpy(), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_of_the_model_loss_are_those_of_a_class_it_may_draw(temperature: float) -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description)
    found = gate_gradients(scorer, [0], targets="model", temperature=temperature, seed=5)
    drawn = fisher._target(scorer.calibration, 0, "model", temperature, 5)
    for at in range(BATCH):
        image, loss = scorer.calibration.images(0)[at : at + 1], cross_entropy(int(drawn[at]), temperature)
        expected = slow_gradient(double_twin("class-token"), description, image, loss)
        np.testing.assert_allclose(found[at].numpy(), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def test_gradients_of_the_logit_probe_are_its_central_differences() -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description)
    found = gate_gradients(scorer, [0], targets="logits", temperature=7.0)
    weights = fisher._target(scorer.calibration, 0, "logits", 1.0, 0)
    for at in range(BATCH):
        signs = torch.where(weights[at] > weights[at].mean(), 1.0, -1.0).double()
        if weights[at].abs().max() == 0:  # all signs equal: the probe gives 0
            signs.zero_()

        def loss(row: Tensor, signs: Tensor = signs) -> Tensor:
            return (signs * (row - row.mean())).sum()

        expected = slow_gradient(
            double_twin("class-token"), description, scorer.calibration.images(0)[at : at + 1], loss
        )
        np.testing.assert_allclose(found[at].numpy(), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max() + 1e-9)


def test_logit_probes_square_to_the_gauss_newton_diagonal() -> None:
    """Over all 2^7 sign vectors, weights[., c] weights[., d] has the mean of the centring matrix: I - 1/C."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 7)).reshape(7, -1).T
    weights = signs - signs.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(weights.T @ weights / len(weights), np.eye(7) - 1 / 7, atol=1e-12)
    # the drawn vectors are of this form, near that mean
    vit, description = tiny_vit()
    calibration = scorer_of(vit, description).calibration
    drawn = torch.cat([fisher._target(calibration, 0, "logits", 1.0, seed) for seed in range(400)]).numpy()
    assert {tuple(row) for row in drawn.round(9)} <= {tuple(row) for row in weights.round(9)}
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), np.eye(7) - 1 / 7, atol=0.2)


def test_classes_are_drawn_as_often_as_the_softened_dense_model_says() -> None:
    vit, description = tiny_vit()
    calibration = scorer_of(vit, description).calibration
    for temperature in (1.0, 4.0):
        p = torch.softmax(calibration.dense(0).double() / temperature, dim=1).numpy()
        drawn = np.stack([fisher._target(calibration, 0, "model", temperature, seed).numpy() for seed in range(2000)])
        for at in range(BATCH):
            share = np.bincount(drawn[:, at], minlength=description.num_classes) / len(drawn)
            np.testing.assert_allclose(share, p[at], atol=0.05)


@pytest.mark.parametrize("kind", ["class-token", "average-pool"])
def test_an_image_s_gradient_does_not_depend_on_its_batch(kind: str) -> None:
    vit, description = tiny_vit(kind)
    together = gate_gradients(scorer_of(vit, description, batch=3), [0, 1], targets="labels")
    alone = gate_gradients(scorer_of(vit, description, batch=1), range(IMAGES), targets="labels")
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


@pytest.mark.parametrize("targets", ["model", "labels", "logits"])
def test_the_same_again_and_in_any_order_of_batches(targets: str) -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description)
    first = gate_gradients(scorer, [0, 1], targets=targets)
    torch.rand(3)  # the global generator is not used
    assert torch.equal(first, gate_gradients(scorer, [0, 1], targets=targets))
    swapped = gate_gradients(scorer, [1, 0], targets=targets)
    assert torch.equal(first, torch.cat([swapped[BATCH:], swapped[:BATCH]]))
    if targets != "labels":
        seeds = [gate_gradients(scorer, [0, 1], targets=targets, seed=seed, temperature=9.0) for seed in (0, 1)]
        assert not torch.equal(*seeds)


def test_the_model_is_left_as_it_was() -> None:
    vit, description = tiny_vit()
    vit.head.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    scorer = scorer_of(vit, description)
    before = vit(scorer.calibration.images(0)).detach()
    gate_gradients(scorer, [0])
    assert {name: parameter.requires_grad for name, parameter in vit.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert torch.equal(vit(scorer.calibration.images(0)).detach(), before)
    with torch.inference_mode():  # the caller's mode does not disable gradients
        assert gate_gradients(scorer, [0]).abs().max() > 0


def test_flags_come_back_after_a_failure() -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description)
    with pytest.raises(KeyError):
        gate_gradients(scorer, [99])
    assert all(parameter.requires_grad for parameter in vit.parameters())


def naive_suffix(gradients: Tensor) -> np.ndarray:
    n, depth, patches = gradients.shape
    result = np.zeros((n, depth, patches))
    for image in range(n):
        for block in range(depth):
            for patch in range(patches):
                result[image, block, patch] = sum(float(gradients[image, b, patch]) for b in range(block, depth))
    return result


def test_suffix_sums_and_importance_are_those_of_a_loop() -> None:
    gradients = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    suffix = naive_suffix(gradients)
    np.testing.assert_allclose(dead_from(gradients).numpy(), suffix, rtol=1e-12)
    found = importance(gradients)
    assert found.dtype == np.float64
    for block in range(4):
        for patch in range(5):
            expected = sum(suffix[image, block, patch] ** 2 for image in range(3)) / 3
            assert found[block, patch] == pytest.approx(expected, rel=1e-12)


def test_a_suffix_sum_is_the_gradient_of_a_gate_shared_by_the_later_blocks() -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description)
    suffix = dead_from(gate_gradients(scorer, [0], targets="labels"))
    twin, labels = double_twin("class-token"), scorer.calibration.labels(0)
    assert labels is not None
    patch, first, h = 6, 1, 1e-4

    def loss(gate: float, image: Tensor, label: int) -> float:
        gates = torch.ones(1, description.patches + 1, dtype=torch.float64)
        gates[0, description.prefix_tokens + patch] = gate

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attn_mask": gates.log()[:, None, None, :]}

        handles = [b.attn.register_forward_pre_hook(before, with_kwargs=True) for b in twin.blocks[first:]]
        with torch.no_grad():
            value = float(cross_entropy(label)(twin(image.double())[0]))
        for handle in handles:
            handle.remove()
        return value

    for at in range(BATCH):
        image, label = scorer.calibration.images(0)[at : at + 1], int(labels[at])
        expected = (loss(1 + h, image, label) - loss(1 - h, image, label)) / (2 * h)
        assert float(suffix[at, first, patch]) == pytest.approx(expected, rel=2e-3, abs=1e-5)


class Recorded(Workers):
    """A single process that records its items."""

    def map(self, function, items: Sequence[int]) -> list[Tensor]:  # type: ignore[override]
        asked.append(list(items))
        return super().map(function, items)


asked: list[list[int]] = []


def test_batches_go_through_the_workers() -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description, workers=Recorded())
    asked.clear()
    gate_gradients(scorer, [1, 0])
    assert asked == [[1, 0]]


def test_bad_requests_are_one_clear_line() -> None:
    vit, description = tiny_vit()
    scorer = scorer_of(vit, description, labels=False)
    with pytest.raises(SearchError, match="no labels"):
        gate_gradients(scorer, [0], targets="labels")
    with pytest.raises(SearchError, match="targets is 'hessian'"):
        gate_gradients(scorer, [0], targets="hessian")
    with pytest.raises(SearchError, match="no batches"):
        gate_gradients(scorer, [])
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SearchError, match="temperature"):
            gate_gradients(scorer, [0], temperature=temperature)
    with torch.no_grad():
        vit.blocks[2].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(SearchError, match="NaN or infinite"):
        gate_gradients(scorer, [0])
    assert all(parameter.requires_grad for parameter in vit.parameters())
