"""Triton kernel of vp::gather_norm: each output row is read once, kept in registers, and written twice.

Bandwidth: an H200 moves 4.8 TB/s at about 800 ns of latency, so by Little's law each of 132 SMs needs about
4.8e12 * 800e-9 / 132 = 29 kB in flight. One third of the traffic is reads (one row in, two rows out; half with a
residual) and writes do not stall, so 10 to 15 kB of reads must be in flight per SM. A program is one warp and holds
`rows x D` <= 1536 values (3 kB in bf16): 5 programs per SM are enough, and registers allow three times as many. With
one warp per program both reductions are shuffles, without barriers or shared memory, and the programs of an SM can be
at different stages, some reading while others write.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vp_kernels.launch import Config, Variant, absent, binary_parts, cdiv, each_dtype, launch, triton_type

VALUES = 1536  # per program: the rows take 48 fp32 registers per lane
ONE_WARP = 2048  # widest row held by one warp: 64 registers per lane
WIDTHS = (192, 384, 512, 768, 1024, 1280)  # of the ahead-of-time builds


@triton.jit
def _load(
    x_ptr,
    residual_ptr,
    extra_ptr,
    x_row,
    extra_row,
    inside,
    appended,
    outside,
    START: tl.constexpr,
    PART: tl.constexpr,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
):
    """Load and sum columns START .. START + PART of the program's rows: fp32 [ROWS, PART], zero beyond D.

    Args:
        x_row, extra_row: int64 [ROWS], rows of [B * N, D] and of [B * E, D].
        inside: The row comes from x. appended: it comes from extra. outside: its index is invalid, giving NaN.
    """
    columns = START + tl.arange(0, PART)
    real = (columns < D)[None, :]  # constant true for a full part, so its uses fold away
    at = (x_row * D)[:, None] + columns[None, :]
    values = tl.load(x_ptr + at, mask=inside[:, None] & real, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual_ptr + at, mask=inside[:, None] & real, other=0.0).to(tl.float32)
    if HAS_EXTRA:
        at = (extra_row * D)[:, None] + columns[None, :]
        behind = tl.load(extra_ptr + at, mask=appended[:, None] & real, other=0.0).to(tl.float32)
        values = tl.where(appended[:, None], behind, values)
    return tl.where(outside[:, None], float("nan"), values)


@triton.jit
def _centre(values, mean, START: tl.constexpr, PART: tl.constexpr, D: tl.constexpr):
    """values - mean, zero beyond D so that padding does not count in the variance."""
    centred = values - mean[:, None]
    if START + PART > D:
        columns = START + tl.arange(0, PART)
        centred = tl.where((columns < D)[None, :], centred, 0.0)
    return centred


@triton.jit
def _store(
    kept_ptr,
    normed_ptr,
    weight_ptr,
    bias_ptr,
    values,
    centred,
    scale,
    row,
    live,
    START: tl.constexpr,
    PART: tl.constexpr,
    D: tl.constexpr,
):
    """Write both outputs for these columns."""
    columns = START + tl.arange(0, PART)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    at = (row * D)[:, None] + columns[None, :]
    there = live[:, None] & (columns < D)[None, :]
    tl.store(kept_ptr + at, values.to(kept_ptr.dtype.element_ty), mask=there)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=there)


@triton.jit
def gather_norm_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    extra_ptr,
    kept_ptr,
    normed_ptr,
    rows,
    tokens,
    kept,
    extras,
    eps,
    D: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    INDEX_PER_IMAGE: tl.constexpr,
):
    """Compute ROWS rows of the output, flattened to [B * (K + E), D].

    Args:
        rows: B * (K + E).
        tokens, kept, extras: N, K, E.
        PART_0, PART_1, PART_2: Powers of two that together cover D; 0 for an unused part.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    outputs = kept + extras
    image = row // outputs  # in 32 bits: 64-bit division is slow
    place = row - image * outputs
    row, image = row.to(tl.int64), image.to(tl.int64)

    gathered = live & (place < kept)
    if INDEX_PER_IMAGE:
        index = tl.load(index_ptr + image * kept + place, mask=gathered, other=0)
    else:
        index = tl.load(index_ptr + place, mask=gathered, other=0)
    inside = gathered & (index >= 0) & (index < tokens)
    outside = gathered & ~inside
    appended = live & (place >= kept)
    x_row = image * tokens + index
    extra_row = image * extras + (place - kept)

    values_0 = _load(
        x_ptr, residual_ptr, extra_ptr, x_row, extra_row, inside, appended, outside,
        0, PART_0, D, HAS_RESIDUAL, HAS_EXTRA,
    )  # fmt: skip
    total = tl.sum(values_0, axis=1)
    if PART_1 > 0:
        values_1 = _load(
            x_ptr, residual_ptr, extra_ptr, x_row, extra_row, inside, appended, outside,
            PART_0, PART_1, D, HAS_RESIDUAL, HAS_EXTRA,
        )  # fmt: skip
        total += tl.sum(values_1, axis=1)
    if PART_2 > 0:
        values_2 = _load(
            x_ptr, residual_ptr, extra_ptr, x_row, extra_row, inside, appended, outside,
            PART_0 + PART_1, PART_2, D, HAS_RESIDUAL, HAS_EXTRA,
        )  # fmt: skip
        total += tl.sum(values_2, axis=1)
    mean = total / D

    # The rows are in registers, so compute the variance from centred values: no cancellation.
    centred_0 = _centre(values_0, mean, 0, PART_0, D)
    squares = tl.sum(centred_0 * centred_0, axis=1)
    if PART_1 > 0:
        centred_1 = _centre(values_1, mean, PART_0, PART_1, D)
        squares += tl.sum(centred_1 * centred_1, axis=1)
    if PART_2 > 0:
        centred_2 = _centre(values_2, mean, PART_0 + PART_1, PART_2, D)
        squares += tl.sum(centred_2 * centred_2, axis=1)
    scale = tl.rsqrt(squares / D + tl.full((), eps, tl.float32))

    _store(kept_ptr, normed_ptr, weight_ptr, bias_ptr, values_0, centred_0, scale, row, live, 0, PART_0, D)
    if PART_1 > 0:
        _store(kept_ptr, normed_ptr, weight_ptr, bias_ptr, values_1, centred_1, scale, row, live, PART_0, PART_1, D)
    if PART_2 > 0:
        _store(
            kept_ptr, normed_ptr, weight_ptr, bias_ptr, values_2, centred_2, scale, row, live,
            PART_0 + PART_1, PART_2, D,
        )  # fmt: skip


