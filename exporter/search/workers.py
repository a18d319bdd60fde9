"""Several processes as one: numbered work is split over them, and every one gets all results, in order.

A sum over processes would depend on how many there are, in its last bits, and a search would decide otherwise. So
nothing is summed on the way: what each batch gives is gathered, and every process adds it up in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vp_exporter.errors import SearchError, VpError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the leader may be timing an engine while the others wait


@dataclass(frozen=True)
class Workers:
    """This process among its fellows.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def leader(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def owns(self, item: int) -> bool:
        """Whether numbered work is this process's to do."""
        return item % self.world == self.rank

    def map(self, function: Callable[[int], Tensor], items: Sequence[int]) -> list[Tensor]:
        """Do numbered work together.

        Args:
            function: item -> tensor; called for the items that this process owns.
            items: numbers, the same on every process.

        Returns:
            The result of each item, in their order, on the CPU, on every process.

        Raises:
            VpError: what `function` raised, on whichever process.
        """
        if self.world == 1:
            return [function(item).detach().cpu() for item in items]
        done: dict[int, Tensor] = {}
        failure: Exception | None = None
        try:
            for item in items:
                if self.owns(item):
                    done[item] = function(item).detach().cpu()
        except Exception as error:  # the others wait in the gather: they must hear of it
            failure = error
        gathered: list[tuple[dict[int, Tensor], str | None]] = [({}, None)] * self.world
        dist.all_gather_object(gathered, (done, None if failure is None else f"{failure}"))
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(gathered):
            if text is not None:
                raise SearchError(f"process {rank} of {self.world} failed: {text}")
        everything = {item: result for results, _ in gathered for item, result in results.items()}
        return [everything[item] for item in items]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes, on every process: for work that is done once and for what only one clock can say.

        Args:
            make: called on the leader only; what it returns must be picklable.
        """
        if self.world == 1:
            return make()
        box: list[tuple[T | None, VpError | None, str | None]] = [(None, None, None)]
        if self.leader:
            try:
                box[0] = (make(), None, None)
            except VpError as error:
                box[0] = (None, error, None)
            except Exception as error:
                box[0] = (None, None, f"{type(error).__name__}: {error}")
        dist.broadcast_object_list(box, src=0)
        value, refused, text = box[0]
        if refused is not None:
            raise refused
        if text is not None:
            raise RuntimeError(text)
        return value  # type: ignore[return-value]


def single() -> Workers:
    """One process."""
    return Workers()


def from_environment() -> Workers:
    """The process group that torchrun announces in the environment; one process where there is none.

    Raises:
        SearchError: the group cannot be formed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return single()
    try:
        # gloo on GPUs too: what is gathered are small tensors on the CPU.
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise SearchError(
            f"the processes cannot find each other: {str(error).splitlines()[0]}",
            expected="torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
        ) from error
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    return Workers(dist.get_rank(), dist.get_world_size())


def close(workers: Workers) -> None:
    """Leave the group."""
    if workers.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
