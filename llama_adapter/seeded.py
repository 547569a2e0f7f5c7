"""A run's own random state and threads, and the caller's again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Let torch's random state begin at a seed, and compute with so many threads.

    Args:
        seed: of the CPU and of `device`.
        device: where the run computes.
        threads: of the CPU; None leaves them as they are.
    """
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.set_num_threads(threads or before)
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
