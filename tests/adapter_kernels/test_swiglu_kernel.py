"""The kernel of swiglu: as accurate as the formula, over halves of one product."""

from collections import Counter

import pytest
import torch

from adapter_kernels import launch, swiglu
from adapter_kernels.swiglu import swiglu_reference
from tests.adapter_kernels.tolerances import check_as_accurate_as_eager
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    DEVICE,
    DTYPES,
    launched,
    needs_kernels,
)

pytest.importorskip("triton")


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("shape", [(1,), (3, 5, 131), (2, 1024), (7, 1025), (0, 8)])
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_accuracy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Halves of one product, as a fused projection gives them, and large values of both signs."""
    g = torch.Generator().manual_seed(shape[-1])
    product = (6 * torch.randn(*shape[:-1], 2 * shape[-1], generator=g)).to(DEVICE, dtype)
    gate, up = product.chunk(2, -1)
    before = Counter(launch.counts)
    with torch.no_grad():
        got = swiglu(gate, up)
    assert launched(before) == ({"swiglu_kernel": 1} if gate.numel() else {})
    truth = swiglu_reference(gate.double(), up.double())
    check_as_accurate_as_eager("out", got, swiglu_reference(gate, up), truth)


@pytest.mark.kernel
@needs_kernels
def test_gradients_pass_through_the_kernel() -> None:
    torch.manual_seed(3)
    leaves = [torch.randn(5, 67, device=DEVICE).requires_grad_() for _ in range(2)]
    got = torch.autograd.grad(swiglu(*leaves).sin().sum(), leaves)
    formula = torch.nn.functional.silu(leaves[0]) * leaves[1]
    expected = torch.autograd.grad(formula.sin().sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
