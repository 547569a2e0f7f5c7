"""swiglu against silu(gate) * up, its gradients, and its behaviour as an op."""

import importlib
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels import swiglu
from adapter_kernels.swiglu import swiglu_backward_reference
from tests.adapter_kernels.small_ops import (
    DTYPES,
    Spy,
    assert_as_accurate_as_eager,
    assert_equal,
    draw,
    gradients,
)

OPS = torch.ops.adapter_kernels


def formula(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def test_gradcheck_in_float64() -> None:
    torch.manual_seed(0)
    inputs = tuple(draw(2, 3, 7, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(OPS.swiglu, inputs)


def test_backward_is_the_documented_equation() -> None:
    dout, gate, up = (draw(5, 11, dtype=torch.float64, grad=False) for _ in range(3))
    s = torch.sigmoid(gate)
    dgate, dup = swiglu_backward_reference(dout, gate, up, True, True)
    torch.testing.assert_close(dgate, dout * up * s * (1 + gate * (1 - s)), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dup, dout * gate * s, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_output_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs = tuple(draw(3, 13, 131, dtype=dtype) for _ in range(2))
    assert_as_accurate_as_eager(
        lambda gate, up: (swiglu(gate, up),), lambda gate, up: (formula(gate, up),), inputs
    )


def test_float32_is_bitwise_the_formula() -> None:
    gate, up = draw(3, 129, grad=False), draw(3, 129, grad=False)
    assert torch.equal(swiglu(gate, up), formula(gate, up))


def test_strides_are_free() -> None:
    both = draw(3, 5, 26, dtype=torch.float16)
    gate, up = both[..., :13], both[..., 13:]
    out = swiglu(gate, up)
    apart = swiglu(gate.contiguous(), up.contiguous())
    assert_equal((out,), (apart,))
    assert_equal(gradients((out,), (both,)), gradients((apart,), (both,)))
    turned = draw(13, 5).t()
    assert torch.equal(swiglu(turned, turned), swiglu(turned.contiguous(), turned.contiguous()))


def test_large_inputs_stay_finite() -> None:
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]).requires_grad_()
    up = torch.ones(5)
    out = swiglu(gate, up)
    assert torch.equal(out.detach()[[0, 2, 4]], torch.tensor([0.0, 0.0, 1e4]))
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    assert torch.equal(dgate[[0, 2, 4]], torch.tensor([0.0, 0.5, 1.0]))


def test_computes_no_gradient_that_nobody_asked_for() -> None:
    for grads in ((True, False), (False, True), (True, True)):
        gate, up = (draw(3, 5, grad=grad) for grad in grads)
        with Spy() as spy:
            swiglu(gate, up).sum().backward()
        name, args, out = spy.calls[-1]
        assert name == "swiglu_backward"
        assert args[-2:] == grads
        assert [grad.numel() for grad in out] == [15 * grad for grad in grads]
        assert [gate.grad is not None, up.grad is not None] == list(grads)


def test_keeps_only_its_inputs() -> None:
    gate, up = draw(3, 5), draw(3, 5)
    with torch.no_grad():
        assert swiglu(gate, up).grad_fn is None
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), id):
        swiglu(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


def test_second_derivative_is_refused() -> None:
    gate = draw(3, 5)
    with pytest.raises(RuntimeError, match="swiglu is differentiable once"):
        torch.autograd.grad(swiglu(gate, gate).sum(), gate, create_graph=True)


def test_opcheck() -> None:
    gate, up = draw(2, 10)[:, ::2].detach().requires_grad_(), draw(2, 5)
    torch.library.opcheck(OPS.swiglu.default, (gate, up))
    arguments = (draw(2, 5, grad=False), gate.detach(), up.detach(), True, False)
    torch.library.opcheck(OPS.swiglu_backward.default, arguments)


def test_compiles_in_one_graph() -> None:
    inputs = (draw(3, 17), draw(3, 17))
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")(*inputs)
    plain = swiglu(*inputs)
    assert_equal((compiled,), (plain,))
    assert_equal(gradients((compiled,), inputs), gradients((plain,), inputs))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 5)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    gate, up = draw(*shape), draw(*shape)
    out = swiglu(gate, up)
    assert out.shape == shape
    assert [grad.shape for grad in gradients((out,), (gate, up))] == [shape, shape]


def test_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = importlib.import_module("adapter_kernels.swiglu")
    monkeypatch.setattr(module, "choose_backend", lambda *args: asked.append(args[:4]))
    swiglu(draw(2), draw(2))
    assert asked == [("swiglu", None, torch.device("cpu"), ("reference",))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": 1.0}, "gate must be a tensor, got float"),
        ({"gate": torch.ones(2, 3).long()}, "gate must be float16 or bfloat16 or float32, got int"),
        ({"up": None}, "up must be a tensor, got NoneType"),
        ({"up": torch.ones(3)}, "up must have shape that of gate = (2, 3), got (3,)"),
        ({"up": torch.ones(2, 3).bfloat16()}, "up must be float32, got bfloat16"),
        (
            {"up": torch.ones(2, 3, device="meta")},
            "up must be on the device of gate, cpu, got meta",
        ),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        swiglu(**{"gate": torch.ones(2, 3), "up": torch.ones(2, 3)} | change)
