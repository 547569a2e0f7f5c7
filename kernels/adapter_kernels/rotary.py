"""Rotary position embedding, and the writing of rotated keys and values into a cache.

In reading order: the equations in plain torch, the torch.library ops, the public functions. The
backward of a rotation is the rotation by the opposite angle. The cache is the caller's: contiguous
per sequence, or pages found through a table.
"""

from typing import Any, overload

import torch
from torch import Tensor

from .backend import LIBRARY, choose_backend, define, runs_kernels
from .checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_flag,
    check_range,
    check_shape,
    check_values,
    passed_before,
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


def write_cache_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q: Tensor | None,
) -> Tensor:
    """Write k, rotated where cos and sin are given, and v to their slots of the caches, in place.

    A token whose position, or whose page, does not exist is skipped. Returns q rotated, of size 0
    where there is none.
    """
    rotated = k.new_empty(0)
    if cos is not None and sin is not None:
        k, *turned = rotate_reference((k,) if q is None else (k, q), cos, sin, True)
        rotated = turned[0] if turned else rotated
    row, column, valid = _find_slots(positions, page_table, k_cache.shape[0], k_cache.shape[1])
    if not bool(valid.all()):
        _check_slots(positions, page_table, k_cache)
        row, column, k, v = row.expand_as(valid)[valid], column[valid], k[valid], v[valid]
    k_cache.index_put_((row, column), k)
    v_cache.index_put_((row, column), v)
    return rotated


def _find_slots(
    positions: Tensor, page_table: Tensor | None, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, column, valid): where in (rows, columns) each token goes, and if it can."""
    if page_table is None:
        row = torch.arange(rows, device=positions.device).unsqueeze(1)
        return row, positions.long(), (positions >= 0) & (positions < columns)
    valid = (positions >= 0) & (positions < page_table.shape[1] * columns)
    if page_table.shape[1] * columns == 0:
        return positions.long(), positions.long(), valid
    reachable = torch.where(valid, positions, 0).long()
    row = page_table.gather(1, reachable // columns).long()
    return row, reachable % columns, valid & (row >= 0) & (row < rows)


def _check_slots(positions: Tensor, page_table: Tensor | None, k_cache: Tensor) -> None:
    """Raise, for CPU tensors, unless every slot that is no -1 exists."""
    pages, columns = k_cache.shape[:2]
    slots = columns if page_table is None else page_table.shape[1] * columns
    check_range("positions", positions, -1, slots - 1)
    if page_table is not None:
        row, _, valid = _find_slots(positions, page_table, pages, columns)
        expected = f"from 0 to {pages - 1} where a position needs it"
        check_values("page_table", row, expected, lambda _: valid | (positions < 0))


def _write_cache_fake(k: Tensor, *rest: Tensor | None) -> Tensor:
    """The rotated q."""
    q = rest[-1]
    return k.new_empty(0 if q is None else q.shape)


def _apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The kernel where it runs, else the reference."""
    if not runs_kernels(q):
        return apply_rotary_reference(q, k, cos, sin, interleaved)
    from .rotary_kernel import apply_rotary

    return apply_rotary(q, k, cos, sin, interleaved)


def _write_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *rest: Tensor | None
) -> Tensor:
    """The kernel where it runs and the caches' heads are contiguous, else the reference."""
    whole = all(x.stride(-1) == 1 for x in (k_cache, v_cache))
    if not whole or not runs_kernels(k):
        return write_cache_reference(k, v, k_cache, v_cache, positions, *rest)
    from .rotary_kernel import write_cache

    # only on a CPU, where looking costs nothing
    _check_slots(positions, rest[0], k_cache)
    return write_cache(k, v, k_cache, v_cache, positions, *rest)


define(
    "apply_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) "
    "-> (Tensor, Tensor)",
    _apply_rotary,
    apply_rotary_reference,
)
define(
    "apply_rotary_backward(Tensor? dq_out, Tensor? dk_out, Tensor cos, Tensor sin, "
    "bool interleaved) -> (Tensor, Tensor)",
    apply_rotary_backward_reference,
    apply_rotary_backward_reference,
)
define(
    "write_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "Tensor? page_table, Tensor? cos, Tensor? sin, Tensor? q) -> Tensor",
    _write_cache,
    _write_cache_fake,
)
_forward_op = torch.ops.adapter_kernels.apply_rotary.default
_backward_op = torch.ops.adapter_kernels.apply_rotary_backward.default
_write_op = torch.ops.adapter_kernels.write_cache.default


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


