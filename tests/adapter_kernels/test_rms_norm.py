"""rms_norm against Meta's and transformers' formulas, its gradients, and its behaviour as an op."""

import importlib
import re

import pytest
import torch
from torch import Tensor

from adapter_kernels import rms_norm
from tests.adapter_kernels.small_ops import (
    DTYPES,
    Spy,
    assert_as_accurate_as_eager,
    assert_equal,
    draw,
    gradients,
)

OPS = torch.ops.adapter_kernels
EPS = 1e-5


def formula(x: Tensor, weight: Tensor) -> Tensor:
    """Meta's RMSNorm: the norm in at least float32, rounded before the product."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + EPS)
    return normed.to(x.dtype) * weight


@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 1), (11,)])
def test_gradcheck_in_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, residual = (draw(*s, dtype=torch.float64) for s in (shape, shape[-1:], shape))
    assert torch.autograd.gradcheck(
        lambda x, w, r: OPS.rms_norm(x, w, r, EPS)[:2], (x, weight, residual)
    )
    assert torch.autograd.gradcheck(lambda x, w: OPS.rms_norm(x, w, None, EPS)[0], (x, weight))


def test_float32_is_bitwise_both_published_norms() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(1)
    x, weight = draw(5, 13, 257, grad=False), draw(257, grad=False)
    module = llama.LlamaRMSNorm(257, eps=EPS)
    module.weight.data.copy_(weight)
    out = rms_norm(x, weight, eps=EPS)
    assert torch.equal(out, module(x))
    assert torch.equal(out, formula(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_outputs_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, weight, residual = (draw(*s, dtype=dtype) for s in ((5, 13, 67), (67,), (5, 13, 67)))
    assert_as_accurate_as_eager(
        lambda x, w: (rms_norm(x, w, eps=EPS),), lambda x, w: (formula(x, w),), (x, weight)
    )
    assert_as_accurate_as_eager(
        lambda x, w, r: rms_norm(x, w, eps=EPS, residual=r),
        lambda x, w, r: (formula(x + r, w), x + r),
        (x, weight, residual),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_equals_the_addition_outside(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    inputs = tuple(draw(*s, dtype=dtype) for s in ((4, 9, 31), (31,), (4, 9, 31)))
    x, weight, residual = inputs
    fused = rms_norm(x, weight, eps=EPS, residual=residual)
    h = x + residual
    apart = (rms_norm(h, weight, eps=EPS), h)
    assert_equal(fused, apart)
    assert_equal(gradients(fused[:1], inputs), gradients(apart[:1], inputs))


def test_gradient_through_the_sum_alone() -> None:
    x, weight, residual = draw(2, 5), draw(5), draw(2, 5)
    _, h = rms_norm(x, weight, eps=EPS, residual=residual)
    dh = torch.randn(2, 5)
    dx, dresidual, dweight = torch.autograd.grad(h, (x, residual, weight), dh, allow_unused=True)
    assert torch.equal(dx, dh)
    assert torch.equal(dresidual, dh)
    assert dweight is None


def test_weight_of_another_dtype_keeps_the_dtype_of_x() -> None:
    x, weight = draw(3, 19, dtype=torch.bfloat16, grad=False), draw(19)
    out = rms_norm(x, weight, eps=EPS)
    truth = formula(x.double(), weight.double())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, formula(x.float(), weight).bfloat16())
    assert (out - truth).abs().max() <= torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert torch.autograd.grad(out.float().sum(), weight)[0].dtype == torch.float32


def test_computes_no_gradient_that_nobody_asked_for() -> None:
    x, weight = draw(3, 5), draw(5)
    for grads in ((True, False), (False, True), (True, True)):
        used = [t.detach().requires_grad_(g) for t, g in zip((x, weight), grads, strict=True)]
        with Spy() as spy:
            rms_norm(*used, eps=EPS).sum().backward()
        name, args, out = spy.calls[-1]
        assert name == "rms_norm_backward"
        assert args[-2:] == grads
        assert [grad.numel() for grad in out] == [15 * grads[0], 5 * grads[1]]
        assert [tensor.grad is not None for tensor in used] == list(grads)


def test_keeps_nothing_without_a_gradient() -> None:
    x, weight = draw(3, 5), draw(5)
    with torch.no_grad():
        assert rms_norm(x, weight, eps=EPS).grad_fn is None
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        rms_norm(x, weight, eps=EPS)
    # x, the weight, one statistic a row
    assert sorted(saved) == [3, 5, 15]


def test_second_derivative_is_refused() -> None:
    x = draw(3, 5)
    out = rms_norm(x, draw(5), eps=EPS)
    with pytest.raises(RuntimeError, match="rms_norm is differentiable once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_opcheck() -> None:
    strided, weight, residual = draw(2, 3, 10)[..., ::2].detach(), draw(5), draw(2, 3, 5)
    x, dout = strided.requires_grad_(), draw(2, 3, 5, grad=False)
    torch.library.opcheck(OPS.rms_norm.default, (x, weight, residual, EPS))
    torch.library.opcheck(OPS.rms_norm.default, (x, weight.detach(), None, EPS))
    arguments = (dout, None, x.detach(), weight.detach(), torch.rand(2, 3, 1), True, True)
    torch.library.opcheck(OPS.rms_norm_backward.default, arguments)


def test_compiles_in_one_graph() -> None:
    def step(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, h = rms_norm(x, weight, eps=EPS, residual=residual)
        return out, h, rms_norm(h, weight, eps=EPS)

    inputs = (draw(2, 3, 17), draw(17), draw(2, 3, 17))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    plain = step(*inputs)
    assert_equal(compiled, plain)
    assert_equal(gradients(compiled, inputs), gradients(plain, inputs))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape), draw(5)
    out, h = rms_norm(x, weight, eps=EPS, residual=draw(*shape))
    assert out.shape == h.shape == shape
    dx, dweight = gradients((out,), (x, weight))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(5))


def test_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = importlib.import_module("adapter_kernels.rms_norm")
    monkeypatch.setattr(module, "choose_backend", lambda *args: asked.append(args[:4]))
    rms_norm(draw(2, 5), draw(5), eps=EPS)
    assert asked == [("rms_norm", None, torch.device("cpu"), ("reference",))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 5, dtype=torch.float64)}, "x must be float16 or bfloat16 or float32"),
        ({"x": torch.tensor(1.0)}, "x must have shape (..., C), got ()"),
        ({"weight": torch.ones(4)}, "weight must have shape (C,) = (5,), got (4,)"),
        ({"weight": torch.ones(5, dtype=torch.int32)}, "weight must be float16 or bfloat16"),
        (
            {"weight": torch.ones(5, device="meta")},
            "weight must be on the device of x, cpu, got meta",
        ),
        ({"eps": -1.0}, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be a finite number of at least 0, got nan"),
        (
            {"residual": torch.ones(5)},
            "residual must have shape that of x = (2, 5), got (5,)",
        ),
        ({"residual": torch.ones(2, 5).half()}, "residual must be float32, got float16"),
        (
            {"residual": torch.ones(2, 5, device="meta")},
            "residual must be on the device of x, cpu, got meta",
        ),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {"x": torch.ones(2, 5), "weight": torch.ones(5), "eps": EPS} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm(**arguments)
