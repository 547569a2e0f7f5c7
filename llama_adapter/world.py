"""Several processes that train one adapter: each computes a share of every batch, sums are shared.

`torchrun` starts them, on one machine or several, and tells each its rank. Each holds the base;
what is sent is the adapter's gradient, 4.9 MB at 7B, once a step. All then take the same optimiser
step, so that adapters stay equal without being sent. Rank 0 alone writes the run folder.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
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
    "another process of this run is gone, and what it said comes first: once that is mended, start "
    "all of them again, with --resume if the run had begun"
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

    def gather(self, value: Shared) -> list[Shared]:
        """What each process gave, by rank, in all of them.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.size == 1:
            return [value]
        values = [value] * self.size
        with _reaching_others():
            distributed.all_gather_object(values, value)
        return values

    def agree(self, facts: Mapping[str, object]) -> None:
        """Go on only if every process gave the same.

        Raises:
            ValueError: one gave another; raised in all of them, and names the first.
            ConnectionError: another process is gone.
        """
        first, *others = self.gather(facts)
        for rank, held in enumerate(others, 1):
            for name, value in first.items():
                if held.get(name) != value:
                    raise ValueError(
                        f"{name} must be the same in every process, got {value!r} in 0 and "
                        f"{held.get(name)!r} in {rank}"
                    )

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


def _short(error: RuntimeError) -> str:
    """What gloo or NCCL says, without the place in their sources and the advice behind it."""
    text = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0])
    return text.partition(". ")[0]


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{GONE} ({_short(error)})") from error


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Meet the other processes that torchrun has started, until the block is left.

    Where the caller has them meet already, they go on to do so behind the block.

    Args:
        device: kind of device to compute on; None is the GPU, if there is one.

    Raises:
        ValueError: device names one GPU, or there are fewer of them than processes.
        ConnectionError: the others cannot be reached, or one is gone.
    """
    met = distributed.is_available() and distributed.is_initialized()
    if not met and not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield World()
        return
    local = _own_gpu(device) if _on_gpu(device) else None
    try:
        if not met:
            distributed.init_process_group("gloo" if local is None else "nccl")
    except RuntimeError as error:
        raise ConnectionError(f"the other processes cannot be reached: {error}") from error
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), local)
        if local is None and not met:
            # torch's caches of a sharded base keep the group alive, and with it threads that may
            # still hold what was sent last: freeing it takes the interpreter's lock, and aborts the
            # process where the interpreter is ending already
            time.sleep(LETTING_GO)
    except RuntimeError as error:
        # torch itself gathers the weights of a sharded base; gloo's errors have no class of theirs
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(f"{GONE} ({_short(error)})") from error
    finally:
        if not met:
            distributed.destroy_process_group()


def _on_gpu(device: str | None) -> bool:
    return torch.cuda.is_available() if device is None else device.startswith("cuda")


def _own_gpu(device: str | None) -> str:
    """The GPU that torchrun means this process to use, made torch's current one."""
    # as torchrun tells it
    local, size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "WORLD_SIZE"))
    count = torch.cuda.device_count()
    if device in (None, "cuda"):
        device = f"cuda:{local}"
    elif size > 1:
        raise ValueError(f"device must be cuda or cpu where processes are several, got {device}")
    if local >= count:
        raise ValueError(
            f"each process needs a GPU of its own, got {count} for process {local + 1}"
        )
    torch.cuda.set_device(device)
    return device
