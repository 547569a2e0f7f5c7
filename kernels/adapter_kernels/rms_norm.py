"""Root mean square normalisation, alone or fused with the residual addition before it.

In reading order: the equation and its analytic backward in plain torch, the torch.library ops, the
public function. The statistics and the product with the weight are float32 whatever the input;
the result is rounded to the input's dtype once.
"""

from typing import Any, overload

import torch
from torch import Tensor

from . import native
from .backend import LIBRARY, choose_backend, define, runs_kernels
from .checks import FLOATS, check_device, check_dtype, check_number, check_shape, passed_before


def rms_norm_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, h, rstd) with h = x + residual, of size 0 where there is no residual."""
    h = x if residual is None else x + residual
    precise = h.to(torch.promote_types(h.dtype, torch.float32))
    rstd = precise.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    out = (precise * rstd).mul_(weight).to(h.dtype)
    return out, h.new_empty(0) if residual is None else h, rstd


def rms_norm_backward_reference(
    dout: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), of size 0 where not needed.

    With dn = dout * weight:
        dx = rstd * (dn - h * rstd^2 * mean(dn * h)) + dh
        dweight = sum over rows of dout * h * rstd
    `dh` is the gradient that reaches h = x + residual from its other uses; dx serves both terms.
    """
    precise = h.to(rstd.dtype)
    dx, dweight = h.new_empty(0), weight.new_empty(0)
    if need_dx:
        dnormalised = dout.to(rstd.dtype) * weight
        pull = (dnormalised * precise).mean(-1, keepdim=True).mul_(rstd.square()).neg_()
        dnormalised.addcmul_(precise, pull).mul_(rstd)
        dx = (dnormalised if dh is None else dnormalised.add_(dh)).to(h.dtype)
    if need_dweight:
        dweight = (dout * precise).mul_(rstd).sum_to_size(weight.shape).to(weight.dtype)
    return dx, dweight


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel where it runs, else the reference; contiguous."""
    if not runs_kernels(x):
        out, h, rstd = rms_norm_reference(x, weight, residual, eps)
        return out.contiguous(), h.contiguous(), rstd.contiguous()
    from .rms_norm_kernel import forward

    return forward(x, weight, residual, eps)


def _fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0 if residual is None else x.shape)
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), h, x.new_empty((*x.shape[:-1], 1), dtype=precise)


def _gradients(
    dout: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """The kernel where it runs, else the reference; contiguous."""
    given = (dout, dh, h, weight, rstd, need_dx, need_dweight)
    if not runs_kernels(h):
        dx, dweight = rms_norm_backward_reference(*given)
        return dx.contiguous(), dweight.contiguous()
    from .rms_norm_kernel import backward

    return backward(*given)


def _fake_gradients(
    dout: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx = h.new_empty(h.shape if need_dx else 0)
    return dx, weight.new_empty(weight.shape if need_dweight else 0)


define(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "rms_norm_backward(Tensor dout, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, "
    "bool need_dx, bool need_dweight) -> (Tensor, Tensor)",
    _gradients,
    _fake_gradients,
)
_forward_op = torch.ops.adapter_kernels.rms_norm.default
_backward_op = torch.ops.adapter_kernels.rms_norm_backward.default


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, weight, residual, _ = inputs
    _, h, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((h, rstd) if residual is None else (rstd,)))
    ctx.save_for_backward(x if residual is None else h, weight, rstd)


def _backward(
    ctx: Any,
    dout: Tensor | None,
    dh: Tensor | None,
    _drstd: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("rms_norm is differentiable once: call backward without create_graph")
    need_x, need_weight, need_residual, _ = ctx.needs_input_grad
    if dout is None:
        return dh, None, dh if need_residual else None, None
    need_dx = need_x or need_residual
    dx, dweight = _backward_op(dout, dh, *ctx.saved_tensors, need_dx, need_weight)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dx if need_residual else None,
        None,
    )


torch.library.register_autograd(
    "adapter_kernels::rms_norm", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    """Raise unless the arguments have the form that rms_norm says."""
    check_dtype("x", x, FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., C), got ()")
    check_shape("weight", weight, "(C,)", (x.shape[-1],))
    check_dtype("weight", weight, FLOATS)
    check_device("weight", weight, "x", x)
    check_number("eps", eps, 0.0)
    if residual is not None:
        check_shape("residual", residual, "that of x", tuple(x.shape))
        check_dtype("residual", residual, (x.dtype,))
        check_device("residual", residual, "x", x)


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: None = None) -> Tensor:
    """Return out."""


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, x + residual)."""


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide each row by its root mean square and scale it, after an optional residual addition.

        h = x + residual        out = weight * h / sqrt(mean(h ** 2) + eps)

    h is rounded to the dtype of x before it is normalised, as if it had been added outside. The
    statistics and the product with the weight are float32 and out is rounded once. In float32 the
    reference is bitwise Meta's RMSNorm and transformers' LlamaRMSNorm, in half precision both round
    once more, before the product. Differentiable in x, weight and residual.

    Args:
        x: (..., C), float16, bfloat16 or float32.
        weight: (C,), float16, bfloat16 or float32.
        eps: added to the mean square, greater than or equal to 0.
        residual: like x, the stream that x is added to.

    Returns:
        out, like x; with a residual the pair (out, h).

    Raises:
        ValueError: a shape, dtype, device or eps is not as above.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, equation 4.
    """
    if not torch.compiler.is_compiling():
        done = native.rms_norm(x, weight, eps, residual)
        if done is not None:
            return done
    remember = passed_before("rms_norm", x, weight, eps, residual)
    if remember is not None:
        _check(x, weight, eps, residual)
        remember()
    able = ("triton",) if runs_kernels(x) else ("reference",)
    choose_backend("rms_norm", None, x.device, able, x, weight, residual)
    out, h, _ = _forward_op(x, weight, residual, eps)
    return out if residual is None else (out, h)
