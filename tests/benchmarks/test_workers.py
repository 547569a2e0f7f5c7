"""Processes beside this one: results in order, and a death that is noticed."""

import os

import pytest

from benchmarks.workers import WorkerLost, side_by_side


def die(job: int) -> int:
    if job == 2:
        os._exit(9)
    return job


def test_a_process_that_dies_is_noticed() -> None:
    """As killed for memory: a pool that waits for its result would wait for ever."""
    assert list(side_by_side(die, [1, 3, 4], 2)) == [1, 3, 4]
    with pytest.raises(WorkerLost, match="a process that compiles died"):
        list(side_by_side(die, [2, 5], 1))
