"""Convert masks [depth, patches], as found by a search, to plans of static steps.

Row b selects the patches that enter block b: 1 keeps, 0 drops, any other positive value keeps and scales (a tuned
mask), which becomes the additive attention logit log(scale) of that key (softmax(logit + log s) is the s-weighted
softmax). A single row, [patches] or [1, patches], applies to every block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vp_exporter.errors import PlanError
from vp_exporter.plan.plan import PlanModel, ReductionPlan
from vp_exporter.reducers import StaticStep

SUFFIXES = (".npy", ".npz", ".safetensors")


def read_mask(path: Path) -> np.ndarray:
    """Read a mask file: .npy, or .npz / .safetensors with one array (or one called "mask").

    Raises:
        PlanError: if it has another suffix, is unreadable, or has pickled objects or several arrays.
    """
    check_suffix(path)
    if not path.is_file():
        raise PlanError(f"there is no mask file {path}", expected="a file", fix="check the path")
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            from safetensors.numpy import load_file

            arrays = load_file(path)
    except Exception as error:  # numpy, zipfile and safetensors raise different types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"cannot read the mask {path}: {reason}", expected=f"a {path.suffix} array of numbers without pickles"
        ) from error
    if "mask" in arrays:
        return np.asarray(arrays["mask"])
    if len(arrays) != 1:
        raise PlanError(
            f"the mask file {path} holds {sorted(arrays) or 'no array'}", expected="one array, or one called 'mask'"
        )
    return np.asarray(next(iter(arrays.values())))


def check_suffix(path: Path) -> None:
    """Check that a file's suffix is that of a mask.

    Raises:
        PlanError: naming the suffixes of masks.
    """
    if path.suffix not in SUFFIXES:
        raise PlanError(f"the mask file {path} ends in {path.suffix!r}", expected=" or ".join(SUFFIXES))


def plan_from_mask(mask: np.ndarray, model: PlanModel, *, method: str = "mask") -> ReductionPlan:
    """Convert a mask to a plan.

    Args:
        mask: [depth, patches], or a single row [patches] or [1, patches] for all blocks.

    Raises:
        PlanError: if the mask has a wrong shape or dtype, NaN, a negative value, integers other than 0 and 1, scores
            instead of a mask (nothing is dropped), an empty row, or a patch that returns after being dropped.
    """
    if mask.shape in {(model.patches,), (1, model.patches)}:
        mask = np.broadcast_to(mask, (model.depth, model.patches))
    _check(mask, model)
    values = mask.astype(np.float64)
    kept = values > 0
    steps, bias = [], {}
    before = np.ones(model.patches, dtype=bool)
    for block in range(model.depth):
        if not kept[block].any():
            raise PlanError(f"row {block} of the mask drops every patch", expected="at least one patch kept")
        revived = np.flatnonzero(kept[block] & ~before)
        if revived.size:
            raise PlanError(
                f"patch {revived[0]} comes back at block {block} of the mask after it was dropped"
                + (f" (and {revived.size - 1} more)" if revived.size > 1 else ""),
                expected="a patch that has left to stay away: row b says which patches enter block b",
                fix="keep it in the earlier rows too, or drop it here",
            )
        if not np.array_equal(kept[block], before):
            steps.append(StaticStep(block=block, keep=tuple(np.flatnonzero(kept[block]).tolist())))
        scales = values[block, kept[block]]
        if np.any(scales != 1.0):
            bias[block] = (0.0,) * model.prefix_tokens + tuple(np.log(scales).tolist())
        before = kept[block]
    return ReductionPlan(model=model, steps=tuple(steps), method=method, key_bias=bias)


def mask_from_plan(plan: ReductionPlan) -> np.ndarray:
    """Mask [depth, patches] (float64) of a plan with static steps only; the inverse of `plan_from_mask`.

    Raises:
        PlanError: if a step chooses per image, or a prefix token has a bias, which a mask cannot represent.
    """
    mask = np.zeros((plan.model.depth, plan.model.patches))
    prefix = plan.prefix_tokens
    for block, row in enumerate(plan.tokens()):
        if row.positions is None:
            raise PlanError(f"block {block} of the plan chooses patches by image", expected="static steps only")
        bias = plan.key_bias.get(block)
        if bias is not None and any(bias[:prefix]):
            raise PlanError(f"block {block} of the plan has a bias on a prefix token", expected="patch biases only")
        mask[block, list(row.positions)] = 1.0 if bias is None else np.exp(bias[prefix:])
    return mask


def _check(mask: np.ndarray, model: PlanModel) -> None:
    want = (model.depth, model.patches)
    if mask.shape != want:
        hint = "search the mask on this model"
        if mask.shape == (model.depth, model.patches + model.prefix_tokens):
            hint = f"leave out the first {model.prefix_tokens} columns: prefix tokens are always kept"
        elif mask.shape == want[::-1]:
            hint = "transpose it"
        raise PlanError(
            f"the mask has shape {list(mask.shape)}",
            expected=f"{list(want)}: {model.depth} blocks by {model.patches} patches of {model.name}",
            fix=hint,
        )
    if mask.dtype.kind not in "buif":
        raise PlanError(f"the mask has dtype {mask.dtype}", expected="booleans, whole or floating-point numbers")
    if not np.isfinite(mask.astype(np.float64)).all():
        block, patch = np.argwhere(~np.isfinite(mask.astype(np.float64)))[0]
        raise PlanError(
            f"the mask holds {mask[block, patch]} at block {block}, patch {patch}", expected="finite numbers"
        )
    if (mask < 0).any():
        block, patch = np.argwhere(mask < 0)[0]
        raise PlanError(
            f"the mask holds {mask[block, patch]} at block {block}, patch {patch}",
            expected="0 to drop, 1 to keep, another positive value to scale",
        )
    kept = mask[mask > 0]
    if mask.dtype.kind in "ui" and (kept != 1).any():
        raise PlanError(
            f"the mask holds whole numbers up to {kept.max()}",
            expected="0 to drop and 1 to keep",
            fix="save (mask > 0) if the others mean keep; scales of a tuned mask are floating-point numbers",
        )
    if kept.size == mask.size and (kept != 1).any():
        raise PlanError(
            f"the mask drops nothing: its values lie between {kept.min():.3g} and {kept.max():.3g}",
            expected="0 where a patch is dropped",
            fix="if they are scores, write 1 for the patches to keep and 0 for the others",
        )
