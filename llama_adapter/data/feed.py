"""In which order a run takes its examples, and how the next batch is made while one is trained."""

import random
from abc import abstractmethod
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from llama_adapter.data.examples import Batch, Example

Item = TypeVar("Item")
Made = TypeVar("Made")


# in which order batches of pictures and batches of text come
ORDERS = ("alternate", "proportional", "concat")


def shuffled(members: Iterable[int], seed: int, epoch: int, name: str = "") -> "array[int]":
    """Members in an order that depends on the seed, the epoch and the name alone."""
    order = array("q", members)
    # a string seeds by its hash, which does not change between Python versions
    random.Random(f"order {seed} {epoch}{name}").shuffle(order)
    return order


class _Batches(Sequence[Batch]):
    """Batches that are made when they are asked for."""

    @abstractmethod
    def make(self, number: int) -> Batch:
        """One of them, from 0."""

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self.make(number) for number in numbers]
        return self.make(numbers)


class EpochBatches(_Batches):
    """One epoch's batches, each made when it is asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        epoch: int,
        groups: tuple[str, ...],
        members: Iterable[int] | None = None,
        name: str = "",
    ) -> None:
        """Draw a permutation that depends on the seed, the epoch and the name alone.

        Args:
            examples: the training examples.
            batch_size: examples per batch; the last batch takes what is left.
            seed: of the run.
            epoch: from 0.
            groups: the parameter groups that the batches train.
            members: places of the examples that take part; None is all.
            name: of these batches among those of an epoch.
        """
        self._examples, self._size, self._groups = examples, batch_size, groups
        members = range(len(examples)) if members is None else members
        self._order = shuffled(members, seed, epoch, name)

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def make(self, number: int) -> Batch:
        """One of them, from 0."""
        part = self._order[number * self._size : (number + 1) * self._size]
        return Batch(tuple(self._examples[i] for i in part), self._groups)


class JointBatches(_Batches):
    """One epoch's batches, each of pictures or of text alone, with groups of its own to train.

    "alternate": one of the one kind, one of the other; the kind that has fewer begins again, in
    another order, until the other one is through. "proportional": each batch of either kind once,
    those of the rarer one spread evenly. "concat": each once, in random order.
    Source: LLaMA-Adapter V2, section 4.2, which leaves the order open.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        with_image: NDArray[np.bool_],
        batch_size: int,
        seed: int,
        epoch: int,
        groups: tuple[tuple[str, ...], tuple[str, ...]],
        order: str,
    ) -> None:
        """Draw permutations that depend on the seed and the epoch alone.

        Args:
            examples: the training examples.
            with_image: (n,), which of them have an image.
            batch_size: examples per batch; the last batch of a kind takes what is left.
            seed: of the run.
            epoch: from 0.
            groups: what batches of text train, and what those of pictures do.
            order: one of ORDERS.

        Raises:
            ValueError: all examples are of one kind.
        """
        self._members = np.flatnonzero(~with_image), np.flatnonzero(with_image)
        if not all(map(len, self._members)):
            raise ValueError(
                f"joint training needs records with images and without, got {with_image.sum()} "
                f"with one among {len(with_image)}"
            )
        self._sizes = [-(-len(members) // batch_size) for members in self._members]
        self._kinds = self._plan(order, f"{seed} {epoch}")
        # of each batch, how many of its kind come before it
        before = np.where(self._kinds, np.cumsum(self._kinds), np.cumsum(~self._kinds))
        self._numbers = before - 1
        self._passes: dict[int, tuple[int, EpochBatches]] = {}
        self._examples, self._size, self._groups = examples, batch_size, groups
        self._seed, self._epoch = seed, epoch

    def _plan(self, order: str, seed: str) -> NDArray[np.bool_]:
        """Of each batch, whether it is of pictures."""
        text, pictures = self._sizes
        if order == "alternate":
            return np.arange(2 * max(text, pictures)) % 2 == 0
        kinds = [False] * text + [True] * pictures
        if order == "concat":
            random.Random(f"kinds {seed}").shuffle(kinds)
            return np.array(kinds)
        times = np.concatenate([(np.arange(size) + 0.5) / size for size in self._sizes])
        return np.array(kinds)[np.argsort(times, kind="stable")]

    def __len__(self) -> int:
        return len(self._kinds)

    def make(self, number: int) -> Batch:
        """One of them, from 0."""
        kind = int(self._kinds[number])
        again, place = divmod(int(self._numbers[number]), self._sizes[kind])
        held = self._passes.get(kind)
        if held is None or held[0] != again:
            batches = EpochBatches(
                self._examples,
                self._size,
                self._seed,
                self._epoch,
                self._groups[kind],
                self._members[kind].tolist(),
                f" {('text', 'pictures')[kind]} {again}",
            )
            held = self._passes[kind] = again, batches
        return held[1][place]


def ahead(items: Iterable[Item], make: Callable[[Item], Made]) -> Generator[Made, None, None]:
    """What `make` makes of each item, in order; the next one is made while one is used.

    It is made, and its item drawn, in a thread of its own, which ends with the iterator: close one
    that is not used up. What is raised there is raised here, where the item's turn comes.

    Args:
        items: drawn one by one.
        make: must not depend on what is done with the items before.
    """
    source = iter(items)

    def following() -> list[Made]:
        return [make(item) for item in islice(source, 1)]

    with ThreadPoolExecutor(1, "ahead") as thread:
        waiting = thread.submit(following)
        while made := waiting.result():
            waiting = thread.submit(following)
            yield from made
