"""Distribute numbered work over several processes, such that each gets all results, in order.

Summing over processes would make the last bits, and thus the decisions of a search, depend on their number. So nothing
is reduced: the result of each batch is gathered, and every process adds them up in the same order.

An exception raised inside `agree`, `map` or `from_leader` by one process is raised by all, so that none waits for one
that has stopped. Importing this module does not import torch, which a single process does not need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from vp_engines.extras import require_packages
from vp_exporter.errors import VpError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the leader may be timing an engine while the others wait


@dataclass(frozen=True)
class Workers:
    """This process within its group.

    Attributes:
        rank: Rank of this process, from 0.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def leader(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def owns(self, item: int) -> bool:
        """Whether this process is responsible for an item."""
        return item % self.world == self.rank

    def gather(self, value: T) -> list[T]:
        """Gather the value of every process, in the order of ranks, on every process.

        Args:
            value: Picklable.

        Raises:
            VpError: if a process is gone.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.world
        with self._talking():
            dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, make: Callable[[], T]) -> T:
        """Call `make` and return its result once every process has done so.

        Raises:
            Exception: as raised by `make` on any process (the first in the order of ranks): VpErrors as they are,
                others as a RuntimeError that names the process.
        """
        if self.world == 1:
            return make()
        failure: Exception | None = None
        try:
            value = make()
        except Exception as error:  # the others wait in the gather, so pass the error on
            failure = error
        for rank, told in enumerate(self.gather(None if failure is None else self._portable(failure))):
            if told is not None:
                raise failure if failure is not None and rank == self.rank else told
        return value

    def map(self, function: Callable[[int], Tensor], items: Sequence[int]) -> list[Tensor]:
        """Map a function over items, distributed over the processes.

        Args:
            function: Maps an item to a tensor; called for the items that this process owns.
            items: Numbers, equal on every process.

        Returns:
            The result of each item, in order, on the CPU, on every process.

        Raises:
            Exception: as raised by `function`, see `agree`.
        """
        gathered = self.gather(
            self.agree(lambda: {item: function(item).detach().cpu() for item in items if self.owns(item)})
        )
        everything = {item: result for results in gathered for item, result in results.items()}
        return [everything[item] for item in items]

    def from_leader(self, make: Callable[[], T]) -> T:
        """Call `make` on the leader and return the result on every process, for work to be done once or timed.

        Args:
            make: Called on the leader only; its result must be picklable.

        Raises:
            Exception: as raised by `make`, see `agree`.
        """
        if self.world == 1:
            return make()
        import torch.distributed as dist

        failure: Exception | None = None
        box: list[Any] = [None, None]
        if self.leader:
            try:
                box[0] = make()
            except Exception as error:
                failure, box[1] = error, self._portable(error)
        with self._talking():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise failure or box[1]
        value: T = box[0]
        return value

    def _portable(self, error: Exception) -> Exception:
        """Convert `error` so that another process can raise it."""
        if isinstance(error, VpError | OSError):
            return error
        return RuntimeError(f"process {self.rank} of {self.world} failed: {type(error).__name__}: {error}")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # raised by torch for closed connections and timeouts
            raise VpError(
                f"process {self.rank} of {self.world} has lost the others: {str(error).splitlines()[0]}",
                fix="one of them was killed, for lack of memory perhaps: try fewer processes",
            ) from error


def single() -> Workers:
    """A group of one process."""
    return Workers()


def announced() -> bool:
    """Whether the environment variables of a process group are set, as by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def from_environment() -> Workers:
    """Join the process group described by the environment, as set by torchrun; a single process if there is none.

    Raises:
        VpError: if the group cannot be formed.
    """
    if not announced():
        return single()
    require_packages("work shared by several processes", "export", ["torch"])
    import torch
    import torch.distributed as dist

    try:
        # gloo even with GPUs: only small CPU tensors are gathered.
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise VpError(
            f"the processes cannot find each other: {str(error).splitlines()[0]}",
            expected="torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    return Workers(dist.get_rank(), dist.get_world_size())


@contextmanager
def session() -> Iterator[Workers]:
    """Context of `from_environment`, with `close` at the end."""
    workers = from_environment()
    try:
        yield workers
    finally:
        close(workers)


def own_gpu() -> None:
    """Make only one GPU visible to this process, for engines that ignore torch's current device.

    Visible GPUs are assigned round-robin by LOCAL_RANK. Call this before CUDA is initialised: the driver reads
    CUDA_VISIBLE_DEVICES once. Does nothing without a GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        require_packages("work shared by several processes", "export", ["torch"])
        import torch

        # Uses NVML, which does not initialise CUDA.
        names = [str(index) for index in range(torch.cuda.device_count())]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[_local_rank() % len(names)]


def close(workers: Workers) -> None:
    """Leave the group."""
    if workers.world > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
