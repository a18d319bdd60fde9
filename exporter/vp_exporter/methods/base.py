"""What a method is: it turns an amount into the steps of a plan, and offers a line of plans to search for a target."""

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
    """One line of plans, from the least reduction to the most.

    Attributes:
        at: u from 0 (least) to 1 (most) -> steps; none at all where nothing is removed.
        setting: u -> what it means, for the plan's provenance.
        bound: what keeps it from removing more, naming the block.
    """

    at: Callable[[float], Steps]
    setting: Callable[[float], dict[str, Any]]
    bound: str


@dataclass(frozen=True)
class Method(ABC):
    """A reduction method by its name.

    Attributes:
        name: as it is asked for; also the reducer's, unless the method is a static mask.
        options: fields of MethodOptions that it takes (preset and proportional_attention go without saying).
        amounts: groups of options and arguments; one group says how much goes.
        args: names that it takes in MethodOptions.args.
    """

    name: str
    options: tuple[str, ...]
    amounts: tuple[tuple[str, ...], ...]
    args: tuple[str, ...] = ()

    @abstractmethod
    def steps(self, request: MethodOptions, model: ModelSpec) -> Steps:
        """The steps that a stated amount makes.

        Raises:
            PlanError: an amount that does not fit the model.
        """

    @abstractmethod
    def family(self, request: MethodOptions, model: ModelSpec) -> Family:
        """The plans among which a MAC target is searched."""

    def step(self, block: int, values: Mapping[str, Any], model: ModelSpec) -> Step:
        """A step of this method's reducer, as its authors' code has it where `values` says nothing else."""
        return REDUCERS[self.name].new(block, values, model)


def acting_blocks(request: MethodOptions, model: ModelSpec, default: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that act, checked against the model's depth.

    Raises:
        PlanError: a block that the model does not have.
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
    """One whole number for each acting block.

    Raises:
        PlanError: not a list of whole numbers, or of another length.
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
    """Where stages stand by default: after a quarter, a half and three quarters of the blocks (3, 6, 9 of 12)."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
