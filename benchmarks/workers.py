"""Work in processes beside this one: what compiles takes longer than what is measured."""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class WorkerLost(RuntimeError):
    """A process that worked beside this one is gone."""


def side_by_side(
    function: Callable[[Any], Any], jobs: Sequence[Any], processes: int
) -> Iterator[Any]:
    """Results of the jobs in their order, computed in new processes side by side.

    Raises:
        WorkerLost: a process died, as of memory or inside a compiler; no other result comes.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            yield from pool.map(function, jobs)
        except BrokenProcessPool:
            raise WorkerLost("a process that compiles died: fewer --processes take less") from None
        finally:
            # after Ctrl-C nobody waits for what has not begun
            pool.shutdown(wait=False, cancel_futures=True)


def positive(text: str) -> int:
    """A number of processes: 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)
