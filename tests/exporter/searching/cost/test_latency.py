"""Latency tables: measuring on ONNX Runtime, interpolation, storage, and invalid tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.exporter.tiny import tiny_vit
from vp_engines.backends.base import Runner, TensorSpec
from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.cost.latency import LatencyTable, latency_costs, timed_model
from vp_exporter.searching.cost.measured_latency import _cut, _plan, _rounds, default_counts, measure_table
from vp_exporter.searching.mask.budget import search_lifetimes

VIT, DESCRIPTION = tiny_vit()  # 16 patches and a class token, 4 blocks


def some_table(description: ModelSpec = DESCRIPTION, **changes: Any) -> LatencyTable:
    """A table made by hand; 9 tokens take longer than 13, as happens on real engines."""
    table = LatencyTable(
        "ort", "fp32", "cpu", 8, None, timed_model(description), (5, 9, 13, 17), (1.0, 2.5, 2.0, 4.0),
        (0.5, 0.7, 0.6, 1.0), 20, {"engine": "ort 1", "cores": 2},
    )  # fmt: skip
    return replace(table, **changes)


def naive(tokens: float, table: LatencyTable, values: tuple[float, ...]) -> float:
    """Linear interpolation."""
    for (a, left), (b, right) in zip(
        list(zip(table.tokens, values, strict=True))[:-1], list(zip(table.tokens, values, strict=True))[1:], strict=True
    ):
        if a <= tokens <= b:
            return left + (right - left) * (tokens - a) / (b - a)
    raise AssertionError(tokens)


@pytest.fixture(scope="module")
def measured() -> LatencyTable:
    return measure_table(VIT, DESCRIPTION, engine="ort", batch=16, counts=[4, 4], seconds=0.4, threads=1)


@pytest.mark.slow
def test_a_measured_table(measured: LatencyTable) -> None:
    """Times are noise at this size: only check that they are times, of the requested counts."""
    assert measured.tokens == (5, 17)  # without duplicates, with the class token, and the dense count
    assert all(0 < value < 1000 for value in measured.milliseconds)
    assert all(0 <= value < 1000 for value in measured.overhead_ms)
    assert (measured.engine, measured.precision, measured.device) == ("ort", "fp32", "cpu")
    assert (measured.batch, measured.threads) == (16, 1)
    assert measured.repeats >= 20
    assert measured.model == timed_model(DESCRIPTION)
    assert measured.environment["engine"].startswith("ort 1.")
    assert measured.environment["threads"] == 1
    assert LatencyTable.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert len(VIT.blocks) == DESCRIPTION.depth  # the model itself was not modified


@pytest.mark.slow
def test_a_search_by_a_measured_table(measured: LatencyTable) -> None:
    # Fixed times: the search must be able to gain, whatever the noise.
    table = replace(measured, milliseconds=(1.0, 3.4), overhead_ms=(0.1, 0.1))
    costs = latency_costs(table, DESCRIPTION)
    importance = np.random.default_rng(0).random((4, 16))
    found = search_lifetimes(importance, costs, 0.6 * costs.dense, min_tokens=1)
    assert min(found.counts) >= 4  # smaller counts were not measured
    assert found.cost == pytest.approx(table.predicted_ms([n + 1 for n in found.counts]))
    assert found.cost <= 0.6 * costs.dense


@pytest.mark.parametrize("kind", ["class-token", "eva"])
def test_cut_models(kind: str) -> None:
    """The first three blocks of a deep model; copies for a shallow one, as shared weights would stay in the cache."""
    vit, description = tiny_vit(kind)
    images = torch.randn(2, 3, *description.image_size)
    three, about = _cut(vit, description, 3)
    assert (about.depth, len(vit.blocks)) == (3, 4)
    count = 5
    model, dense = ReducedViT(three, about, _plan(about, count)), ReducedViT(three, about, _plan(about, about.patches))
    with torch.no_grad():
        assert [x.shape[1] for x in model.block_tokens(images)] == [description.prefix_tokens + count] * 3
        whole = ReducedViT(vit, description).block_tokens(images)
        for mine, theirs in zip(dense.block_tokens(images), whole[:3], strict=True):
            torch.testing.assert_close(mine, theirs)
    vit.blocks = vit.blocks[:1]
    copies, _ = _cut(vit, replace(description, blocks=description.blocks[:1]), 3)
    weights = [block.attn.proj.weight for block in copies.blocks]
    assert len({weight.data_ptr() for weight in weights}) == 3
    assert all(torch.equal(weight, weights[0]) for weight in weights)


@given(st.floats(5, 17))
def test_reads_between_the_counts(tokens: float) -> None:
    table = some_table()
    assert table.block_ms(tokens) == pytest.approx(naive(tokens, table, table.milliseconds))
    assert table.overhead_at(tokens) == pytest.approx(naive(tokens, table, table.overhead_ms))


def test_refuses_outside_of_the_counts() -> None:
    table = some_table()
    for tokens in (4, 4.99, 17.01, 18, float("nan")):
        with pytest.raises(SearchError, match=r"outside .* expected 5 to 17"):
            table.block_ms(tokens)
    assert [table.block_ms(n) for n in table.tokens] == list(table.milliseconds)


def test_predicts_a_plan_and_costs_agree() -> None:
    table = some_table()
    assert table.predicted_ms([17, 13, 9, 7]) == pytest.approx(1.0 + 4.0 + 2.0 + 2.5 + 1.75)
    with pytest.raises(SearchError, match="expected 4"):
        table.predicted_ms([17, 13])
    costs = latency_costs(table, DESCRIPTION)
    assert costs.unit == "ms"
    assert costs.total([16, 12, 8, 6]) == pytest.approx(table.predicted_ms([17, 13, 9, 7]))
    assert np.isinf(costs.blocks[:, :4]).all()
    assert np.isfinite(costs.blocks[:, 4:]).all()
    short = some_table(tokens=(5, 9, 13, 16))
    with pytest.raises(SearchError, match="17 tokens are outside"):
        latency_costs(short, DESCRIPTION)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"embed_dim": 32}, "embed_dim"), ({"num_heads": 2}, "num_heads"), ({"grid": (4, 5)}, "patches")],
)
def test_belongs_to_a_model(change: dict[str, Any], name: str) -> None:
    some_table().check_model(DESCRIPTION)
    with pytest.raises(SearchError, match=f"the latency table has {name}"):
        latency_costs(some_table(), replace(DESCRIPTION, **change))
    with pytest.raises(SearchError, match="has depth 4"):
        some_table().check_model(replace(DESCRIPTION, blocks=DESCRIPTION.blocks[:3]))
    narrow = replace(DESCRIPTION.blocks[0], mlp_linear=64)
    with pytest.raises(SearchError, match="block_macs"):
        some_table().check_model(replace(DESCRIPTION, blocks=(narrow,) * 4))
    with pytest.raises(SearchError, match="differ in width"):
        timed_model(replace(DESCRIPTION, blocks=(narrow, *DESCRIPTION.blocks[1:])))


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for table in (some_table(), some_table(threads=2)):
        table.save(path)
        assert LatencyTable.load(path) == table
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]
    with pytest.raises(SearchError, match="cannot write"):
        some_table().save(path / "table.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "vp-plan"}, "no latency table"),
        ({"version": 2}, "version 2.*upgrade"),
        ({"version": True}, "version True"),
        ({"more": 1}, "unknown field 'more'"),
        ({"tokens": None}, "tokens of the latency table is None"),
        ({"tokens": [5, 13, 9, 17]}, "ascending"),
        ({"tokens": [0, 9, 13, 17]}, "prefix tokens"),
        ({"tokens": []}, "tokens of the latency table"),
        ({"tokens": [5.0, 9, 13, 17]}, "tokens of the latency table"),
        ({"milliseconds": [1.0, 2.0, 3.0]}, "4 finite times above 0"),
        ({"milliseconds": [1.0, 2.0, 3.0, 0.0]}, "4 finite times above 0"),
        ({"milliseconds": [1.0, 2.0, 3.0, float("nan")]}, "4 finite times above 0"),
        ({"milliseconds": [1.0, 2.0, 3.0, "4"]}, "4 finite times above 0"),
        ({"overhead_ms": [1.0, 2.0, 3.0, -1.0]}, "4 finite times from 0"),
        ({"overhead_ms": 1.0}, "a list of numbers"),
        ({"batch": 0}, "batch of the latency table is 0"),
        ({"repeats": 1.5}, "repeats"),
        ({"threads": 0}, "threads"),
        ({"engine": None}, "engine"),
        ({"environment": []}, "environment"),
        ({"model": 3}, "model of the latency table is 3"),
        ({"model": {"embed_dim": 64}}, "lacks block_macs"),
    ],
)
def test_malformed_tables(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**some_table().to_dict(), **change}))
    with pytest.raises(SearchError, match=message):
        LatencyTable.load(path)


def test_malformed_files(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(SearchError, match="cannot read"):
        LatencyTable.load(path)
    for text in ("", "{", "\xff\xfe"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(SearchError, match="not JSON"):
            LatencyTable.load(path)
    path.write_text("[]")
    with pytest.raises(SearchError, match="no latency table"):
        LatencyTable.load(path)
    data = some_table().to_dict()
    del data["batch"]
    with pytest.raises(SearchError, match="lacks batch"):
        LatencyTable.from_dict(data)


@given(st.integers(1, 1500))
def test_default_counts(patches: int) -> None:
    counts = default_counts(patches)
    assert list(counts) == sorted(set(counts))
    assert counts[-1] == patches
    assert 1 <= counts[0] <= 8
    assert len(counts) <= 13
    if patches >= 48:
        assert all(n % 8 == 0 for n in counts[:-1])
        assert max(np.diff(counts)) <= patches / 11 + 8


def test_bad_requests() -> None:
    for counts in ([0], [17], [-3, 4]):
        with pytest.raises(SearchError, match="expected 1 to 16"):
            measure_table(VIT, DESCRIPTION, counts=counts)
    with pytest.raises(SearchError, match="a batch of 0"):
        measure_table(VIT, DESCRIPTION, batch=0)


def test_a_timed_engine_that_answers_nan_is_refused() -> None:
    class Answers(Runner):
        def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return {"logits": np.where(np.arange(len(images)) == 1, np.nan, 0.0)[:, None]}

    images = np.zeros((2, 3, 4, 4), dtype=np.float32)
    with pytest.raises(SearchError, match=r"NaN or infinite outputs; .*`precision`"):
        _rounds([Answers((TensorSpec("images", "float32", ("batch", 3, 4, 4)),), ())], images, 0.01)
