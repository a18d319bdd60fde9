"""Generate docs/models.md: every timm Vision Transformer, and whether it is supported.

python -m vp_exporter.model.support_table > docs/models.md
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch
import torch.nn as nn

from vp_exporter.model.describe import describe, refusal
from vp_exporter.model.spec import ModelSpec

# timm's source files of isotropic ViTs: one sequence of tokens from patch embedding to pooling. Pyramids (Swin, Hiera,
# ...) and convolutional networks have no token sequence for a plan, so they are not listed.
FAMILIES = (
    "vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos", "vision_transformer_hybrid",
    "vision_transformer_sam", "naflexvit", "vitamin", "cait", "xcit", "deepseek_vit", "qwen3_vit", "gemma4_vit",
)  # fmt: skip


@dataclass(frozen=True)
class SupportRow:
    """One row of the table.

    Attributes:
        reason: Why the model is not supported, or None.
        pooling: timm's name of it; "-" if there is none.
        prefix: Prefix tokens, in words.
        note: Further note for the user; may be empty.
    """

    name: str
    reason: str | None
    pooling: str
    prefix: str
    note: str = ""


def model_names() -> list[str]:
    """Every architecture of the families in the installed timm, sorted."""
    return sorted({name for family in FAMILIES for name in timm.list_models(module=family)})


def support_rows(names: Iterable[str], *, whole: bool = True) -> list[SupportRow]:
    """Check models without allocating weights.

    Args:
        whole: Create every block; False creates one, which is ten times as fast and sufficient if blocks are alike.
    """
    return [_row(name, _create(name, whole)) for name in names]


def document(rows: Sequence[SupportRow]) -> str:
    """The table in Markdown, preceded by counts of the unsupported models."""
    supported = [row for row in rows if row.reason is None]
    refused = [row for row in rows if row.reason is not None]
    counts = sorted(Counter(row.reason for row in refused).items(), key=lambda item: (-item[1], str(item[0])))
    lines = [
        "# Which timm models can be reduced",
        "",
        f"Generated from timm {timm.__version__} by `python -m vp_exporter.model.support_table > docs/models.md`;",
        "a test holds it to the code. A model of a timm file that is not listed here is refused with the name of its",
        "class.",
        "",
        f"{len(supported)} of {len(rows)} models are supported, with any of their pretrained tags.",
        "",
        *_table(("Refused because", "Models"), [(str(reason), str(count)) for reason, count in counts]),
        "",
        "## Supported",
        "",
        *_table(
            ("Model", "Pooling", "Prefix tokens", "Note"),
            [(f"`{row.name}`", row.pooling, row.prefix, row.note) for row in supported],
        ),
        "",
        "## Refused",
        "",
        *_table(
            ("Model", "Because", "Pooling", "Prefix tokens"),
            [
                (f"`{row.name}`", str(row.reason), row.pooling, row.prefix)
                for reason, _ in counts
                for row in refused
                if row.reason == reason
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _create(name: str, whole: bool) -> nn.Module:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # deprecated names are still listed
        if not whole:
            try:
                model: nn.Module = timm.create_model(name, depth=1)
                return model
            except Exception:
                # Depths per stage or one setting per block: create the whole model.
                return timm.create_model(name)
        return timm.create_model(name)


def _row(name: str, model: nn.Module) -> SupportRow:
    reason = refusal(model)
    if reason is not None:
        return SupportRow(name, reason, str(getattr(model, "global_pool", "") or "-"), _prefix_of(model))
    description = describe(model, name)
    return SupportRow(name, None, description.pool, _prefix(description), _note(description))


def _prefix(description: ModelSpec) -> str:
    return _words(description.class_token, description.distilled, description.register_tokens)


def _prefix_of(model: nn.Module) -> str:
    """Prefix tokens of an unsupported model, as far as its attributes tell."""
    present = [getattr(model, name, None) is not None for name in ("cls_token", "dist_token")]
    total = getattr(model, "num_prefix_tokens", None)
    return _words(present[0], present[1], 0 if total is None else max(0, total - sum(present)))


def _words(class_token: bool, distilled: bool, registers: int) -> str:
    parts = ["class"] if class_token else []
    parts += ["distillation"] if distilled else []
    parts += [f"{registers} register"] if registers else []
    return " + ".join(parts) or "none"


def _note(description: ModelSpec) -> str:
    (height, width), (rows, columns) = description.image_size, description.grid
    size = f"{height} x {width} pixels, {rows} x {columns} patches"
    return size if description.num_classes else f"{size}; no classes: returns features"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def main() -> None:
    """Print the document."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    print(document(support_rows(model_names())), end="")


if __name__ == "__main__":
    main()
