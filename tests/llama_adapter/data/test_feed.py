"""The order of a run is fixed by its seed; what is made ahead comes in order."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import pytest

from llama_adapter.data.examples import Batch, Example
from llama_adapter.data.feed import ORDERS, EpochBatches, JointBatches, ahead

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


TEXT, IMAGES = ("prompts", "gates"), ("projector",)
# 17 of text and 6 about pictures: batches of 3 are 6 and 2
PICTURED = np.isin(np.arange(23), [0, 4, 5, 11, 12, 22])


def joint(order: str, epoch: int = 0, seed: int = 7, size: int = 3) -> JointBatches:
    return JointBatches(EXAMPLES, PICTURED, size, seed, epoch, (TEXT, IMAGES), order)


def kinds(batches: Sequence[Batch]) -> str:
    """A letter a batch, which must be of one kind and train the groups of it."""
    found = ""
    for batch in batches:
        (pictured,) = {bool(PICTURED[example.index]) for example in batch.examples}
        assert batch.train_groups == (IMAGES if pictured else TEXT)
        found += "i" if pictured else "t"
    return found


def indices(batches: Sequence[Batch], letter: str = "it") -> list[int]:
    which = zip(batches, kinds(batches), strict=True)
    return [e.index for batch, kind in which if kind in letter for e in batch.examples]


@pytest.mark.parametrize("order", ORDERS)
def test_joint_batches_are_of_one_kind_and_fixed_by_seed_and_epoch(order: str) -> None:
    orders = []
    for epoch in range(3):
        batches = joint(order, epoch)
        orders.append(indices(batches))
        assert sorted(set(orders[-1])) == list(range(23))
        assert indices(joint(order, epoch)) == orders[-1]
        # as a run does that is continued there
        late = joint(order, epoch)
        assert late[5:] == batches[5:]
        assert late[2] == batches[2]
        # of every length, and of no other
        assert len(batches) == len(batches[:]) == len(list(batches))
        with pytest.raises(IndexError):
            batches[len(batches)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert indices(joint(order, seed=8)) != orders[0]


def test_kinds_alternate_and_the_rarer_begins_again() -> None:
    batches = joint("alternate")
    assert kinds(batches) == "it" * 6
    assert sorted(indices(batches, "t")) == np.flatnonzero(~PICTURED).tolist()
    pictures = indices(batches, "i")
    passes = [pictures[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(one) == np.flatnonzero(PICTURED).tolist() for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    # the text may be the rarer
    assert kinds(JointBatches(EXAMPLES, ~PICTURED, 3, 7, 0, (IMAGES, TEXT), "alternate")) == (
        "ti" * 6
    )


def test_kinds_are_spread_evenly_or_at_random() -> None:
    assert kinds(joint("proportional")) == kinds(joint("proportional", 1)) == "ttitttit"
    assert kinds(joint("proportional", size=1)).count("tttttt") == 0
    drawn = {kinds(joint("concat", epoch)) for epoch in range(20)}
    assert len(drawn) > 10
    assert {one.count("i") for one in drawn} == {2}
    for order in ("proportional", "concat"):
        assert sorted(indices(joint(order))) == list(range(23))


def test_joint_training_needs_both_kinds() -> None:
    for every in (True, False):
        message = f"needs records with images and without, got {23 * every} with one among 23"
        with pytest.raises(ValueError, match=message):
            JointBatches(EXAMPLES, np.full(23, every), 3, 7, 0, (TEXT, IMAGES), "concat")


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
