"""In which order a run takes its examples, and how the next batch is made while one is trained."""

import random
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, overload

from llama_adapter.data.examples import Batch, Example

Item = TypeVar("Item")
Made = TypeVar("Made")


class EpochBatches(Sequence[Batch]):
    """One epoch's batches, each made when it is asked for."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        epoch: int,
        groups: tuple[str, ...],
    ) -> None:
        """Draw a permutation that depends on the seed and the epoch alone.

        Args:
            examples: the training examples.
            batch_size: examples per batch; the last batch takes what is left.
            seed: of the run.
            epoch: from 0.
            groups: the parameter groups that the batches train.
        """
        self._examples, self._size, self._groups = examples, batch_size, groups
        self._order = array("q", range(len(examples)))
        # a string seeds by its hash, which does not change between Python versions
        random.Random(f"order {seed} {epoch}").shuffle(self._order)

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        part = self._order[numbers * self._size : (numbers + 1) * self._size]
        return Batch(tuple(self._examples[i] for i in part), self._groups)


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
