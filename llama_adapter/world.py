"""Several processes that train one adapter: each computes a share of every batch, sums are shared.

`torchrun` starts them, on one machine or several, and tells each its rank. Each holds the base;
what is sent is the adapter's gradient, 4.9 MB at 7B, once a step. All then take the same optimiser
step, so that adapters stay equal without being sent. Rank 0 alone writes the run folder.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, distributed

Shared = TypeVar("Shared")


class Sized(Protocol):
    """Anything whose tokens can be counted."""

    @property
    def tokens(self) -> Sequence[int]:
        """Its tokens."""
        ...


Item = TypeVar("Item", bound=Sized)
# seconds that gloo's threads are given, each needs the interpreter for microseconds
LETTING_GO = 0.2
GONE = (
    "another process of this run is gone, and what it said comes first: start all of them again "
    "with --resume"
)


@dataclass(frozen=True)
class World:
    """The processes of a run; one alone where nothing started several.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
        device: that torchrun means this one to use, or None.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a batch, in its order: tokens are spread as evenly as they go."""
        if self.size == 1:
            return list(items)
        loads = [0] * self.size
        owner = [0] * len(items)
        for index in sorted(range(len(items)), key=lambda n: -len(items[n].tokens)):
            owner[index] = loads.index(min(loads))
            loads[owner[index]] += len(items[index].tokens)
        return [item for item, rank in zip(items, owner, strict=True) if rank == self.rank]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, sent together.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.size == 1 or not tensors:
            return
        whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _reaching_others():
            distributed.all_reduce(whole)
        for tensor, part in zip(tensors, whole.split([x.numel() for x in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def most(self, count: int) -> int:
        """The largest count of any process.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.size == 1:
            return count
        counts = torch.tensor([count], device=self.device)
        with _reaching_others():
            distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        return int(counts)

    def same(self, value: Shared) -> Shared:
        """What rank 0 gave, in every process.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.size == 1:
            return value
        values = [value]
        device = None if self.device is None else torch.device(self.device)
        with _reaching_others():
            distributed.broadcast_object_list(values, src=0, device=device)
        return values[0]


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{GONE} ({error})") from error


@contextmanager
def join() -> Iterator[World]:
    """Meet the other processes that torchrun has started, until the block is left.

    Raises:
        ConnectionError: they cannot be reached, or one is gone.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield World()
        return
    cuda = torch.cuda.is_available()
    # as torchrun tells it
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    try:
        distributed.init_process_group("nccl" if cuda else "gloo")
    except RuntimeError as error:
        raise ConnectionError(f"the other processes cannot be reached: {error}") from error
    try:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        yield World(rank, size, f"cuda:{local}" if cuda else None)
        if not cuda:
            # torch's caches of a sharded base keep the group alive, and with it threads that may
            # still hold what was sent last: freeing it takes the interpreter's lock, and aborts the
            # process where the interpreter is ending already
            time.sleep(LETTING_GO)
    except RuntimeError as error:
        # torch itself gathers the weights of a sharded base; gloo's errors have no class of theirs
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(f"{GONE} ({error})") from error
    finally:
        distributed.destroy_process_group()
