"""Checks for a reducer with a test file of its own:

    def test_norm(tmp_path: Path) -> None:
        check_reducer("norm", {"tokens_out": 33}, oracle, tmp_path)

The reducers in `cases.py` have further tests, also in combination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.exporter.reducers import oracle_model
from tests.exporter.reducers.cases import as_statistics, as_stream, rough_image
from tests.exporter.reducers.oracles import ORACLES, Result
from tests.exporter.reducers.test_export import agrees, images_of, lower, make
from tests.exporter.reducers.test_parity import CLEAR, check_step
from vp_exporter.methods import METHODS
from vp_exporter.reducers import REDUCERS, InnerStep, Tokens, step_from_dict
from vp_exporter.reducers.stream import reduce_tokens

GRID = (8, 8)
PREFIX = 1


def check_reducer(name: str, fields: Mapping[str, Any], oracle: Callable[..., Result], folder: Path) -> None:
    """Check a reducer.

    The step parses its own fields, returns the stated number of tokens, chooses as its oracle does for each image,
    alone and in a whole model, and runs on ONNX Runtime; and there is a method for it.

    Args:
        name: Name of the reducer.
        fields: Its fields, for 1 prefix token and 8 x 8 patches.
        oracle: Reference in float64 for one image (see `oracles.py`).
        folder: Empty folder for the engine.
    """
    ORACLES[name] = oracle
    if REDUCERS[name].merges:  # type: ignore[attr-defined]
        oracle_model.MERGING.add(name)
    assert name in METHODS
    entry = {"block": 0, "reducer": name, **fields}
    step = step_from_dict(entry)
    assert isinstance(step, InnerStep)
    assert step_from_dict({"block": 0, "reducer": name, **step.fields()}) == step

    rng = np.random.default_rng(0)
    images = [rough_image(PREFIX, GRID, rng, sized=False) for _ in range(8)]
    assert check_step(step, images, sized=False, shared=False, clear=CLEAR) <= 1
    stream = as_stream(images, sized=False)
    out = reduce_tokens(stream, step.choose(stream, as_statistics(images)), carry_size=step.carries_size)
    assert out.x.shape[1] == step.apply(Tokens(PREFIX, stream.patches, None)).total
    assert torch.equal(out.x[:, :PREFIX], stream.x[:, :PREFIX])

    model = make([(name, dict(fields))])
    skipped = 0
    for image, mine in zip(images_of(4), model.reduced(images_of(4)), strict=True):
        margins: list[float] = []
        _, logits = oracle_model.run(model.vit, model.description, model.plan, image, margins)
        if min(margins) < CLEAR:
            skipped += 1
            continue
        torch.testing.assert_close(mine.double(), logits, atol=1e-4, rtol=1e-5)
    assert skipped <= 1
    engine = folder / "engine"
    engine.mkdir()
    agrees(model, "ort", lower(model, "ort", folder), engine)
