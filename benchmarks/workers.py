"""What commands of benchmarks share: one thread here, and work in processes beside this one."""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch


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


def command(name: str, run: Callable[[], None]) -> int:
    """Run a benchmark with one thread in this process, as its command does.

    Returns:
        0, or 2 with a line for a request that cannot be carried out, or 130 after Ctrl-C.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def positive(text: str) -> int:
    """A number of processes: 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)