def _check_angles(cos: Tensor, sin: Tensor, like_name: str, like: Tensor) -> None:
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
    _check_angles(cos, sin, "q", q)
    check_flag("interleaved", interleaved)
    able = ("triton",) if runs_kernels(q) else ("reference",)
    choose_backend("apply_rotary", None, q.device, able, q, k)
    return _forward_op(q, k, cos, sin, interleaved)


def _check_written(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q: Tensor | None,
) -> None:
    """Raise unless the arguments of write_cache have the form that it says."""
    check_shape("k", k, "(B, T, G, D)", (None, None, None, None))
    check_dtype("k", k, FLOATS)
    batch, tokens, groups, head_dim = k.shape
    check_shape("v", v, "that of k", tuple(k.shape))
    if page_table is None:
        check_shape("k_cache", k_cache, "(B, S_max, G, D)", (batch, None, groups, head_dim))
    else:
        check_shape("k_cache", k_cache, "(N, page, G, D)", (None, None, groups, head_dim))
        check_shape("page_table", page_table, "(B, max_pages)", (batch, None))
        check_dtype("page_table", page_table, (torch.int32,))
        check_device("page_table", page_table, "k", k)
    check_shape("v_cache", v_cache, "that of k_cache", tuple(k_cache.shape))
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, tensor, (k.dtype,))
        check_device(name, tensor, "k", k)
    if q is not None:
        check_shape("q", q, "(B, T, H, D)", (batch, tokens, None, head_dim))
        check_dtype("q", q, (k.dtype,))
        check_device("q", q, "k", k)
        if cos is None:
            raise ValueError("cos and sin must be given with q, which is only rotated, got None")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        layout = zip(cache.shape, cache.stride(), strict=True)
        if cache.numel() and any(size > 1 and step == 0 for size, step in layout):
            raise ValueError(f"{name} must have memory for every slot, got an expanded tensor")
    check_shape("positions", positions, "(B, T)", (batch, tokens))
    check_dtype("positions", positions, (torch.int32, torch.int64))
    check_device("positions", positions, "k", k)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must both be given or both be None")
    if cos is not None and sin is not None:
        _check_angles(cos, sin, "k", k)


@overload
def write_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    page_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q: None = None,
) -> None:
    """Return nothing."""


@overload
def write_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    page_table: Tensor | None = None,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
) -> Tensor:
    """Return the rotated q."""


def write_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    page_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor | None:
    """Write new keys and values into the caches, in place; nothing else in them is touched.

        k_cache[b, positions[b, t]] = rotate(k[b, t])        v_cache[b, positions[b, t]] = v[b, t]

    With a page table the slot is page page_table[b, position // page] at offset position % page.
    Forward only. Two tokens of one slot leave either of them there.

    Args:
        k, v: (B, T, G, D), float16, bfloat16 or float32.
        k_cache, v_cache: (B, S_max, G, D), or pages (N, page, G, D); like k.
        positions: (B, T), int32 or int64, slot of each token in its sequence's cache; -1 skips it.
        page_table: (B, max_pages), int32, pages of each sequence in order.
        cos, sin: (T, D/2) or (B, T, D/2): both given rotate k in Meta's pairs, as
            `apply_rotary(..., interleaved=True)`; both None write k as it is.
        q: (B, T, H, D), like k: with cos and sin, to be rotated by the same launch.

    Returns:
        Rotated q, a new tensor, where q is given; else None.

    Raises:
        ValueError: a shape, dtype or device is not as above, something requires a gradient, a
            cache is expanded, or, on the CPU, a position or the page of one is out of range (on
            CUDA it is skipped).

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, section 4 (pages); Su et al., RoFormer, equation 34 (the rotation).
    """
    given = (k, v, k_cache, v_cache, positions, page_table, cos, sin, q)
    remember = passed_before("write_cache", *given)
    if remember is not None:
        _check_written(*given)
        remember()
    written = (k, v, k_cache, v_cache) if q is None else (k, v, k_cache, v_cache, q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in written):
        raise ValueError(
            "k, v, q and the caches must not require a gradient, because a cache is forward only: "
            "detach them or call under torch.no_grad()"
        )
    choose_backend("write_cache", None, k.device, ("triton" if runs_kernels(k) else "reference",))
    rotated = _write_op(*given)
    return None if q is None else rotated
