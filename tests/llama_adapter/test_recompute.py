"""What is computed again gives the same gradient, and only its arguments are kept."""

import pytest
import torch
from torch import Tensor

from llama_adapter.recompute import call


@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_is_the_same_and_the_inside_is_not_kept(again: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(5, 7, generator=generator) for _ in range(2))
    kept: list[Tensor] = []
    calls = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return (x.exp() * y).tanh().square() * 2

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    wanted = torch.autograd.grad(function(x.requires_grad_(True), y).sum(), x)[0]
    calls.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call(again, function, x, y)
    known = {x.data_ptr(), y.data_ptr()}
    inside = [tensor for tensor in kept if tensor.numel() and tensor.data_ptr() not in known]
    assert bool(inside) is not again
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], wanted)
    assert len(calls) == 1 + again


def test_without_gradients_it_is_a_call() -> None:
    x = torch.randn(4, requires_grad=True)
    with torch.no_grad():
        out = call(True, torch.sin, x)
    assert torch.equal(out, x.sin())
    assert out.grad_fn is None
