"""Which generation of GPU is this? The rows of every table of tiles are keyed by its answer.

An architecture that has no rows of its own takes those of the nearest lower one, and says so once.
"""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Arch:
    """Limits of one architecture, in the units of CUDA's occupancy tables.

    Attributes:
        capability: compute capability, major * 10 + minor.
        shared_memory: bytes of shared memory that one block may use.
        examples: cards, for people.
    """

    capability: int
    shared_memory: int
    examples: str

    @property
    def name(self) -> str:
        """`sm_90` of 90."""
        return f"sm_{self.capability}"


# CUDA C++ Programming Guide, technical specifications per compute capability (99 KB are 101,376)
ARCHS = {
    arch.capability: arch
    for arch in (
        Arch(80, 166_912, "A100"),
        Arch(86, 101_376, "A10, RTX 3090"),
        Arch(89, 101_376, "L4, RTX 4090"),
        Arch(90, 232_448, "H100, H200"),
        Arch(100, 232_448, "B200"),
        Arch(120, 101_376, "RTX 5090"),
    )
}


def nearest(capability: int, known: Collection[int] = tuple(ARCHS)) -> int:
    """The highest known capability that is not above `capability`."""
    return max(c for c in known if c <= capability)


@lru_cache
def _capability(index: int) -> int | None:
    major, minor = torch.cuda.get_device_capability(index)
    found = major * 10 + minor
    if found < min(ARCHS):
        return None
    if found not in ARCHS:
        warnings.warn(
            f"compute capability {major}.{minor} has no tiles of its own: using those of "
            f"{ARCHS[nearest(found)].name}, the nearest known one",
            stacklevel=2,
        )
    return nearest(found)


def capability_of(device: torch.device) -> int | None:
    """The key of a device's rows, None for a GPU older than all of them.

    80 for a device that is no GPU, where the interpreter runs. A constant to torch.compile, which
    cannot trace a question to the driver.
    """
    if device.type != "cuda":
        return 80
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


# what torch.compiler.assume_constant_result does, without importing the compiler with this package
capability_of.__dict__["_dynamo_marked_constant"] = True
