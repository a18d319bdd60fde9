"""Check the kernels on the GPU against torch in higher precision, by the same criterion as the tests.

The ground truth is the operator's torch implementation in fp64 on the same device, which tests/kernels checks against
the slow reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import BATCHES, TOKENS, Call, Case, calls, cases
from benchmarks.gpu.runs import Row
from benchmarks.gpu.setup import complete_interpreter, fingerprint, first_line, of_the_tests, part_of

SHOWN = 10  # failures to keep per case
LOOPED = ("merge_rows", "match_merge", "density_merge")  # references loop over tokens
NUDGES, NUDGE = 6, 2e-6  # number of perturbations for finding near-ties, and their relative size
JUMP = 1e-4  # relative to the largest value: a larger change of the result means a different choice
MOST_EXCUSED = 0.25
COMPILE_SECONDS, CALL_SECONDS = 2.5, 0.004
# For each floating-point output, the argument with its dtype; None for fp32.
DTYPE_OF: Mapping[str, tuple[int | None, ...]] = {
    "attention": (0, None), "gather_norm": (0, 0), "select_fuse": (None, 1), "merge_rows": (0, None),
    "match_merge": (0, None), "density_merge": (0, None),
}  # fmt: skip

Outputs = tuple[Tensor, ...]


@dataclass
class Tally:
    """Summary of a case."""

    compared: int = 0
    images: int = 0
    excused: int = 0
    failed: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)

    def fail(self, call: Call, what: str) -> None:
        self.failed += 1
        if len(self.failures) < SHOWN:
            self.failures.append({"call": call.what, "what": what})


def kernel_of(case: Case) -> Callable[..., Any]:
    """Function to check: the public one, or the launcher in Triton's interpreter, since CPUs never run the kernel.

    Raises:
        LookupError: if it does not exist (yet).
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        complete_interpreter()
        return part_of(case.room, "kernel", f"launch_{case.operator}")
    return part_of(case.room, "op", case.operator)


def oracle(case: Case) -> Callable[..., Any]:
    """Ground truth of an operator, to be called in fp64.

    The reference if it is batched; otherwise (Python loops over tokens) the torch implementation.
    """
    if case.operator in LOOPED:
        for file, name in (("op", f"{case.operator}_torch"), ("torch_form", case.operator)):
            with suppress(LookupError):
                return part_of(case.room, file, name)
    reference = part_of(case.room, "reference", f"{case.operator}_reference")
    if case.operator == "select":  # a GPU's sort may distinguish -0 from 0, and NaNs; use the CPU's
        return lambda scores, k, by_score: reference(scores.cpu(), k, by_score).to(scores.device)
    return reference


def bounds(case: Case, arguments: tuple[Any, ...], truth: Outputs) -> tuple[Tensor | None, ...]:
    """Largest rounding error of each output; None for indices."""
    of = of_the_tests("bounds")
    if case.operator == "select":
        return (None,)
    if case.operator == "select_fuse":
        return None, of.select_fuse(*arguments)
    if case.operator == "density_merge":  # sizes are integers
        x = arguments[0]
        return of.density_merge(x, truth[0], x.shape[1]), torch.zeros_like(truth[1])
    if case.operator == "match_merge":
        x, metric, *rest = arguments
        return of.merge_rows(x, *part_of(case.room, "op", "match_torch")(metric.double(), *rest))
    return outputs(getattr(of, case.operator)(*arguments))


