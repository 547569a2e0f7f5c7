"""The kernels of rms_norm: as accurate as the formulas at odd widths, in one launch each."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_kernels import launch, rms_norm
from adapter_kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference
from tests.adapter_kernels.tolerances import (
    GRADIENT_FACTOR,
    check_as_accurate_as_eager,
    check_bitwise,
    check_identity,
    largest,
)
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


def check_gradients(
    got: tuple[Tensor, Tensor], given: tuple[Any, ...], needs: tuple[bool, bool]
) -> None:
    """dx and dweight by the policy, from (dout, dh, h, weight, rstd)."""
    dout, dh, h, weight, _ = given
    dout, h, weight = (x.double() for x in (dout, h, weight))
    dh = None if dh is None else dh.double()
    rstd = rms_norm_reference(h, weight, None, EPS)[2]
    eager = rms_norm_backward_reference(*given, *needs)
    truth = rms_norm_backward_reference(dout, dh, h, weight, rstd, *needs)
    for name, one, plain, right in zip(("dx", "dweight"), got, eager, truth, strict=True):
        assert (one.shape, one.dtype) == (plain.shape, plain.dtype)
        if name == "dx" and h.shape[-1] == 1 and one.numel():
            # a norm of one number is its sign: the terms cancel, and roundings of them are left
            scale = max(largest(dout * weight * rstd), largest(right))
            check_identity(name, one, right.to(one.dtype), scale)
        else:
            check_as_accurate_as_eager(name, one, plain, right, GRADIENT_FACTOR)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("width", [1, 67, 1024, 4096, 4099, 9000])
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_gradients(dtype: torch.dtype, width: int, needs: tuple[bool, bool]) -> None:
    """Of x, or of the sum where it is used otherwise too, and of the weight; dout a slice."""
    g = torch.Generator().manual_seed(width)
    h, dh, double = (torch.randn(3, n, width, generator=g).to(DEVICE, dtype) for n in (2, 2, 4))
    dout, weight = double[:, ::2], torch.randn(width, generator=g).to(DEVICE, dtype)
    rstd = rms_norm_reference(h, weight, None, EPS)[2]
    for other in (None, dh):
        before = Counter(launch.counts)
        given = (dout, other, h, weight, rstd)
        got = torch.ops.adapter_kernels.rms_norm_backward(*given, *needs)
        assert launched(before) == {"rms_norm_backward_kernel": 1}
        check_gradients(got, given, needs)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize(
    ("rows", "width", "programs"),
    [(1, 16, 256), (256, 5, 256), (600, 16, 256), (5, 4104, 2), (7, 9000, 3)],
)
def test_the_weights_gradient_over_many_rows(
    rows: int, width: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than programs, in shares that end unevenly; twice the same, bit by bit."""
    from adapter_kernels import rms_norm_kernel

    monkeypatch.setattr(rms_norm_kernel, "PROGRAMS", programs)
    g = torch.Generator().manual_seed(rows)
    h, dout = (torch.randn(rows, width, generator=g).to(DEVICE) for _ in range(2))
    # of another dtype than x, as of a trained weight in a half-precision model
    h, weight = h.half(), torch.randn(width, generator=g).to(DEVICE)
    given = (dout.half(), None, h, weight, rms_norm_reference(h, weight, None, EPS)[2])
    op = torch.ops.adapter_kernels.rms_norm_backward
    got, again = (op(*given, True, True) for _ in range(2))
    for name, one, other in zip(("dx", "dweight"), got, again, strict=True):
        check_bitwise(name, one, other)
    assert [x.dtype for x in got] == [torch.float16, torch.float32]
    check_gradients(got, given, (True, True))


@pytest.mark.kernel
@needs_kernels
def test_gradients_of_no_rows() -> None:
    x = torch.zeros(0, 5, device=DEVICE).requires_grad_()
    weight = torch.ones(5, device=DEVICE).requires_grad_()
    dx, dweight = torch.autograd.grad(rms_norm(x, weight, eps=EPS).sum(), (x, weight))
    assert (dx.shape, dweight.tolist()) == ((0, 5), [0.0] * 5)


@pytest.mark.kernel
@needs_kernels
def test_the_ops_are_what_their_fakes_say() -> None:
    """Contiguous results, of transposed inputs too."""
    ops = torch.ops.adapter_kernels
    x, residual, dout = (torch.randn(67, 5, device=DEVICE).t() for _ in range(3))
    weight, rstd = torch.randn(67, device=DEVICE), torch.rand(5, 1, device=DEVICE)
    for added in (None, residual):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_(), added]
        torch.library.opcheck(ops.rms_norm.default, (*leaves, EPS))
        for needs in ((True, True), (True, False), (False, True)):
            given = (dout, added, x, weight, rstd, *needs)
            torch.library.opcheck(ops.rms_norm_backward.default, given)


@pytest.mark.kernel
@needs_kernels
def test_gradients_pass_through_the_kernels() -> None:
    """Of x, weight and residual; torch.compile takes it whole."""

    def step(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        out, h = rms_norm(x, weight, eps=EPS, residual=residual)
        return out.sin().sum() + h.square().sum()

    torch.manual_seed(3)
    shapes = ((5, 67), (67,), (5, 67))
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    n, h = rms_norm_reference(*leaves, EPS)[:2]
    expected = torch.autograd.grad(n.sin().sum() + h.square().sum(), leaves)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        before = Counter(launch.counts)
        got = torch.autograd.grad(function(*leaves), leaves)
        assert launched(before) == {"rms_norm_kernel": 1, "rms_norm_backward_kernel": 1}
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
