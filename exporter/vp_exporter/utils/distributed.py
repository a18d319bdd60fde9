"""Several processes as one: numbered work is split over them, and every one gets all results, in order.

A sum over processes would depend on how many there are, in its last bits, and a search would decide otherwise. So
nothing is summed on the way: what each batch gives is gathered, and every process adds it up in the same order.

A failure is every process's: what one of them raises inside `agree`, `map` or `from_leader` all of them raise, so that
none waits for one that is gone. Importing this brings no torch: one process never needs it.
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

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks, on every process.

        Args:
            value: picklable.

        Raises:
            VpError: a process is gone.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.world
        with self._talking():
            dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, make: Callable[[], T]) -> T:
        """What this process makes, once every process has made its own.

        Raises:
            Exception: what `make` raised, on whichever process (the first in the order of ranks): errors that a user
                can act on as they are, others as a RuntimeError that names the process.
        """
        if self.world == 1:
            return make()
        failure: Exception | None = None
        try:
            value = make()
        except Exception as error:  # the others wait in the gather: they must hear of it
            failure = error
        for rank, told in enumerate(self.gather(None if failure is None else self._portable(failure))):
            if told is not None:
                raise failure if failure is not None and rank == self.rank else told
        return value

    def map(self, function: Callable[[int], Tensor], items: Sequence[int]) -> list[Tensor]:
        """Do numbered work together.

        Args:
            function: item -> tensor; called for the items that this process owns.
            items: numbers, the same on every process.

        Returns:
            The result of each item, in their order, on the CPU, on every process.

        Raises:
            Exception: what `function` raised, as `agree` has it.
        """
        gathered = self.gather(
            self.agree(lambda: {item: function(item).detach().cpu() for item in items if self.owns(item)})
        )
        everything = {item: result for results in gathered for item, result in results.items()}
        return [everything[item] for item in items]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes, on every process: for work that is done once and for what only one clock can say.

        Args:
            make: called on the leader only; what it returns must be picklable.

        Raises:
            Exception: what `make` raised, as `agree` has it.
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
        """`error` as another process can raise it."""
        if isinstance(error, VpError | OSError):
            return error
        return RuntimeError(f"process {self.rank} of {self.world} failed: {type(error).__name__}: {error}")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch raises for a closed connection, and when nobody answers in time
            raise VpError(
                f"process {self.rank} of {self.world} has lost the others: {str(error).splitlines()[0]}",
                fix="one of them was killed, for lack of memory perhaps: try fewer processes",
            ) from error


def single() -> Workers:
    """One process."""
    return Workers()


def announced() -> bool:
    """Whether the environment announces several processes, as torchrun does."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def from_environment() -> Workers:
    """The process group that torchrun announces in the environment; one process where there is none.

    Raises:
        VpError: the group cannot be formed.
    """
    if not announced():
        return single()
    require_packages("work shared by several processes", "export", ["torch"])
    import torch
    import torch.distributed as dist

    try:
        # gloo on GPUs too: what is gathered are small tensors on the CPU.
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
    """`from_environment`, and `close` at the end."""
    workers = from_environment()
    try:
        yield workers
    finally:
        close(workers)


def own_gpu() -> None:
    """Let this process see one GPU only, for engines that know nothing of torch's current device.

    The GPUs that are visible go round by LOCAL_RANK. Call it before anything initialises CUDA: the driver reads
    CUDA_VISIBLE_DEVICES once. Without a GPU nothing happens.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        require_packages("work shared by several processes", "export", ["torch"])
        import torch

        # Asks the management library, so CUDA itself is not initialised by it.
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
