"""Find a static token mask for the demo's model: which patches enter which block, the same for every image.

    python examples/digits/search_mask.py

This is a small, plain search; `vp-search` is the general one, for any supported model.

1. Importance: how strongly each image's loss reacts to an attention bias on each key, per block (the squared gradient,
   averaged over training images).
2. Shapes: several ways to spend the same multiply-accumulates (drop once at block 0, or in stages) are filled by
   importance. The one closest to the dense model (KL divergence, validation images) is selected.
3. Swaps: a weak kept patch is exchanged for a strong dropped one whenever that lowers the same KL.

Uses training and validation images only; the test part is measured once, for the final mask.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import load_part
from model import (
    DEPTH,
    MASK,
    PATCHES,
    WEIGHTS,
    classify,
    embed,
    load_model,
    mac_ratio,
    predict,
    preprocess,
    tokens_per_block,
    top1,
)
from numpy.typing import NDArray
from torch import Tensor, nn

# Share of the patches that enter each block, relative to the first drop; None: all patches, before any drop.
SHAPES: dict[str, tuple[float | None, ...]] = {
    "once, at block 0": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "once, at block 1": (None, 1.0, 1.0, 1.0, 1.0, 1.0),
    "once, at block 2": (None, None, 1.0, 1.0, 1.0, 1.0),
    "two stages, 0 and 3": (1.0, 1.0, 1.0, 0.6, 0.6, 0.6),
    "two stages, 0 and 4": (1.0, 1.0, 1.0, 1.0, 0.5, 0.5),
    "three stages, 0, 2 and 4": (1.0, 1.0, 0.75, 0.75, 0.5, 0.5),
}


def attend(attention: nn.Module, tokens: Tensor, bias: Tensor) -> Tensor:
    """A timm attention layer with `bias` [B, N] per key added to the scores of every query."""
    count, length, width = tokens.shape
    heads = attention.num_heads
    query, key, value = attention.qkv(tokens).view(count, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * (width // heads) ** -0.5 + bias[:, None, None, :]
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(count, length, width)
    return attention.proj(mixed)


def importance(
    model: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64], batch_size: int = 20
) -> NDArray[np.float64]:
    """Mean squared gradient of each image's loss with respect to an attention bias on each patch, [depth, 196]."""
    total = np.zeros((DEPTH, PATCHES))
    for start in range(0, len(images), batch_size):
        pixels = preprocess(images[start : start + batch_size])
        target = torch.as_tensor(labels[start : start + batch_size])
        biases = [torch.zeros(len(target), 1 + PATCHES, requires_grad=True) for _ in range(DEPTH)]
        tokens = torch.cat(embed(model, pixels), dim=1)
        for block, bias in zip(model.blocks, biases, strict=True):
            tokens = tokens + attend(block.attn, block.norm1(tokens), bias)
            tokens = tokens + block.mlp(block.norm2(tokens))
        loss = F.cross_entropy(classify(model, tokens), target, reduction="sum")
        gradients = torch.autograd.grad(loss, biases)
        total += torch.stack([g[:, 1:].square().sum(dim=0) for g in gradients]).double().numpy()
    return total / len(images)


def counts_for(shape: tuple[float | None, ...], ratio: float) -> list[int]:
    """Patches per block: the most that the shape allows with a MAC ratio of at least `ratio`."""
    for first in range(PATCHES, 0, -1):
        counts = [PATCHES if share is None else max(1, round(first * share)) for share in shape]
        rows = np.arange(PATCHES)[None, :] < np.array(counts)[:, None]
        if mac_ratio(rows) >= ratio:
            return counts
    raise ValueError(f"no mask of this shape reaches a ratio of {ratio}")


