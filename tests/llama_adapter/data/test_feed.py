"""The order of a run is fixed by its seed; what is made ahead comes in order."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from llama_adapter.data.examples import Example
from llama_adapter.data.feed import EpochBatches, ahead

EXAMPLES = [Example(i, (1, 2), (-100, 2)) for i in range(23)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = []
    for epoch in range(3):
        batches = EpochBatches(EXAMPLES, 5, 7, epoch, ("gates",))
        assert len(batches) == 5
        assert [len(batch.examples) for batch in batches] == [5, 5, 5, 5, 3]
        assert {batch.train_groups for batch in batches} == {("gates",)}
        orders.append([example.index for batch in batches for example in batch.examples])
        assert sorted(orders[-1]) == list(range(23))
        again = EpochBatches(EXAMPLES, 23, 7, epoch, ())[0].examples
        assert [example.index for example in again] == orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = EpochBatches(EXAMPLES, 23, 8, 0, ())[0].examples
    assert [example.index for example in other] != orders[0]


def test_the_order_is_that_of_a_shuffled_list() -> None:
    """Runs that began with an earlier version continue with the batches they would have had."""
    for seed, epoch in ((7, 0), (7, 4), (12, 1)):
        order = list(range(23))
        random.Random(f"order {seed} {epoch}").shuffle(order)
        batches = EpochBatches(EXAMPLES, 5, seed, epoch, ())
        assert [e.index for batch in batches for e in batch.examples] == order
    assert [batch.examples[0].index for batch in batches[1:4:2]] == [order[5], order[15]]
    assert batches[-1].examples == batches[4].examples
    with pytest.raises(IndexError):
        batches[5]


def test_things_come_in_order_and_the_next_is_made_while_one_is_used() -> None:
    made: list[int] = []
    third = threading.Event()

    def make(number: int) -> int:
        made.append(number)
        if number == 2:
            third.set()
        return number * 10

    found = []
    with closing(ahead(range(6), make)) as things:
        for thing in things:
            found.append(thing)
            if thing == 10:
                assert third.wait(10), "the next was not made ahead"
                time.sleep(0.05)
                assert made == [0, 1, 2], "no more than the next is made"
    assert found == [0, 10, 20, 30, 40, 50]
    assert not threads()
    assert list(ahead([], make)) == []


def test_an_error_is_raised_where_its_turn_is() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("three is wrong")
        return number

    things = ahead(range(9), make)
    assert [next(things) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three is wrong"):
        next(things)

    def source() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(ahead(source(), make))
    assert not threads()


def test_the_thread_ends_with_an_iterator_that_is_not_used_up() -> None:
    things = ahead(range(10**9), abs)
    assert next(things) == 0
    assert len(threads()) == 1
    things.close()
    assert not threads()
