"""Numerical check that a user's module computes the same as its rewritten form.

Subclasses of timm's classes may change anything, and so may hooks, replaced methods and exchanged layers in a module of
timm's own class. The exported form is run on two random images to check that:

1. Without a plan, it gives the same output as the module's own `forward`.
2. Tokens only interact in attention, so that dropping one does not affect the others otherwise. With patches dropped,
   it must equal itself with the same patches masked out of every attention. Skipped if all layers are timm's or
   torch's own, which treat tokens separately.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.errors import UnsupportedModelError, first_line
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep
from vp_exporter.rewrite.reduced_vit import ReducedViT

# Tolerance, in roundings of the largest value: 6e-5 in fp32, where at most 1.4e-6 was observed. If the outputs of all
# images are nearly equal (a LayerScale of 1e-5), it is relative to their difference.
MOST_STEPS, LEAST_STEPS = 512, 32
MOST_OF_SPREAD = 0.01
MASKED = -3e4  # exp(-3e4) is 0 in fp32
_DROPPED = 0.4


def check_equivalent(vit: nn.Module, spec: ModelSpec) -> None:
    """Check that the rewritten form of a module computes the same.

    Args:
        vit: A timm ViT or an instance of a subclass, in eval mode, fp32, on the CPU.
        spec: Its spec.

    Raises:
        UnsupportedModelError: if it cannot be run or rewritten, or the outputs differ; the message says by how much.
    """
    name = type(vit).__name__
    images = _images(spec)
    with torch.no_grad():
        own = _own_answer(vit, images, name)
        if float(_spread(own)) <= LEAST_STEPS * _rounding(own):
            # E.g. a head of zeros, which would hide any difference before it.
            vit = _without_zeros(vit)
            own = _own_answer(vit, images, name)
        try:
            dense = ReducedViT(vit, spec).for_export()
            found = dense(images)
            tokens = None if _is_plain(vit) else _with_a_drop(vit, spec, images)
        except UnsupportedModelError:
            raise
        except Exception as error:  # unknown layers may raise anything
            raise UnsupportedModelError(
                f"{name} cannot be rewritten: {type(error).__name__}: {first_line(error)[:200]}",
                expected="the layers of timm's class that it derives from",
                fix="merge adapters and remove wrappers around its layers first",
            ) from error
        if found.shape != own.shape:
            raise UnsupportedModelError(
                f"{name} gives {list(own.shape[1:])} for an image, and rewritten it gives {list(found.shape[1:])}",
                expected="what timm's class gives",
                fix=_GO_ON,
            )
        limit = min(MOST_STEPS * _rounding(own), max(MOST_OF_SPREAD * _spread(own), LEAST_STEPS * _rounding(own)))
        if (found - own).abs().max() > limit:
            raise UnsupportedModelError(
                f"{name} does not compute what timm's class computes: rewritten, its outputs differ by "
                f"{_difference(found, own):.2g} of the largest, on random images",
                expected=f"at most {limit / own.abs().max():.2g}: a class that changes nothing of what is rewritten",
                fix=_GO_ON,
            )
        if tokens is not None and (tokens[0] - tokens[1]).abs().max() > MOST_STEPS * _rounding(tokens[1]):
            raise UnsupportedModelError(
                f"{name} mixes tokens outside of attention: with patches dropped, the others differ from those of a "
                f"model in which they are masked, by {_difference(*tokens):.2g} of the largest",
                expected="layers that treat each token by itself",
                fix=_GO_ON,
            )


_GO_ON = "undo what it changes (hooks, replaced methods, adapters that are not merged), or name the plain ViT in it"


def _images(spec: ModelSpec) -> Tensor:
    """float32 [2, C, H, W]: noise, and a smooth image beyond the range of pixel values."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, spec.in_chans, *spec.image_size, generator=generator)
    small = 3 * torch.randn(1, spec.in_chans, 4, 4, generator=generator)
    return torch.cat([noise, nn.functional.interpolate(small, size=spec.image_size, mode="bilinear")])


def _is_plain(vit: nn.Module) -> bool:
    """Whether a module consists of timm's and torch's layers only, without hooks or replaced forward methods."""
    return all(
        type(part).__module__.startswith(("timm.", "torch.nn."))
        and "forward" not in vars(part)
        and not part._forward_hooks
        and not part._forward_pre_hooks
        for part in vit.modules()
    )


def _own_answer(vit: nn.Module, images: Tensor, name: str) -> Tensor:
    try:
        answer = vit(images)
    except Exception as error:  # user code may raise anything
        raise UnsupportedModelError(
            f"{name} does not run on images of {list(images.shape[1:])}: {type(error).__name__}: "
            f"{first_line(error)[:200]}",
            expected="forward(images), float32 on the CPU",
            fix=_GO_ON,
        ) from error
    if not isinstance(answer, Tensor):
        raise UnsupportedModelError(
            f"forward of {name} gives a {type(answer).__name__}", expected="one tensor, [batch, classes]", fix=_GO_ON
        )
    if not torch.isfinite(answer).all():
        raise UnsupportedModelError(
            f"{name} gives NaN or infinite outputs on random images", expected="finite ones", fix="check its weights"
        )
    return answer.float()


def _without_zeros(vit: nn.Module) -> nn.Module:
    """Copy with all-zero parameters replaced by random ones."""
    twin, generator = copy.deepcopy(vit), torch.Generator().manual_seed(1)
    for parameter in twin.parameters():
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return twin


def _kept_patches(spec: ModelSpec) -> list[int]:
    order = torch.randperm(spec.patches, generator=torch.Generator().manual_seed(2)).tolist()
    return sorted(order[int(_DROPPED * spec.patches) :])


def _with_a_drop(vit: nn.Module, spec: ModelSpec, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final tokens with patches dropped before block 0, and with the same patches masked and then removed."""
    kept, model = _kept_patches(spec), PlanModel.of(spec)
    stay = [*range(spec.prefix_tokens), *(spec.prefix_tokens + patch for patch in kept)]  # in the sequence
    row = torch.full((spec.prefix_tokens + spec.patches,), MASKED)
    row[stay] = 0.0
    bias: Mapping[int, tuple[float, ...]] = dict.fromkeys(range(spec.depth), tuple(row.tolist()))
    plans = (ReductionPlan(model, (StaticStep(block=0, keep=tuple(kept)),)), ReductionPlan(model, key_bias=bias))
    dropped, masked = (ReducedViT(vit, spec, plan).for_export().block_tokens(images)[-1] for plan in plans)
    return vit.norm(dropped), vit.norm(masked)[:, stay]


def _rounding(values: Tensor) -> Tensor:
    """One rounding of the largest value."""
    return torch.finfo(values.dtype).eps * values.abs().max()


def _spread(values: Tensor) -> Tensor:
    """Largest difference between the images."""
    return (values[0] - values[1]).abs().max()


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))
