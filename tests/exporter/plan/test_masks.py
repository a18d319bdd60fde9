"""Mask files of every kind, and the round trip mask -> plan -> mask."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vp_exporter.errors import PlanError
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.plan.masks import mask_from_plan, plan_from_mask, read_mask
from vp_exporter.reducers import StaticStep

MODEL = PlanModel("vit_toy", (32, 48), (16, 16), prefix_tokens=2, depth=3, patches=6)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0]])


def write(path: Path, mask: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, mask)
    elif path.suffix == ".npz":
        np.savez(path, mask)
    else:
        save_file({"searched": mask}, path)
    return path


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files_in(tmp_path: Path, suffix: str, dtype: type) -> None:
    read = read_mask(write(tmp_path / f"mask{suffix}", MASK.astype(dtype)))
    assert read.dtype == dtype
    assert np.array_equal(read, MASK.astype(dtype))
    plan = plan_from_mask(read, MODEL, method="search")
    assert plan.steps == (StaticStep(block=1, keep=(0, 2, 3, 5)), StaticStep(block=2, keep=(2, 3)))
    assert (plan.key_bias, plan.method) == ({}, "search")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_array_called_mask_among_others(tmp_path: Path, suffix: str) -> None:
    arrays = {"scores": np.zeros(3), "mask": MASK.astype(np.uint8)}
    path = tmp_path / f"mask{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    assert np.array_equal(read_mask(path), MASK)


def test_scales_become_logits() -> None:
    mask = MASK.astype(np.float64)
    mask[2, 2], mask[2, 3] = 2.0, 0.5
    plan = plan_from_mask(mask, MODEL)
    assert plan.steps == plan_from_mask(MASK, MODEL).steps
    assert set(plan.key_bias) == {2}
    # Two prefix tokens first, without a bias.
    assert plan.key_bias[2] == pytest.approx((0.0, 0.0, math.log(2), -math.log(2)), abs=1e-15)


def test_nothing_dropped_is_no_step() -> None:
    assert plan_from_mask(np.ones((3, 6)), MODEL) == ReductionPlan(MODEL, method="mask")


def test_drop_before_the_first_block() -> None:
    mask = np.ones((3, 6))
    mask[:, 4] = 0
    assert plan_from_mask(mask, MODEL).steps == (StaticStep(block=0, keep=(0, 1, 2, 3, 5)),)


@st.composite
def monotone_masks(draw: st.DrawFn, scales: st.SearchStrategy[float]) -> tuple[PlanModel, np.ndarray]:
    depth, patches = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    leaves = draw(st.lists(st.integers(0, depth), min_size=patches, max_size=patches))
    leaves[draw(st.integers(0, patches - 1))] = depth  # at least one patch stays
    values = draw(st.lists(scales, min_size=depth * patches, max_size=depth * patches))
    alive = np.arange(depth)[:, None] < np.asarray(leaves)[None, :]
    model = PlanModel("vit_toy", (1, patches), (1, 1), draw(st.integers(0, 3)), depth, patches)
    return model, np.where(alive, np.reshape(values, (depth, patches)), 0.0)


@settings(max_examples=150, deadline=None)
@given(case=monotone_masks(st.just(1.0)))
def test_mask_to_plan_and_back(case: tuple[PlanModel, np.ndarray]) -> None:
    model, mask = case
    plan = plan_from_mask(mask, model)
    assert np.array_equal(mask_from_plan(plan), mask)
    for block, row in enumerate(plan.tokens()):
        assert row.positions == tuple(p for p in range(model.patches) if mask[block, p])
        assert row.attention == model.prefix_tokens + int(mask[block].sum())
    through_json = ReductionPlan.loads(plan.dumps())
    assert np.array_equal(mask_from_plan(through_json), mask)


@settings(max_examples=150, deadline=None)
@given(case=monotone_masks(st.just(1.0) | st.floats(1e-6, 1e6)))
def test_scales_to_plan_and_back(case: tuple[PlanModel, np.ndarray]) -> None:
    model, mask = case
    assume((mask == 0).any() or (mask == 1).all())
    back = mask_from_plan(ReductionPlan.loads(plan_from_mask(mask, model).dumps()))
    assert np.array_equal(back > 0, mask > 0)
    np.testing.assert_allclose(back, mask, rtol=1e-12, atol=0)


def test_a_prefix_bias_has_no_mask() -> None:
    plan = ReductionPlan(MODEL, key_bias={1: (0.0, 0.5, *[0.0] * 6)})
    with pytest.raises(PlanError, match="block 1 of the plan has a bias on a prefix token"):
        mask_from_plan(plan)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((3, 8), "leave out the first 2 columns: prefix tokens are always kept"),
        ((6, 3), "transpose it"),
        ((4, 6), "search the mask on this model"),
        ((3, 6, 1), "search the mask on this model"),
        ((), "search the mask on this model"),
        ((0, 6), "search the mask on this model"),
    ],
    ids=["prefix", "transposed", "depth", "three-axes", "scalar", "empty"],
)
def test_wrong_shapes(shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_from_mask(np.ones(shape), MODEL)
    assert caught.value.found == f"the mask has shape {list(shape)}"
    assert caught.value.expected == "[3, 6]: 3 blocks by 6 patches of vit_toy"
    assert caught.value.fix == hint


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
@pytest.mark.parametrize("scaled", [False, True])
def test_one_row_stands_for_every_block(shape: tuple[int, ...], scaled: bool) -> None:
    row = np.array([1, 0, 0.5 if scaled else 1, 1, 0, 1])
    plan = plan_from_mask(row.reshape(shape), MODEL)
    assert plan.steps == (StaticStep(block=0, keep=(0, 2, 3, 5)),)
    np.testing.assert_array_equal(mask_from_plan(plan), np.tile(row, (3, 1)))


@pytest.mark.parametrize("shape", [(3, 6), (6,)])
def test_scores_are_no_mask(shape: tuple[int, ...]) -> None:
    scores = np.linspace(0.05, 0.9, 18, dtype=np.float32)[: math.prod(shape)].reshape(shape)
    with pytest.raises(
        PlanError, match=r"drops nothing: its values lie between 0.05 and 0\.\d+; .*write 1 for the patches"
    ):
        plan_from_mask(scores, MODEL)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_whole_numbers_scale_nothing(dtype: type) -> None:
    """255 instead of 1, as in mask images, would mean a scale of 255 relative to the class token."""
    with pytest.raises(
        PlanError, match=r"whole numbers up to 255; expected 0 to drop and 1 to keep; save \(mask > 0\)"
    ):
        plan_from_mask((MASK * 255).astype(dtype), MODEL)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    mask = MASK.astype(np.float32)
    mask[1, 3] = value
    with pytest.raises(PlanError, match=rf"the mask holds {value} at block 1, patch 3; expected finite numbers"):
        plan_from_mask(mask, MODEL)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_negative(dtype: type) -> None:
    mask = MASK.astype(dtype)
    mask[2, 3] = -1
    with pytest.raises(PlanError, match=r"holds -1(\.0)? at block 2, patch 3; expected 0 to drop, 1 to keep"):
        plan_from_mask(mask, MODEL)


@pytest.mark.parametrize("dtype", [np.complex64, "U1", "M8[s]"])
def test_other_dtypes(dtype: Any) -> None:
    with pytest.raises(PlanError, match=r"the mask has dtype .*; expected booleans, whole or floating-point"):
        plan_from_mask(MASK.astype("i8").astype(dtype), MODEL)


def test_all_zero_row() -> None:
    mask = MASK.copy()
    mask[2] = 0
    with pytest.raises(PlanError, match="row 2 of the mask drops every patch; expected at least one patch kept"):
        plan_from_mask(mask, MODEL)


@pytest.mark.parametrize(
    ("positions", "says"),
    [([4], r"patch 4 comes back at block 2 of the mask after"), ([1, 4], r"patch 1 .* \(and 1 more\)")],
)
def test_revival(positions: list[int], says: str) -> None:
    mask = MASK.copy()
    mask[2, positions] = 1
    with pytest.raises(PlanError, match=says + ".*keep it in the earlier rows too, or drop it here"):
        plan_from_mask(mask, MODEL)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["npy-objects", "npy-pickle", "npz-objects"])
def test_pickles_are_not_opened(tmp_path: Path, kind: str) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / ("mask.npz" if kind == "npz-objects" else "mask.npy")
    objects = np.array([Payload(ran)], dtype=object)
    if kind == "npy-objects":
        np.save(path, objects, allow_pickle=True)
    elif kind == "npz-objects":
        np.savez(path, mask=objects, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(PlanError, match=r"cannot read the mask .*without pickles") as caught:
        read_mask(path)
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    if kind == "npy-pickle":
        pickle.loads(path.read_bytes())  # the payload works, so it was not run before
        assert ran.exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_arrays(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mask{suffix}"
    arrays = {"b": MASK.astype(np.uint8), "a": MASK.astype(np.uint8)}
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    with pytest.raises(PlanError, match=r"holds \['a', 'b'\]; expected one array, or one called 'mask'"):
        read_mask(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_no_array(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mask{suffix}"
    if suffix == ".npz":
        np.savez(path)
    else:
        save_file({}, path)
    with pytest.raises(PlanError, match="holds no array; expected one array"):
        read_mask(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PlanError, match=rf"there is no mask file .*mask\{suffix}"):
        read_mask(tmp_path / f"mask{suffix}")


@pytest.mark.parametrize("name", ["mask.csv", "mask", "mask.NPY"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("1,0")
    with pytest.raises(PlanError, match=r"ends in '.*'; expected \.npy or \.npz or \.safetensors"):
        read_mask(tmp_path / name)


@pytest.mark.parametrize("size", [0, 5, -30])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_truncated_file(tmp_path: Path, suffix: str, size: int) -> None:
    path = write(tmp_path / f"mask{suffix}", MASK)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PlanError, match="cannot read the mask"):
        read_mask(path)
