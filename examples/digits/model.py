"""The demo's model: a small timm VisionTransformer with 197 tokens, its preprocessing, and a masked forward pass.

The model is a timm name with keyword arguments that can be written as JSON, so that `vp-export` can create it as well:

    vp-export --model vit_tiny_patch16_224 --model-arg img_size=28 --model-arg patch_size=2 ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights.safetensors"
MASK = HERE / "mask.npy"

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_KWARGS: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 3,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
}
GRID = MODEL_KWARGS["img_size"] // MODEL_KWARGS["patch_size"]
PATCHES = GRID * GRID
DEPTH: int = MODEL_KWARGS["depth"]

# Preprocessing: convert to RGB, resize the whole image to 28x28 (no crop), scale to 0..1, subtract the mean, divide by
# the std. Mean and std are those of timm for this model name.
INPUT_SIZE = (3, 28, 28)
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
INTERPOLATION = "bicubic"
CROP_PCT = 1.0


def create_model() -> nn.Module:
    """Create the model with random weights."""
    return timm.create_model(MODEL_NAME, pretrained=False, **MODEL_KWARGS)


def load_model(weights: Path = WEIGHTS) -> nn.Module:
    """Load the trained model, in eval mode; the file must have exactly its weights."""
    model = create_model()
    model.load_state_dict(load_file(weights), strict=True)
    return model.eval()


def preprocess(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """Convert grey images, uint8 [B, 28, 28], to the model's input, float32 [B, 3, 28, 28]."""
    grey = torch.as_tensor(images).float().div(255.0)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (grey.unsqueeze(1).expand(-1, 3, -1, -1) - mean) / std


def embed(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The class token [B, 1, D] and the patch tokens [B, 196, D], with position embeddings."""
    patches = model.patch_embed(pixels)
    position = model.pos_embed
    first = (model.cls_token + position[:, :1]).expand(patches.shape[0], -1, -1)
    return first, patches + position[:, 1:]


def classify(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, 10] from the tokens after the last block."""
    return model.forward_head(model.norm(tokens))


def forward_masked(model: nn.Module, pixels: Tensor, mask: NDArray[Any]) -> Tensor:
    """Logits under a mask [depth, 196]: row b selects the patches that enter block b."""
    rows = torch.as_tensor(np.asarray(mask) > 0)
    first, patches = embed(model, pixels)
    kept = torch.arange(rows.shape[1])
    tokens = torch.cat([first, patches], dim=1)
    for block, row in zip(model.blocks, rows, strict=True):
        stay = row[kept]
        if not bool(stay.all()):
            kept = kept[stay]
            tokens = tokens[:, torch.cat([torch.ones(1, dtype=torch.bool), stay])]
        tokens = block(tokens)
    return classify(model, tokens)


def tokens_per_block(mask: NDArray[Any]) -> list[int]:
    """Number of tokens that enter each block, the class token included."""
    return [1 + int(row.sum()) for row in np.asarray(mask) > 0]


def count_macs(tokens: list[int]) -> int:
    """Multiply-accumulates per image if `tokens[b]` tokens, the class token included, enter block b.

    A block with n tokens of width d costs 4nd^2 (attention's projections) + 2n^2d (scores and weighted sum) + 8nd^2
    (MLP); only the patches that enter block 0 are embedded.
    """
    d = MODEL_KWARGS["embed_dim"]
    patch_inputs = MODEL_KWARGS["in_chans"] * MODEL_KWARGS["patch_size"] ** 2
    blocks = sum(12 * n * d * d + 2 * n * n * d for n in tokens)
    return (tokens[0] - 1) * patch_inputs * d + blocks + d * MODEL_KWARGS["num_classes"]


def mac_ratio(mask: NDArray[Any]) -> float:
    """Dense multiply-accumulates divided by those of the masked model."""
    dense = [1 + PATCHES] * len(mask)
    return count_macs(dense) / count_macs(tokens_per_block(mask))


@torch.inference_mode()
def predict(
    model: nn.Module, images: NDArray[np.uint8], mask: NDArray[Any] | None = None, batch_size: int = 50
) -> Tensor:
    """Logits for grey images, uint8 [N, 28, 28], by timm's own forward or, if given, under a mask."""
    logits = []
    for start in range(0, len(images), batch_size):
        pixels = preprocess(images[start : start + batch_size])
        logits.append(model(pixels) if mask is None else forward_masked(model, pixels, mask))
    return torch.cat(logits)


def top1(logits: Tensor, labels: NDArray[np.int64]) -> float:
    """Share of images whose highest logit is at their label."""
    return float((logits.argmax(dim=1) == torch.as_tensor(labels)).float().mean())
