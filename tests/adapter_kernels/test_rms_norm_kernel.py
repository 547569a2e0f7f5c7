"""The kernel of rms_norm: as accurate as the formula at odd widths, in one launch."""

from collections import Counter

import pytest
import torch

from adapter_kernels import launch, rms_norm
from adapter_kernels.rms_norm import rms_norm_reference
from tests.adapter_kernels.tolerances import check_as_accurate_as_eager, check_bitwise
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    DEVICE,
    DTYPES,
    launched,
    needs_kernels,
)

pytest.importorskip("triton")

EPS = 1e-5


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 67, 1024, 4096, 4099, 9000])
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_accuracy(dtype: torch.dtype, width: int, residual: bool) -> None:
    """Widths of one tile and of several; x from a slice, with a stride of its own."""
    g = torch.Generator().manual_seed(width)
    draws = [torch.randn(3, 2, width, generator=g).to(DEVICE, dtype) for _ in range(2)]
    x, other = draws[0].expand(3, 2, width)[:, ::2], draws[1][:, ::2]
    weight = torch.randn(width, generator=g).to(DEVICE, dtype)
    added = other if residual else None
    before = Counter(launch.counts)
    with torch.no_grad():
        got = rms_norm(x, weight, eps=EPS, residual=other) if residual else rms_norm(
            x, weight, eps=EPS
        )  # fmt: skip
    assert launched(before) == {"rms_norm_kernel": 1}
    eager = rms_norm_reference(x, weight, added, EPS)
    truth = rms_norm_reference(
        (x if added is None else x + added).double(), weight.double(), None, EPS
    )
    out = got[0] if isinstance(got, tuple) else got
    check_as_accurate_as_eager("out", out, eager[0], truth[0])
    if isinstance(got, tuple):
        check_bitwise("h", got[1], eager[1])


@pytest.mark.kernel
@needs_kernels
def test_gradients_pass_through_the_kernel() -> None:
    torch.manual_seed(3)
    shapes = ((5, 67), (67,), (5, 67))
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    out, h = rms_norm(leaves[0], leaves[1], eps=EPS, residual=leaves[2])
    got = torch.autograd.grad(out.sin().sum() + h.sum(), leaves)
    n, h = rms_norm_reference(*leaves, EPS)[:2]
    expected = torch.autograd.grad(n.sin().sum() + h.sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
