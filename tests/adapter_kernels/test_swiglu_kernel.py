"""The kernels of swiglu: as accurate as the formulas, over halves of one product."""

from collections import Counter

import pytest
import torch

from adapter_kernels import launch, swiglu
from adapter_kernels.swiglu import swiglu_backward_reference, swiglu_reference
from tests.adapter_kernels.tolerances import GRADIENT_FACTOR, check_as_accurate_as_eager
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
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 131), (2, 1024), (7, 1025), (0, 8)])
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_gradients(dtype: torch.dtype, shape: tuple[int, ...], needs: tuple[bool, bool]) -> None:
    """Of halves of one product, and with a gradient from every second row of a larger one."""
    g = torch.Generator().manual_seed(shape[-1])
    product = (6 * torch.randn(*shape[:-1], 2 * shape[-1], generator=g)).to(DEVICE, dtype)
    gate, up = (
        x.detach().requires_grad_(need) for x, need in zip(product.chunk(2, -1), needs, strict=True)
    )
    dout = torch.randn(*shape[:-1], 2, shape[-1], generator=g).to(DEVICE, dtype)[..., 0, :]
    out = swiglu(gate, up)
    before = Counter(launch.counts)
    wanted = [x for x in (gate, up) if x.requires_grad]
    got = iter(torch.autograd.grad(out, wanted, dout))
    assert launched(before) == ({"swiglu_backward_kernel": 1} if gate.numel() else {})
    plain = (dout, gate.detach(), up.detach())
    eager = swiglu_backward_reference(*plain, *needs)
    truth = swiglu_backward_reference(*(x.double() for x in plain), *needs)
    for name, need, one, exact in zip(("dgate", "dup"), needs, eager, truth, strict=True):
        if need:
            found = next(got)
            assert (found.shape, found.dtype) == (shape, dtype)
            assert found.is_contiguous()
            check_as_accurate_as_eager(name, found, one, exact, GRADIENT_FACTOR)


@pytest.mark.kernel
@needs_kernels
def test_one_row_of_every_second_number() -> None:
    gate, up = (torch.randn(10, device=DEVICE)[::2] for _ in range(2))
    check_as_accurate_as_eager(
        "out",
        swiglu(gate, up),
        swiglu_reference(gate, up),
        swiglu_reference(gate.double(), up.double()),
    )


@pytest.mark.kernel
@needs_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_gradients_that_are_one_number_everywhere() -> None:
    """That of a sum has no strides; large values of the gate give no NaN."""
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], device=DEVICE).requires_grad_()
    up = torch.ones(5, device=DEVICE).requires_grad_()
    dgate, dup = torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))
    assert dgate[[0, 2, 3, 4]].tolist() == [0.0, 0.5, 1.0, 1.0]
    assert dup[[0, 2, 3, 4]].tolist() == [0.0, 0.0, 90.0, 1e4]
    assert bool(dgate.isfinite().all() and dup.isfinite().all())


@pytest.mark.kernel
@needs_kernels
def test_the_op_is_what_its_fake_says() -> None:
    """Contiguous results, of transposed inputs too; torch.compile takes it whole."""
    gate, up = (torch.randn(5, 67, device=DEVICE).t().requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.adapter_kernels.swiglu.default, (gate, up))
    arguments = (torch.randn(67, 5, device=DEVICE), gate.detach(), up.detach())
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.adapter_kernels.swiglu_backward.default, (*arguments, *needs)
        )
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for function in (compiled, swiglu):
        before = Counter(launch.counts)
        got = torch.autograd.grad(function(gate, up).sin().sum(), (gate, up))
        assert launched(before) == {"swiglu_kernel": 1, "swiglu_backward_kernel": 1}
        formula = torch.nn.functional.silu(gate) * up
        expected = torch.autograd.grad(formula.sin().sum(), (gate, up))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
