"""CutMix of calibration batches: pasted rectangles, their sources, and reproducibility."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.exporter.searching.test_calibration import folder, load
from vp_exporter.data.augment import SHARES, cutmix
from vp_exporter.errors import SearchError

__all__ = ["folder"]


@pytest.mark.parametrize(("count", "size"), [(8, (32, 32)), (5, (24, 40)), (1, (16, 16)), (2, (1, 1))])
def test_every_second_image_gets_a_rectangle_of_an_unaltered_one(count: int, size: tuple[int, int]) -> None:
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, *size).contiguous()
    before = images.clone()
    mixed = cutmix(images, (3, 1))
    assert torch.equal(images, before)
    for i, image in enumerate(mixed):
        if i % 2 == 0:
            assert torch.equal(image, images[i])
            continue
        strange = image[0] != i
        found = {int(value) for value in image[0][strange].unique()}
        assert len(found) == 1
        assert found.pop() % 2 == 0
        rows, columns = strange.any(dim=1).nonzero(), strange.any(dim=0).nonzero()
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert int(strange.sum()) == height * width, "it is no rectangle"
        if size != (1, 1):
            low, high = (share**0.5 for share in SHARES)
            assert low * size[0] - 1 <= height <= high * size[0] + 1
            assert low * size[1] - 1 <= width <= high * size[1] + 1
        assert torch.equal(image[0] != i, image[2] != i)


def test_the_seed_decides() -> None:
    images = torch.randn(16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cutmix(images, (1, 2)), cutmix(images, (1, 2)))
    assert not torch.equal(cutmix(images, (1, 2)), cutmix(images, (1, 3)))
    assert not torch.equal(cutmix(images, (1, 2)), cutmix(images, (2, 2)))


def test_calibration_cuts_images_unless_told_not_to(folder: Path) -> None:
    plain, _ = load(folder, augment="none")
    mixed, _ = load(folder)
    for batch in (*plain.search, *plain.held):
        assert torch.equal(mixed.images(batch)[::2], plain.images(batch)[::2])
        assert torch.equal(mixed.images(batch), cutmix(plain.images(batch), (0, batch)))
        assert (mixed.dense(batch)[1::2] != plain.dense(batch)[1::2]).any()
        assert torch.equal(mixed.labels(batch), plain.labels(batch))
    with pytest.raises(SearchError, match="`augment` is 'mixup'; expected cutmix or none"):
        load(folder, augment="mixup")
