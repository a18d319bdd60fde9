"""Importance of each patch in each block: gradients with respect to gates on the keys, and their diagonal Fisher.

Each block and patch has a gate m[l, j], whose logarithm is added to the logit of that key for every query and head of
block l: 1 leaves the model unchanged and 0 removes the key. At m = 1 the logit's derivative with respect to m is 1, so
the gradient of a gate is the sum over heads and queries of the loss's gradient with respect to the logit.

A gate only affects attention. If the head pools over patches, the effect of removing a patch from the pool is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vp_exporter.errors import SearchError
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.scoring import Scorer, frozen

TARGETS = ("model", "labels", "logits")


def gate_gradients(
    scorer: Scorer,
    batches: Sequence[int],
    *,
    targets: str = "model",
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Gradient of each image's loss with respect to the gates of the dense model. One backward pass per batch.

    The mean over images of the squares is the diagonal of a curvature matrix, depending on `targets`:

    - "model": loss -log softmax(logits / temperature)[y], with a class y sampled per image from the dense model's own
      softmax(logits / temperature): the Fisher in expectation over the samples. With labels for y it is the empirical
      Fisher, which is neither the Fisher nor the Hessian (Kunstner, Balles and Hennig, "Limitations of the empirical
      Fisher approximation", NeurIPS 2019).
    - "labels": cross-entropy with the label, at temperature 1: the empirical Fisher.
    - "logits": sum over classes of v_c (logit_c - mean logit) with random signs v, a Hutchinson probe of the
      Gauss-Newton matrix of the squared distance between logits. Every image contributes, whereas the other two are
      dominated by the few that the model is unsure of. Independent of the temperature.

    Args:
        scorer: Provides model, images and workers; not modified.
        batches: Batch numbers of the calibration images; distributed over the workers.
        targets, temperature: See above.
        seed: Seed of the samples, which depend only on it and the batch number.

    Returns:
        float32 [n, depth, patches] on the CPU: images in the order of the batches, patches without prefix tokens. Equal
        on every process, and for any number of processes.

    Raises:
        SearchError: if there are no batches, targets are unknown, the temperature is not above 0, required labels are
            missing, or gradients are not finite.
    """
    if targets not in TARGETS:
        raise SearchError(f"targets is {targets!r}", expected=" or ".join(TARGETS))
    if not 0 < temperature < float("inf"):
        raise SearchError(f"the temperature is {temperature:g}", expected="a finite number above 0")
    if not batches:
        raise SearchError("no batches to take gradients on", expected="at least one")
    if targets == "labels" and any(scorer.calibration.labels(batch) is None for batch in batches):
        raise SearchError(
            "the calibration images have no labels", expected="a label for each image",
            fix="take the dense model's own answers as the target",
        )  # fmt: skip
    # Gates are set on this view of the model, which shares the scorer's parameters.
    model = ReducedViT(scorer.vit, scorer.description).to(scorer.device)
    for block in model.blocks:
        block.attention_form = (
            "explicit"  # on some devices, fused kernels have no or no reproducible gradient of the mask
        )

    def one(batch: int) -> Tensor:
        target = _target(scorer.calibration, batch, targets, temperature, seed)
        divisor = temperature if targets == "model" else 1.0
        return _backward(model, scorer.calibration.images(batch), target, divisor)

    with frozen(scorer.vit), torch.inference_mode(False), torch.enable_grad():
        parts = scorer.workers.map(one, batches)
    gradients = torch.cat(parts)
    # After the gather, so that every process raises.
    if not torch.isfinite(gradients).all():
        raise SearchError(
            "the gradients of the key gates are NaN or infinite", expected="finite gradients",
            fix="check the weights; run the search in fp32",
        )  # fmt: skip
    return gradients


def dead_from(gradients: Tensor) -> Tensor:
    """Gradient with respect to a single gate that closes a patch in block l and every later one.

    To first order, removing patch i from block l on changes an image's loss by minus this.

    Args:
        gradients: [n, depth, patches].

    Returns:
        float64 [n, depth, patches]: [., l, i] is the sum over l' >= l of gradients[., l', i].
    """
    return gradients.double().flip(1).cumsum(1).flip(1)


def importance(gradients: Tensor) -> np.ndarray:
    """Cost of losing a patch from a block on: mean over images of `dead_from` squared.

    Args:
        gradients: [n, depth, patches].

    Returns:
        float64 [depth, patches]. For targets "model" at temperature 1, half of it estimates the KL of losing each
        patch.
    """
    found: np.ndarray = dead_from(gradients).square().mean(dim=0).cpu().numpy()
    return found


def _target(calibration: Calibration, batch: int, targets: str, temperature: float, seed: int) -> Tensor:
    """Classes int64 [b], or for "logits" the weight of each logit in the loss, float64 [b, C]."""
    if targets == "labels":
        labels = calibration.labels(batch)
        assert labels is not None
        return labels
    rng = np.random.default_rng([seed, batch])  # numpy's generator gives the same samples on any device
    dense = calibration.dense(batch).double().numpy()
    if targets == "logits":
        signs = rng.integers(0, 2, size=dense.shape) * 2.0 - 1.0
        # sum_c v_c (z_c - mean z) = sum_c (v_c - mean v) z_c
        return torch.from_numpy(signs - signs.mean(axis=1, keepdims=True))
    scaled = dense / temperature
    below = np.cumsum(np.exp(scaled - scaled.max(axis=1, keepdims=True)), axis=1)
    drawn = (below <= rng.random((len(dense), 1)) * below[:, -1:]).sum(axis=1)
    return torch.from_numpy(np.minimum(drawn, dense.shape[1] - 1))


def _backward(model: ReducedViT, images: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Gradients float32 [b, depth, patches]. Images are independent, so the summed loss gives each its own gradient."""
    description = model.description
    tokens = description.prefix_tokens + description.patches
    gates = [torch.zeros(len(images), tokens, device=images.device, requires_grad=True) for _ in model.blocks]
    for block, gate in zip(model.blocks, gates, strict=True):
        block.key_bias = gate
    logits = model(images).double()
    target = target.to(logits.device)
    if target.is_floating_point():
        loss = (target * logits).sum()
    else:
        loss = F.cross_entropy(logits / temperature, target, reduction="sum")
    found = torch.autograd.grad(loss, gates)
    return torch.stack(found, dim=1)[:, :, description.prefix_tokens :].contiguous()