def config(
    width: int, dtype: str, *, residual: bool = False, extra: bool = False, index_per_image: bool = False
) -> Config:
    """Tile sizes of a launch.

    Args:
        width: D.
        dtype: Of x, "fp32", "fp16" or "bf16".
        residual, extra: Whether these are given.
        index_per_image: index is [B, K].
    """
    # No part is narrower than 32 loads of 16 bytes, one per lane. All parts then have the same layout; 256 and 128
    # columns would differ, and statistics would have to be converted between layouts. Masked lanes move no bytes.
    parts = [*binary_parts(width, 3, smallest=128 if dtype == "fp32" else 256), 0, 0][:3]
    rows = 1
    while 2 * rows * sum(parts) <= VALUES:
        rows *= 2
    constants = {
        "D": width,
        "PART_0": parts[0],
        "PART_1": parts[1],
        "PART_2": parts[2],
        "ROWS": rows,
        "HAS_RESIDUAL": residual,
        "HAS_EXTRA": extra,
        "INDEX_PER_IMAGE": index_per_image,
    }
    return Config(gather_norm_kernel, constants, num_warps=1 if width <= ONE_WARP else 4, num_stages=1)


def launch_gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        x: [B, N, D], contiguous.
        index: int64 [K] or [B, K], contiguous.
        weight, bias: [D].
        eps: Of the LayerNorm.
        residual: [B, N, D], contiguous.
        extra: [B, E, D], contiguous.

    Returns:
        kept and normed, [B, K + E, D].
    """
    batch, tokens, width = x.shape
    kept = index.shape[-1]
    extras = 0 if extra is None else extra.shape[1]
    if extras == 0:
        extra = None
    out = torch.empty((batch, kept + extras, width), dtype=x.dtype, device=x.device)
    normed = torch.empty_like(out)
    if kept + extras == 0:
        return out, normed
    chosen = config(
        width,
        triton_type(x.dtype),
        residual=residual is not None,
        extra=extra is not None,
        index_per_image=index.ndim == 2,
    )
    rows = batch * (kept + extras)
    launch(
        chosen,
        (cdiv(rows, chosen.constants["ROWS"]), 1, 1),
        x,
        index,
        weight,
        bias,
        absent(x) if residual is None else residual,
        absent(x) if extra is None else extra,
        out,
        normed,
        rows,
        tokens,
        kept,
        extras,
        eps,
    )
    return out, normed


def variants() -> Iterator[Variant]:
    """Ahead-of-time builds."""
    for dtype in each_dtype():
        for width in WIDTHS:
            for flags in range(8):
                residual, extra, index_per_image = bool(flags & 1), bool(flags & 2), bool(flags & 4)
                yield _variant(dtype, width, residual, extra, index_per_image)


def _variant(dtype: str, width: int, residual: bool, extra: bool, index_per_image: bool) -> Variant:
    chosen = config(width, dtype, residual=residual, extra=extra, index_per_image=index_per_image)
    tokens = f"*{dtype}"
    name = f"{dtype}_{width}" + "_residual" * residual + "_extra" * extra + "_images" * index_per_image
    signature = {
        "x_ptr": tokens,
        "index_ptr": "*i64",
        "weight_ptr": tokens,
        "bias_ptr": tokens,
        "residual_ptr": tokens,
        "extra_ptr": tokens,
        "kept_ptr": tokens,
        "normed_ptr": tokens,
        "rows": "i32",
        "tokens": "i32",
        "kept": "i32",
        "extras": "i32",
        "eps": "fp32",
    }
    return Variant(
        operator="gather_norm",
        name=name,
        config=chosen,
        signature=signature,
        grid=(f"cdiv(B * (K + E), {chosen.constants['ROWS']})", "1", "1"),
        shapes={"B": (1, 1 << 20), "N": (1, 1024), "K": (0, 1 << 20), "E": (1, 1 << 20) if extra else 0, "D": width},
        dtype=dtype,
        aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*") and kind != "*i64"),
    )
