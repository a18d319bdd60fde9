"""Calibration images that the model was not trained on: parts of two photographs in one (CutMix, Yun et al. 2019).

A search mostly has the training images, and a model that has seen them answers so surely that hardly any plan moves its
answer: a plan's loss on them says little of its loss on new images. Half of one photograph in another brings the model
between its classes, where new and hard images put it too.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

AUGMENTS = ("cutmix", "none")
SHARES = (0.3, 0.5)  # of the area that the second image covers: the first one stays the larger


def cutmix(images: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Every second image of a batch gets a rectangle of another image of the batch, at the same place.

    The rectangle has the image's aspect ratio, an area drawn uniformly from SHARES and a place drawn uniformly. What is
    pasted comes from an unaltered image (of even number), so no image holds three.

    Args:
        images: [b, 3, H, W]; not changed.
        seed: of what is drawn.

    Returns:
        [b, 3, H, W]: images 0, 2, 4, ... as they were; with one image alone, it.
    """
    rng, mixed = np.random.default_rng(seed), images.clone()
    height, width = images.shape[2:]
    for i in range(1, len(images), 2):
        side = float(np.sqrt(rng.uniform(*SHARES)))
        h, w = max(1, round(side * height)), max(1, round(side * width))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        other = 2 * int(rng.integers(0, (len(images) + 1) // 2))
        mixed[i, :, top : top + h, left : left + w] = images[other, :, top : top + h, left : left + w]
    return mixed
