"""The kernel checks detect faults injected on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import checks
from benchmarks.gpu.cases import Case, cases

Kernel = Callable[..., Any]
SELECT = Case("select", "select", (17,), {})
ROWS = Case("merge_rows", "merge_rows", (17,), {"dtype": "bf16", "D": 32, "weights": "both"})
MATCH = Case("match_merge", "match_merge", (17,), {"dtype": "bf16", "mode": "scores"}, decides=True)


def check(case: Case, batches: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
    return checks.check(case, "cpu", batches)


def planted(
    monkeypatch: pytest.MonkeyPatch, case: Case, spoil: Callable[[Any, tuple[Any, ...]], Any]
) -> dict[str, Any]:
    """Check a case with a corrupted kernel result."""
    real = checks.kernel_of(case)
    monkeypatch.setattr(checks, "kernel_of", lambda case: lambda *args: spoil(real(*args), args))
    return check(case)


def test_every_operator_is_good_on_a_cpu() -> None:
    seen = set()
    for case in cases((2, 17), quick=False):
        if case.operator not in seen and 17 in case.tokens:
            seen.add(case.operator)
            found = check(case)
            assert found["failed"] == 0, found["failures"]
            assert found["compared"] > 0
    assert seen == {
        "attention", "gather_norm", "merge_rows", "select", "select_fuse", "match_merge", "density_merge"
    }  # fmt: skip


def test_wrong_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, SELECT, lambda index, args: index.flip(1))
    assert found["failed"] > 0
    assert "images have other indices" in found["failures"][0]["what"]
    assert found["failures"][0]["call"].startswith("B=1 n=17 k=")


def test_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, ROWS, lambda out, args: (out[0] * 1.1, out[1]))
    assert found["failed"] == found["compared"]
    assert "output 0: error" in found["failures"][0]["what"]


def test_wrong_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, ROWS, lambda out, args: (out[0].float(), out[1]))
    assert "dtype torch.float32, expected torch.bfloat16" in found["failures"][0]["what"]


def test_two_runs_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(10_000))
    found = planted(monkeypatch, ROWS, lambda out, args: (out[0], out[1] + next(count) * 1e-7))
    assert "differ in bits" in found["failures"][0]["what"]


def test_an_element_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(out: tuple[Tensor, Tensor], args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        mass = torch.empty_like(out[1])
        mass[:, 1:] = out[1][:, 1:]
        return out[0], mass

    found = planted(monkeypatch, ROWS, forget)
    assert found["failed"] == found["compared"]


def test_an_argument_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scribble(out: Any, args: tuple[Any, ...]) -> Any:
        args[0].add_(1.0)
        return out

    assert "changed an argument" in planted(monkeypatch, ROWS, scribble)["failures"][0]["what"]


def test_an_exception_is_a_failure_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResourcesError(Exception):
        """Like Triton's, not a RuntimeError."""

    def refuse(out: Any, args: tuple[Any, ...]) -> Any:
        if args[0].shape[0] == 3:
            raise OutOfResourcesError("shared memory, Required: 300000")
        return out

    found = planted(monkeypatch, SELECT, refuse)
    assert 0 < found["failed"] < found["failed"] + found["compared"]
    assert "shared memory" in found["failures"][0]["what"]


def test_a_wrong_choice_is_no_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging into the wrong partner changes one row of one image and must not be excused."""
    assert check(MATCH)["failed"] == 0

    def swap(out: tuple[Tensor, Tensor], args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        x = out[0].clone()
        x[-1, -1] = x[-1, -2]
        return x, out[1]

    found = planted(monkeypatch, MATCH, swap)
    assert found["failed"] == found["compared"]


def test_a_near_tie_is_excused_and_too_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partners that differ by less than rounding: either result is right, but a case of nothing else proves nothing."""
    real = gpu_cases.calls

    def tied(case: Case, device: str, batches: Any) -> Any:
        for call in real(case, device, batches):
            x, metric, *rest = call.arguments
            metric = metric.float().clone()
            noise = torch.randn(metric.shape, generator=torch.Generator().manual_seed(0))
            metric[...] = 1.0 + 1e-8 * noise  # every similarity is 1, up to rounding
            yield gpu_cases.Call(call.what, (x, metric, *rest), (1,))

    monkeypatch.setattr(checks, "calls", tied)
    found = check(Case("match_merge", "match_merge", (17,), {"dtype": "fp32", "mode": "plain"}, decides=True))
    assert found["excused"] > checks.MOST_EXCUSED * found["images"]
    assert "near-ties: nothing is checked" in found["failures"][-1]["what"]


def test_separated_metrics_have_few_near_ties() -> None:
    found = check(Case("match_merge", "match_merge", (64,), {"dtype": "bf16", "mode": "plain"}, decides=True), (3,))
    assert found["failed"] == 0
    assert found["excused"] <= 0.1 * found["images"]


def test_keys_are_unique_and_all_sizes_are_there() -> None:
    for quick in (False, True):
        rows = checks.rows(quick=quick)
        assert len({row.key for row in rows}) == len(rows)
        assert all(row.seconds > 0 for row in rows)
    for operator in ("attention", "gather_norm", "select", "select_fuse", "merge_rows"):
        sizes = {n for case in cases() if case.operator == operator for n in case.tokens}
        assert sizes == set(gpu_cases.TOKENS), operator


def test_fp64_passes_through_float_and_float_is_given_back() -> None:
    with checks.doubles():
        assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float64
        assert torch.zeros(1, dtype=torch.bfloat16).float().dtype == torch.float32
    assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float32


def test_memory_is_poisoned_inside_only() -> None:
    with checks.poisoned():
        assert bool(torch.empty(64).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_missing_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(LookupError, match=r"kernels/vp_kernels/select/kernel\.py has no launch_nothing"):
        checks.kernel_of(Case("nothing", "select", (1,), {}))
