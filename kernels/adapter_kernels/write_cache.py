"""The writing of rotated keys and values into a cache.

In reading order: the equations in plain torch, the torch.library op, the public function. The cache
is the caller's: contiguous per sequence, or pages found through a table.
"""

from typing import overload

import torch
from torch import Tensor

from . import native
from .backend import choose_backend, define, runs_kernels
from .checks import (
    FEW,
    FLOATS,
    check_device,
    check_dtype,
    check_range,
    check_shape,
    check_values,
    passed_before,
)
from .rotary import check_angles, rotate_reference


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
    if page_table is None and k_cache.shape[0] == 1 and _all_exist(positions, k_cache.shape[1]):
        # the slots of one row are all there is to find
        slots = positions[0].long()
        k_cache[0].index_copy_(0, slots, k[0])
        v_cache[0].index_copy_(0, slots, v[0])
        return rotated
    row, column, valid = _find_slots(positions, page_table, k_cache.shape[0], k_cache.shape[1])
    if not bool(valid.all()):
        _check_slots(positions, page_table, k_cache)
        row, column, k, v = row.expand_as(valid)[valid], column[valid], k[valid], v[valid]
    k_cache.index_put_((row, column), k)
    v_cache.index_put_((row, column), v)
    return rotated


def _all_exist(positions: Tensor, slots: int) -> bool:
    """Whether every position has a slot, where a list of them costs less than a reduction."""
    if positions.device.type != "cpu" or not 0 < positions.numel() <= FEW:
        return False
    values = positions.flatten().tolist()
    return min(values) >= 0 and max(values) < slots


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
    if positions.device.type != "cpu":
        return
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


def _write_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *rest: Tensor | None
) -> Tensor:
    """The kernel where it runs and the caches' heads are contiguous, else the reference."""
    # the kernel moves pairs
    whole = k.shape[-1] % 2 == 0 and all(x.stride(-1) == 1 for x in (k_cache, v_cache))
    if not whole or not runs_kernels(k):
        return write_cache_reference(k, v, k_cache, v_cache, positions, *rest)
    from .rotary_kernel import write_cache

    _check_slots(positions, rest[0], k_cache)
    return write_cache(k, v, k_cache, v_cache, positions, *rest)


define(
    "write_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "Tensor? page_table, Tensor? cos, Tensor? sin, Tensor? q) -> Tensor",
    _write_cache,
    _write_cache_fake,
)
_write_op = torch.ops.adapter_kernels.write_cache.default


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
        check_angles(cos, sin, "k", k)


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
    if not torch.compiler.is_compiling():
        done = native.write_cache(*given)
        if done is not None:
            return None if q is None else done
    remember = passed_before("write_cache", *given)
    if remember is not None:
        _check_written(*given)
        remember()
    floats = (k, v, k_cache, v_cache, cos, sin, q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats):
        raise ValueError(
            "k, v, q, cos, sin and the caches must not require a gradient, because a cache is "
            "forward only: detach them or call under torch.no_grad()"
        )
    choose_backend("write_cache", None, k.device, ("triton" if runs_kernels(k) else "reference",))
    rotated = _write_op(*given)
    return None if q is None else rotated
