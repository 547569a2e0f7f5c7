"""Rotary position embedding.

In reading order: the equations in plain torch, the torch.library ops, the public function. The
backward of a rotation is the rotation by the opposite angle.
"""

from typing import Any

import torch
from torch import Tensor

from .backend import LIBRARY, choose_backend, define, runs_kernels
from .checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_flag,
    check_shape,
)


def rotate_reference(
    xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, ...]:
    """Return (a cos - b sin, b cos + a sin) for each pair (a, b) of each head's dimensions.

    The pairs are neighbours where `interleaved`, and the formula is (a + ib)(cos + i sin); else
    they are the two halves of the head.
    """
    precise = torch.promote_types(xs[0].dtype, torch.float32) if xs else torch.float32
    cos, sin = cos.to(precise).unsqueeze(-2), sin.to(precise).unsqueeze(-2)
    rotated = []
    if interleaved:
        turn = torch.complex(cos, sin)
        for x in xs:
            # a contiguous copy, because a complex view needs even strides and offset
            out = x.to(precise, copy=True, memory_format=torch.contiguous_format)
            torch.view_as_complex(out.view(*x.shape[:-1], x.shape[-1] // 2, 2)).mul_(turn)
            rotated.append(out.to(x.dtype))
        return tuple(rotated)
    for x in xs:
        out = torch.empty(x.shape, dtype=precise, device=x.device)
        (a, b), (out_a, out_b) = x.to(precise).chunk(2, -1), out.chunk(2, -1)
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin)
        rotated.append(out.to(x.dtype))
    return tuple(rotated)


def apply_rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated."""
    q, k = rotate_reference((q, k), cos, sin, interleaved)
    return q, k


def apply_rotary_backward_reference(
    dq_out: Tensor | None, dk_out: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Return (dq, dk), the gradients rotated back; of size 0 where there is none."""
    given = tuple(grad for grad in (dq_out, dk_out) if grad is not None)
    back = iter(rotate_reference(given, cos, -sin, interleaved))
    dq = cos.new_empty(0) if dq_out is None else next(back)
    dk = cos.new_empty(0) if dk_out is None else next(back)
    return dq, dk


def _apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The kernel where it runs, else the reference."""
    if not runs_kernels(q):
        return apply_rotary_reference(q, k, cos, sin, interleaved)
    from .rotary_kernel import apply_rotary

    return apply_rotary(q, k, cos, sin, interleaved)


def _apply_rotary_backward(
    dq_out: Tensor | None, dk_out: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The kernel where it runs, else the reference."""
    first = dk_out if dq_out is None else dq_out
    if first is None or not runs_kernels(first):
        return apply_rotary_backward_reference(dq_out, dk_out, cos, sin, interleaved)
    from .rotary_kernel import apply_rotary_backward

    return apply_rotary_backward(dq_out, dk_out, cos, sin, interleaved)


define(
    "apply_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) "
    "-> (Tensor, Tensor)",
    _apply_rotary,
    apply_rotary_reference,
)
define(
    "apply_rotary_backward(Tensor? dq_out, Tensor? dk_out, Tensor cos, Tensor sin, "
    "bool interleaved) -> (Tensor, Tensor)",
    _apply_rotary_backward,
    apply_rotary_backward_reference,
)
_forward_op = torch.ops.adapter_kernels.apply_rotary.default
_backward_op = torch.ops.adapter_kernels.apply_rotary_backward.default


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool],
    output: tuple[Tensor, Tensor],
) -> None:
    _, _, cos, sin, interleaved = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.interleaved = interleaved


def _backward(
    ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "apply_rotary is differentiable once: call backward without create_graph"
        )
    need_dq = ctx.needs_input_grad[0] and dq_out is not None
    need_dk = ctx.needs_input_grad[1] and dk_out is not None
    dq, dk = _backward_op(
        dq_out if need_dq else None,
        dk_out if need_dk else None,
        *ctx.saved_tensors,
        ctx.interleaved,
    )
    return dq if need_dq else None, dk if need_dk else None, None, None, None


torch.library.register_autograd(
    "adapter_kernels::apply_rotary", _backward, setup_context=_setup_context, lib=LIBRARY
)


def check_angles(cos: Tensor, sin: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless cos and sin have one row of D/2 angles for each token of `like`."""
    batch, tokens, _, head_dim = like.shape
    if head_dim % 2:
        raise ValueError(f"{like_name} must have an even head_dim D, got {head_dim}")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_dtype(name, angles, FLOATS)
        sizes = (tokens, head_dim // 2)
        check_shape(name, angles, "(T, D/2)", sizes, ("(B, T, D/2)", (batch, *sizes)))
        check_device(name, angles, like_name, like)


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs of dimensions of every query and key by the angles of its position.

        (a, b) -> (a cos - b sin, b cos + a sin)

    Computed in float32 and rounded once; differentiable in q and k.

    Args:
        q: (B, T, H, D), float16, bfloat16 or float32, D even.
        k: (B, T, G, D), like q.
        cos, sin: (T, D/2) or (B, T, D/2), any of these dtypes, of the angles of each position.
        interleaved: True pairs dimensions (2i, 2i + 1), as Meta's weights expect; False pairs
            (i, i + D/2), as transformers' do. Permuting the rows of wq and wk turns one into
            the other.

    Returns:
        The rotated (q, k), new tensors like the arguments.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: Su et al., RoFormer, equation 34.
    """
    check_shape("q", q, "(B, T, H, D)", (None, None, None, None))
    check_dtype("q", q, FLOATS)
    batch, tokens, _, head_dim = q.shape
    check_shape("k", k, "(B, T, G, D)", (batch, tokens, None, head_dim))
    check_dtype("k", k, (q.dtype,))
    check_device("k", k, "q", q)
    check_angles(cos, sin, "q", q)
    check_flag("interleaved", interleaved)
    able = ("triton",) if runs_kernels(q) else ("reference",)
    choose_backend("apply_rotary", None, q.device, able, q, k)
    return _forward_op(q, k, cos, sin, interleaved)
