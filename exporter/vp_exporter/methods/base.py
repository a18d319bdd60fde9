"""Interface of a method: the steps for a given amount, and a family of plans to search for a MAC target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.methods.options import MOST, MethodOptions
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers import REDUCERS, Step

Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Family:
    """One-parameter family of plans, from least to most reduction.

    Attributes:
        at: Maps u in 0 (least) .. 1 (most) to steps; no steps if nothing is removed.
        setting: Maps u to the equivalent option, for the plan's provenance.
        bound: What limits the reduction, naming the block.
    """

    at: Callable[[float], Steps]
    setting: Callable[[float], dict[str, Any]]
    bound: str


@dataclass(frozen=True)
class Method(ABC):
    """A reduction method.

    Attributes:
        name: Name of the method; also the reducer's, unless the method is a static mask.
        options: Supported fields of MethodOptions (besides preset and proportional_attention).
        amounts: Groups of options and arguments; exactly one group sets the amount of reduction.
        args: Supported names in MethodOptions.args.
    """

    name: str
    options: tuple[str, ...]
    amounts: tuple[tuple[str, ...], ...]
    args: tuple[str, ...] = ()

    @abstractmethod
    def steps(self, request: MethodOptions, model: ModelSpec) -> Steps:
        """Steps for a given amount.

        Raises:
            PlanError: if the amount does not fit the model.
        """

    @abstractmethod
    def family(self, request: MethodOptions, model: ModelSpec) -> Family:
        """Plans among which to search for a MAC target."""

    def step(self, block: int, values: Mapping[str, Any], model: ModelSpec) -> Step:
        """A step of this method's reducer; fields missing from `values` are set as in the authors' code."""
        return REDUCERS[self.name].new(block, values, model)


def acting_blocks(request: MethodOptions, model: ModelSpec, default: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks with a step, checked against the model's depth.

    Raises:
        PlanError: if the model does not have a block.
    """
    blocks = default if request.blocks is None else request.blocks
    if blocks[-1] >= model.depth:
        raise PlanError(
            f"`blocks` names block {blocks[-1]}",
            expected=f"0 to {model.depth - 1}: {model.name} has {model.depth} blocks",
            fix="block numbers are 0-based",
        )
    return blocks


def listed(name: str, values: Any, blocks: tuple[int, ...], *, low: int = 0) -> tuple[int, ...]:
    """Check a list of one integer per acting block.

    Raises:
        PlanError: if it is not a list of integers, or has another length.
    """
    good = isinstance(values, list | tuple) and all(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST for value in values
    )
    if not good:
        raise PlanError(f"{name} is {values!r}", expected=f"a list of whole numbers from {low}, such as [139,98,69]")
    if len(values) != len(blocks):
        raise PlanError(
            f"{name} holds {len(values)} values",
            expected=f"{len(blocks)}, one for each of the blocks {', '.join(map(str, blocks))}",
        )
    return tuple(values)


def stage_blocks(depth: int) -> tuple[int, ...]:
    """Default blocks of stages: after a quarter, a half and three quarters of the depth (3, 6, 9 of 12)."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
