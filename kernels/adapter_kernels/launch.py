"""One launch of a Triton kernel, as data: what runs it on a GPU also describes it to a compiler.

Launchers return launches. `run` starts one; the ahead-of-time checks compile the very same
arguments for chips that are not there.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

# launches by kernel name since the process began: tests read it to prove what really ran
counts: Counter[str] = Counter()


class Launch(NamedTuple):
    """A kernel with its grid and arguments.

    Attributes:
        kernel: the jitted function.
        grid: programs, one dimension: the others hold 65,535 at most.
        arguments: by name; tensors, numbers and compile-time values, None for what is absent.
        num_warps, num_stages: of the tile configuration.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Start the kernel on the current stream of its tensors' device, if its grid is not empty.

        Triton asks for the current device, which need not be where the tensors are.
        """
        if self.grid:
            counts[self.kernel.__name__] += 1
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            first = next(x for x in self.arguments.values() if isinstance(x, Tensor))
            with torch.cuda.device_of(first):
                self.kernel[(self.grid,)](**self.arguments, **options)