def fill(counts: list[int], scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A monotone mask with `counts[b]` patches in row b, chosen by the remaining importance from block b on."""
    mask = np.zeros((DEPTH, PATCHES), dtype=np.uint8)
    alive = np.ones(PATCHES, dtype=bool)
    for block, count in enumerate(counts):
        left = np.where(alive, scores[block:].sum(axis=0), -np.inf)
        alive = np.zeros(PATCHES, dtype=bool)
        alive[np.argsort(-left, kind="stable")[:count]] = True
        mask[block] = alive
    return mask


def divergence(
    model: nn.Module, images: NDArray[np.uint8], mask: NDArray[np.uint8], dense: Tensor, batch_size: int = 50
) -> float:
    """Mean KL divergence from the dense logits to those of the masked model."""
    masked = predict(model, images, mask, batch_size)
    return float(F.kl_div(masked.log_softmax(1), dense.softmax(1), reduction="batchmean"))


def swapped(mask: NDArray[np.uint8], stage: int, leaves: NDArray[np.int64], enters: NDArray[np.int64]) -> NDArray:
    """Exchange patches from row `stage` on; a patch removed from an earlier row is removed from later ones too."""
    result = mask.copy()
    for out, into in zip(leaves, enters, strict=True):
        last_out, last_in = int(mask[:, out].sum()), int(mask[:, into].sum())
        if stage == 0 or last_in >= stage:  # The new patch takes the removed one's place from this row on.
            result[stage:last_out, out] = 0
            result[:last_out, into] = 1
            result[max(last_out, last_in) :, into] = 0
    return result


def improve(
    model: nn.Module,
    images: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    dense: Tensor,
    scores: NDArray[np.float64],
    tries: int,
    seed: int,
) -> tuple[NDArray[np.uint8], float]:
    """Random swaps of weak kept for strong dropped patches at a random stage; keeps those that lower the KL."""
    generator = np.random.default_rng(seed)
    best = divergence(model, images, mask, dense)
    wanted = tokens_per_block(mask)
    stages = [b for b in range(DEPTH) if wanted[b] < (wanted[b - 1] if b else 1 + PATCHES)]
    for attempt in range(tries):
        stage = stages[int(generator.integers(len(stages)))]
        strength = np.log(scores[stage:].sum(axis=0) + 1e-12)
        kept = np.flatnonzero(mask[stage])
        pool = np.ones(PATCHES, dtype=bool) if stage == 0 else mask[stage - 1] > 0
        dropped = np.flatnonzero(pool & (mask[stage] == 0))
        size = min(4 if attempt < tries // 3 else 2 if attempt < 2 * tries // 3 else 1, len(dropped))
        noise = generator.gumbel(size=(2, PATCHES))
        leaves = kept[np.argsort((strength + noise[0])[kept])[:size]]
        enters = dropped[np.argsort(-(strength + noise[1])[dropped])[:size]]
        trial = swapped(mask, stage, leaves, enters)
        if tokens_per_block(trial) != wanted:
            continue
        value = divergence(model, images, trial, dense)
        if value < best:
            mask, best = trial, value
    return mask, best


def search(
    model: nn.Module, ratio: float, tries: int, seed: int, images_for_scores: int, images_for_kl: int
) -> NDArray[np.uint8]:
    """The whole search; prints its results."""
    started = time.monotonic()
    train_images, train_labels = load_part("train")
    stride = max(1, len(train_images) // images_for_scores)
    scores = importance(model, train_images[::stride], train_labels[::stride])
    images, labels = load_part("validation")
    stride = max(1, len(images) // images_for_kl)
    near = images[::stride]
    dense_all = predict(model, images)
    dense = dense_all[::stride]
    print(f"importance from {len(train_images[:: len(train_images) // images_for_scores])} training images", flush=True)
    found: list[tuple[float, str, NDArray[np.uint8]]] = []
    for name, shape in SHAPES.items():
        mask = fill(counts_for(shape, ratio), scores)
        value = divergence(model, near, mask, dense)
        found.append((value, name, mask))
        tokens = tokens_per_block(mask)
        print(f"{name}: tokens {tokens}, MAC ratio {mac_ratio(mask):.3f}, KL {value:.5f}", flush=True)
    value, name, mask = min(found, key=lambda item: item[0])
    print(f"on with: {name}", flush=True)
    mask, value = improve(model, near, mask, dense, scores, tries, seed)
    reduced = top1(predict(model, images, mask), labels)
    print(f"after {tries} swaps: KL {value:.5f} on {len(near)} validation images; ", end="")
    print(f"validation top-1 {reduced:.4f} (dense {top1(dense_all, labels):.4f}), {time.monotonic() - started:.0f} s")
    return mask


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Search a static token mask for the demo's digits ViT.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=MASK)
    parser.add_argument("--ratio", type=float, default=2.0, help="dense / reduced multiply-accumulates, at least")
    parser.add_argument("--tries", type=int, default=100, help="how many swaps to try")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--importance-images", type=int, default=200)
    parser.add_argument("--kl-images", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = load_model(arguments.weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mask = search(
        model,
        arguments.ratio,
        arguments.tries,
        arguments.seed,
        arguments.importance_images,
        arguments.kl_images,
    )
    np.save(arguments.out, mask.astype(np.uint8))
    images, labels = load_part("test")
    dense, reduced = top1(predict(model, images), labels), top1(predict(model, images, mask), labels)
    print(f"tokens per block {tokens_per_block(mask)}, MAC ratio {mac_ratio(mask):.3f}")
    print(f"test top-1 on {len(labels)} images: dense {dense:.4f}, reduced {reduced:.4f}; wrote {arguments.out.name}")


if __name__ == "__main__":
    main()
