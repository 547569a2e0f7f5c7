"""Which parts of a layer does the backward compute again, so that nothing of them need be kept?

Numbers kept per token of an adapted layer, and the products that a step computes once more:

    None     6 C + 2 F                                                       nothing
    "mlp"    6 C         gate and up, with the norm before them              2 C F
    "block"  C           all of the layer but the last product, with w2      C (2 F + attention's)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RECOMPUTED = ("mlp", "block")


def call(again: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return function(*arguments); its gradient is that, bitwise, with and without `again`.

    Args:
        again: keep the arguments alone, and call once more when the gradient is asked for.
        function: of no random numbers, and without side effects.
    """
    if not again or not torch.is_grad_enabled():
        return function(*arguments)
    output = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(output, Tensor)
    return output
