"""How tasks run a host: where its weights are, and in eval mode while it answers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module goes back to the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def beside(tensor: Tensor, model: nn.Module) -> Tensor:
    """A tensor where a host's weights are, in their dtype where it holds fractions."""
    weight = next(model.parameters())
    dtype = weight.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(weight.device, dtype)
