"""The gated activation of LLaMA's feed-forward layer.

In reading order: the equation and its analytic backward in plain torch, the torch.library ops, the
public function. Only the two inputs are kept for the backward, which recomputes the activation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import native
from .backend import LIBRARY, choose_backend, define, runs_kernels
from .checks import FLOATS, check_device, check_dtype, check_shape, passed_before


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, computed in at least float32."""
    precise = torch.promote_types(gate.dtype, torch.float32)
    return functional.silu(gate.to(precise)).mul_(up).to(gate.dtype)


def swiglu_backward_reference(
    dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup), of size 0 where not needed.

    With s = sigmoid(gate):
        dgate = dout * up * s * (1 + gate * (1 - s))        dup = dout * gate * s
    """
    dtype = gate.dtype
    gate = gate.to(torch.promote_types(dtype, torch.float32))
    dgate, dup = up.new_empty(0), up.new_empty(0)
    if need_dgate:
        # silu_backward(d, z) is d * s * (1 + z * (1 - s)) in one pass
        dgate = torch.ops.aten.silu_backward(dout * up.to(gate.dtype), gate).to(dtype)
    if need_dup:
        dup = functional.silu(gate).mul_(dout).to(dtype)
    return dgate, dup


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel where it runs, else the reference; contiguous."""
    if not runs_kernels(gate):
        return swiglu_reference(gate, up).contiguous()
    from .swiglu_kernel import forward

    return forward(gate, up)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _gradients(
    dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """The kernel where it runs, else the reference; contiguous."""
    if not runs_kernels(gate):
        dgate, dup = swiglu_backward_reference(dout, gate, up, need_dgate, need_dup)
        return dgate.contiguous(), dup.contiguous()
    from .swiglu_kernel import backward

    return backward(dout, gate, up, need_dgate, need_dup)


def _fake_gradients(
    dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    dgate = gate.new_empty(gate.shape if need_dgate else 0)
    return dgate, up.new_empty(up.shape if need_dup else 0)


define("swiglu(Tensor gate, Tensor up) -> Tensor", _forward, _fake)
define(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up, bool need_dgate, bool need_dup) "
    "-> (Tensor, Tensor)",
    _gradients,
    _fake_gradients,
)
_forward_op = torch.ops.adapter_kernels.swiglu.default
_backward_op = torch.ops.adapter_kernels.swiglu_backward.default


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if torch.is_grad_enabled():
        raise RuntimeError("swiglu is differentiable once: call backward without create_graph")
    need_dgate, need_dup = ctx.needs_input_grad
    dgate, dup = _backward_op(dout, *ctx.saved_tensors, need_dgate, need_dup)
    return dgate if need_dgate else None, dup if need_dup else None


torch.library.register_autograd(
    "adapter_kernels::swiglu", _backward, setup_context=_setup_context, lib=LIBRARY
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply one projection by the SiLU of another, the activation of LLaMA's feed-forward layer.

        out = silu(gate) * up        silu(z) = z * sigmoid(z)

    Computed in float32 and rounded once; differentiable in both arguments.

    Args:
        gate: (..., F), float16, bfloat16 or float32: the product with w1.
        up: like gate: the product with w3.

    Returns:
        out, like gate.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: Shazeer, GLU Variants Improve Transformer, equation 5.
    """
    if not torch.compiler.is_compiling():
        done = native.swiglu(gate, up)
        if done is not None:
            return done
    remember = passed_before("swiglu", gate, up)
    if remember is not None:
        check_dtype("gate", gate, FLOATS)
        check_shape("up", up, "that of gate", tuple(gate.shape))
        check_dtype("up", up, (gate.dtype,))
        check_device("up", up, "gate", gate)
        remember()
    able = ("triton",) if runs_kernels(gate) else ("reference",)
    choose_backend("swiglu", None, gate.device, able, gate, up)
    return _forward_op(gate, up)
