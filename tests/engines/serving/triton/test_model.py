"""Batching in the Python backend's model, without a server."""

from __future__ import annotations

import numpy as np
import pytest

from vp_engines.serving.triton import model


class FakeEngine:
    """Records the batches that it receives; returns each image's first value."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(images))
        return {"logits": images[:, 0, 0, :1].copy()}


def parts(*sizes: int) -> list[np.ndarray]:
    numbers = iter(range(1000))
    return [np.stack([np.full((3, 2, 2), next(numbers), np.float32) for _ in range(size)]) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "most", "batches"),
    [((1,), 4, [1]), ((1, 2, 1), 4, [4]), ((1, 2, 2), 4, [3, 2]), ((4, 4, 1, 3), 4, [4, 4, 4]), ((), 4, [])],
)
def test_requests_are_run_in_as_few_batches_as_their_order_allows(
    sizes: tuple[int, ...], most: int, batches: list[int]
) -> None:
    engine, given = FakeEngine(), parts(*sizes)
    answers = model._run(engine, given, most)  # type: ignore[arg-type]
    assert engine.sizes == batches
    assert [answer["logits"][:, 0].tolist() for answer in answers] == [part[:, 0, 0, 0].tolist() for part in given]
    assert all(answer["logits"].flags.c_contiguous for answer in answers)
