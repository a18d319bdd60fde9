"""Inductor's code for a reduced model on a fake H200 (fake_cuda.py): launches our kernels, without copies.

AOTInductor lowers through the same code. Its packages are run on a GPU by benchmarks/gpu.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from tests.kernels.support import without_interpreter

SCRIPT = """
import json, sys
import timm, torch
from tests.kernels.fake_cuda import compile_ours, inductor_code, launches, pretend
from vp_exporter.model.describe import describe
from vp_exporter.plan import PlanModel, ReductionPlan
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.reducers import step_from_dict

pretend()
steps, proportional = json.load(sys.stdin)
depth = 1 + max(step["block"] for step in steps)
vit = timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=7).eval()
description = describe(vit, "vit_tiny_patch16_224")
plan = ReductionPlan(
    PlanModel.of(description), tuple(step_from_dict(step) for step in steps), proportional_attention=proportional
)
model = ReducedViT(vit, description, plan).for_export("bf16", kernels="vp")
code = inductor_code(model, torch.zeros(2, 3, 224, 224))
print(json.dumps({"code": code, "launches": launches(code), "compiled": compile_ours(code)}))
"""
MERGING = [
    {"block": 1, "reducer": "static", "keep": list(range(0, 196, 2))},
    {"block": 1, "reducer": "tome", "r": 9},
    {"block": 2, "reducer": "ppt", "r": 9, "tau": 1e-6, "order": "score"},
    {"block": 3, "reducer": "bat", "tokens_out": 60, "clusters": 5, "pairs": 4},
    {"block": 4, "reducer": "diffrate", "prune_to": 55, "merge_to": 50},
    {"block": 5, "reducer": "pitome", "r": 5, "margin": 0.5},
]
DEPTH = 6
PRUNING = [
    {"block": 0, "reducer": "topk", "tokens_out": 150},
    {"block": 1, "reducer": "evit", "tokens_out": 100, "fuse": True},
]


def compiled(steps: list[dict[str, Any]], proportional: bool) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(without_interpreter(SCRIPT, json.dumps([steps, proportional]))[-1])
    return answer


@pytest.fixture(scope="module")
def merging() -> dict[str, Any]:
    return compiled(MERGING, True)


@pytest.fixture(scope="module")
def pruning() -> dict[str, Any]:
    return compiled(PRUNING, False)


@pytest.mark.slow
def test_merging_runs_our_kernels(merging: dict[str, Any]) -> None:
    found = Counter(name for name in merging["launches"] if not name.startswith("triton_"))
    assert found["attention_whole"] == DEPTH
    assert found["match_kernel"] == 2  # tome, ppt
    assert found["merge_rows_kernel"] == 4  # and diffrate, pitome
    assert found["density_merge_kernel"] == 1
    assert found["gather_norm_kernel"] == 1  # the static step
    assert found["sum_partials"] == 3  # the class row over heads: ppt, bat, diffrate
    # Four products per block, the patch embedding, the head; and the similarities of diffrate and pitome.
    assert found["addmm"] + found["mm"] == 4 * DEPTH + 2
    assert found["bmm"] <= 3


@pytest.mark.slow
def test_pruning_runs_our_kernels(pruning: dict[str, Any]) -> None:
    found = Counter(name for name in pruning["launches"] if not name.startswith("triton_"))
    assert found["select_kernel"] == 1
    assert found["select_fuse_kernel"] == 1
    assert found["gather_norm_kernel"] == 2
    assert found["bmm"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["merging", "pruning"])
def test_kernels_compile_as_inductor_wrote_them(model: str, request: pytest.FixtureRequest) -> None:
    answer = request.getfixturevalue(model)
    ours = {name for name in answer["launches"] if "kernel" in name or name in ("attention_whole", "sum_partials")}
    assert {re.sub(r"_\d+$", "", name) for name in answer["compiled"]} == ours


@pytest.mark.slow
@pytest.mark.parametrize("model", ["merging", "pruning"])
def test_nothing_falls_back(model: str, request: pytest.FixtureRequest) -> None:
    code = request.getfixturevalue(model)["code"]
    assert "torch.ops.vp" not in code
    assert ".to('cpu')" not in code


@pytest.mark.slow
@pytest.mark.parametrize("model", ["merging", "pruning"])
def test_nothing_is_copied_for_a_kernel(model: str, request: pytest.FixtureRequest) -> None:
    """A tensor passed to a kernel twice is computed twice, so absent arguments must be separate tensors."""
    code = request.getfixturevalue(model)["code"]
    kernels = re.findall(r"^def (triton_\w+)\(.*?(?=^''')", code, flags=re.MULTILINE | re.DOTALL)
    bodies = re.findall(r"^def triton_\w+\(.*?(?=^''')", code, flags=re.MULTILINE | re.DOTALL)
    assert kernels
    for name, body in zip(kernels, bodies, strict=True):
        stored = re.findall(r"tl\.store\(\w+ \+ (\(.*?\)), (tmp\d+),", body)
        assert len(stored) == len(set(stored)), f"{name} stores one value several times: {stored}"
