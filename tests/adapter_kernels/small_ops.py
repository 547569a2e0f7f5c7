"""What do the tests of the four small operations share?

Random inputs, a spy on the ops that run, and the rule that an operation passes when its error
against float64 is at most twice that of the plain formula in the same dtype, plus four epsilons.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Outputs = tuple[Tensor, ...]


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Normal numbers, rounded to the dtype."""
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def gradients(outs: Outputs, inputs: Outputs) -> Outputs:
    """The gradients of the inputs for one random gradient of the outputs."""
    generator = torch.Generator().manual_seed(9)
    used = [out for out in outs if out.requires_grad]
    douts = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in used]
    return torch.autograd.grad(used, inputs, douts)


def assert_equal(got: Outputs, expected: Outputs) -> None:
    """Bitwise, dtypes and shapes included."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def assert_as_accurate_as_eager(
    ours: Callable[..., Outputs], eager: Callable[..., Outputs], inputs: Outputs
) -> None:
    """Outputs and gradients: error <= 2 x that of eager + 4 x eps x max |truth|, both printed."""
    doubles = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    results = []
    for function, arguments in ((ours, inputs), (eager, inputs), (eager, doubles)):
        outs = function(*arguments)
        results.append((*outs, *gradients(outs, arguments)))
    for index, (got, plain, truth) in enumerate(zip(*results, strict=True)):
        error, allowed = (float((one - truth).detach().abs().max()) for one in (got, plain))
        floor = 4 * torch.finfo(got.dtype).eps * float(truth.detach().abs().max())
        print(f"result {index} {got.dtype}: error {error:.3e}, eager {allowed:.3e}")
        assert got.shape == truth.shape
        assert got.dtype == plain.dtype
        assert error <= 2 * allowed + floor


class Spy(TorchDispatchMode):
    """Records the calls of this package's ops: name, arguments, result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "adapter_kernels":
            self.calls.append((func.__name__.removesuffix(".default"), args, out))
        return out


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of random angles all around the circle."""
    theta = torch.rand(shape) * 100
    return theta.cos(), theta.sin()
