"""CutMix augmentation of calibration images (Yun et al. 2019).

A search usually has only training images, on which the model is so confident that hardly any plan changes its output,
so the loss of a plan on them says little about new images. Pasting part of one photograph into another moves the model
closer to its decision boundaries, as new and hard images do.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

AUGMENTS = ("cutmix", "none")
SHARES = (0.3, 0.5)  # of the area covered by the second image; the first keeps the larger part


def cutmix(images: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Paste a rectangle from another image of the batch into every second image, at the same position.

    The rectangle has the image's aspect ratio, an area drawn uniformly from SHARES and a uniform position. Sources are
    unaltered (even-numbered) images, so no image contains parts of three.

    Args:
        images: [b, 3, H, W]; not modified.
        seed: Seed of the random choices.

    Returns:
        [b, 3, H, W]; images 0, 2, 4, ... are unchanged, as is a single image.
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