def check(case: Case, device: str, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Run all calls of a case. Failures do not stop it, unless the device fails."""
    kernel, tally = kernel_of(case), Tally()
    exact = oracle(case)
    for call in calls(case, device, batches):
        try:
            _one(case, call, kernel, exact, tally)
        except Exception as error:  # of the criterion, argument checks, the compiler or the driver
            if device == "cuda" and not healthy():
                raise RuntimeError(f"at {call.what}: {first_line(error)}") from error
            tally.fail(call, first_line(error))
    if tally.images and tally.excused > MOST_EXCUSED * tally.images:
        tally.fail(Call("all calls", ()), f"{tally.excused} of {tally.images} images are near-ties: nothing is checked")
    said = f"{tally.compared} calls" + (f", {tally.excused} images near a tie" if tally.excused else "")
    first = f": {tally.failures[0]['call']}: {tally.failures[0]['what']}" if tally.failures else ""
    return {
        "operator": case.operator, "device": device, "compared": tally.compared, "failed": tally.failed,
        "failures": tally.failures, "excused": tally.excused, "images": tally.images,
        "say": f"{said}, FAILED {tally.failed}{first}" if tally.failed else f"{said}, good",
    }  # fmt: skip


def _one(
    case: Case,
    call: Call,
    kernel: Callable[..., Any],
    exact: Callable[..., Any],
    tally: Tally,
) -> None:
    before = [each.clone() if isinstance(each, Tensor) else each for each in call.arguments]
    with poisoned():
        found = outputs(kernel(*call.arguments))
    again = outputs(kernel(*call.arguments))
    tally.compared += 1
    for was, each in zip(before, call.arguments, strict=True):
        if isinstance(each, Tensor) and not same_bits(was, each):
            raise AssertionError("the kernel changed an argument")
    for number, (first, second) in enumerate(zip(found, again, strict=True)):
        if not same_bits(first, second):
            raise AssertionError(f"output {number}: two runs differ in bits (or an element is never written)")
    with doubles():
        truth = outputs(exact(*[_double(each) for each in call.arguments]))
        limits = bounds(case, call.arguments, truth)
    if len(found) != len(truth):
        raise AssertionError(f"{len(found)} outputs, expected {len(truth)}")
    chosen = torch.ones(found[0].shape[0], dtype=torch.bool, device=found[0].device)
    if case.decides:
        chosen = _clear(call, exact, truth)
        tally.images += len(chosen)
        tally.excused += int((~chosen).sum())
    for number, (mine, right, bound) in enumerate(zip(found, truth, limits, strict=True)):
        if mine.shape != right.shape:
            raise AssertionError(f"output {number}: shape {list(mine.shape)}, expected {list(right.shape)}")
        if bound is None:
            if not torch.equal(mine, right):
                wrong = (mine != right).reshape(mine.shape[0], -1).any(1)
                raise AssertionError(f"output {number}: {int(wrong.sum())} of {len(wrong)} images have other indices")
            continue
        like = DTYPE_OF[case.operator][number]
        expected = torch.float32 if like is None else call.arguments[like].dtype
        if mine.dtype != expected:
            raise AssertionError(f"output {number}: dtype {mine.dtype}, expected {expected}")
        name = f"output {number}"
        of_the_tests("support").assert_within(name, mine[chosen], right[chosen], bound[chosen], expected)


def _clear(call: Call, oracle: Callable[..., Any], calm: Outputs) -> Tensor:
    """bool [B]: images whose result does not jump when the deciding arguments are perturbed by rounding errors."""
    clear = torch.ones(calm[0].shape[0], dtype=torch.bool, device=calm[0].device)
    for number in range(NUDGES if call.nudged else 0):
        generator = torch.Generator(device=calm[0].device).manual_seed(number)
        moved = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
                 for each in call.arguments]  # fmt: skip
        for at in call.nudged:
            value = moved[at]
            noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32)
            moved[at] = value * (1 + NUDGE * noise.double())
        with doubles():
            answer = outputs(oracle(*moved))
        for first, second in zip(calm, answer, strict=True):
            gap = (first - second).abs().flatten(1).amax(1)
            clear &= gap <= JUMP * first.abs().amax()
    return clear


def outputs(found: Any) -> Outputs:
    """Results of an operator as a tuple of the tensors to compare."""
    several = found if isinstance(found, tuple) else (found,)
    return tuple(each for each in several if each is not None and each.shape != (0,))


def same_bits(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def doubles() -> Iterator[None]:
    """Make `.float()` preserve fp64 within the context, for torch implementations that call it to get at least fp32."""
    narrow = torch.Tensor.float

    def keep(value: Tensor, *args: Any, **named: Any) -> Tensor:
        return value if value.dtype == torch.float64 else narrow(value, *args, **named)

    torch.Tensor.float = keep
    try:
        yield
    finally:
        torch.Tensor.float = narrow


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory from torch.empty with NaN and huge integers, so that elements never written are noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def healthy() -> bool:
    """Whether the GPU still works: an illegal access makes every later call of the process fail."""
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
    except RuntimeError:
        return False


def seconds(case: Case, batches: Sequence[int] = BATCHES) -> float:
    """Estimated duration of a case in a process of its own, including compilation."""
    each = {"select": 40, "select_fuse": 8, "attention": 5, "gather_norm": 5, "merge_rows": 4}.get(case.operator, 16)
    slow = 10 if case.decides else 3
    return case.compiles * COMPILE_SECONDS + each * slow * CALL_SECONDS * len(batches) * len(case.tokens)


def rows(
    *, quick: bool = False, device: str = "cuda", sizes: Sequence[int] = TOKENS, batches: Sequence[int] = BATCHES
) -> list[Row]:
    """Rows with small sizes first: what fails there fails everywhere."""
    found, known = [], {}
    for case in sorted(cases(sizes, quick=quick), key=lambda each: min(each.tokens) > 257):
        if case.room not in known:
            shared = ("kernels/vp_kernels/launch.py", "kernels/vp_kernels/checks.py", "benchmarks/gpu/cases.py",
                      "tests/kernels/support.py", "tests/kernels/bounds.py")  # fmt: skip
            more = ("kernels/vp_kernels/merge_rows",) if case.room in ("match_merge", "density_merge") else ()
            known[case.room] = fingerprint(
                f"kernels/vp_kernels/{case.room}", *more, *shared, "benchmarks/gpu/checks.py"
            )

        def measure(case: Case = case) -> dict[str, Any]:
            return check(case, device, batches)

        name = case.key + ("" if tuple(batches) == BATCHES else f" batches {list(batches)}")
        found.append(Row("kernels-check", name, known[case.room], seconds(case, batches), measure, case.operator))
    return found
