"""The kernel of apply_rotary, its backward, and write_cache: turn queries and keys, put keys away.

One launch does all of a decoding step's: it reads every new q, k and v once, and writes each once.
A backward is the same launch with the angles the other way round.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

# heads of a program: enough bytes for one warp, few enough that one token fills a GPU
HEADS = 4
CONTIGUOUS = torch.contiguous_format


@triton.jit
def _pairs(
    ptr, offsets, exists,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Pairs (a, b) of heads at offsets (M), each (M, HALF) in float32.

    Neighbours are loaded side by side and taken apart in registers: apart they would be loaded one
    number at a time.
    """
    if INTERLEAVED:
        i = tl.arange(0, 2 * HALF)
        mask = exists[:, None] & (i < HEAD_DIM)[None, :]
        both = tl.load(ptr + offsets[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], HALF, 2)))
    else:
        i = tl.arange(0, HALF)
        mask = exists[:, None] & (i < HEAD_DIM // 2)[None, :]
        first = ptr + offsets[:, None] + i[None, :]
        a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(first + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _turned(
    ptr, offsets, exists, cos_ptr, sin_ptr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Pairs (a, b) of heads at offsets (M), each (M, HALF), turned by the angles of their token."""
    a, b = _pairs(ptr, offsets, exists, HEAD_DIM, HALF, INTERLEAVED)
    if cos_ptr is not None:
        i = tl.arange(0, HALF)
        inside = i < HEAD_DIM // 2
        cos = tl.load(cos_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        if BACK:
            sin = -sin
        a, b = a * cos - b * sin, b * cos + a * sin
    return a, b


@triton.jit
def _put(
    ptr, offsets, exists, a, b, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store pairs where they belong, rounded to the dtype of the place."""
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        i = tl.arange(0, 2 * HALF)
        mask = exists[:, None] & (i < HEAD_DIM)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * HALF))
        tl.store(ptr + offsets[:, None] + i[None, :], both.to(dtype), mask=mask)
    else:
        i = tl.arange(0, HALF)
        mask = exists[:, None] & (i < HEAD_DIM // 2)[None, :]
        first = ptr + offsets[:, None] + i[None, :]
        tl.store(first, a.to(dtype), mask=mask)
        tl.store(first + HEAD_DIM // 2, b.to(dtype), mask=mask)


@triton.jit
def _slot(
    positions_ptr, page_table_ptr, token, b, t, slots, pages, stride_table, PAGE: tl.constexpr
):
    """Row and column of a token's place, and whether it has one: a page's, or its sequence's."""
    row, column = b.to(tl.int64), t.to(tl.int64)
    valid = column >= 0
    if positions_ptr is not None:
        column = tl.load(positions_ptr + token).to(tl.int64)
        valid = (column >= 0) & (column < slots)
        if page_table_ptr is not None:
            entry = page_table_ptr + row * stride_table + column // PAGE
            row = tl.load(entry, mask=valid, other=-1).to(tl.int64)
            valid = valid & (row >= 0) & (row < pages)
            column = column % PAGE
    return row, column, valid


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, positions_ptr,
    page_table_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kg,
    stride_vb, stride_vt, stride_vg, stride_cb, stride_ct, stride_sb, stride_st,
    stride_qob, stride_qot, stride_qoh,
    stride_kob, stride_kot, stride_kog, stride_vob, stride_vot, stride_vog,
    T, H, G, slots, pages, stride_table, q_tiles, g_tiles, tiles,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token; those of q first, then k's, then v's."""
    pid = tl.program_id(0)
    token, tile = pid // tiles, pid % tiles
    b, t = token // T, token % T
    if cos_ptr is not None:
        cos_ptr += b.to(tl.int64) * stride_cb + t.to(tl.int64) * stride_ct
        sin_ptr += b.to(tl.int64) * stride_sb + t.to(tl.int64) * stride_st
    heads = tl.arange(0, BLOCK_H).to(tl.int64)
    of_q = tile < q_tiles
    if of_q:
        if q_ptr is not None:
            head = tile * BLOCK_H + heads
            source = b.to(tl.int64) * stride_qb + t.to(tl.int64) * stride_qt + head * stride_qh
            x, y = _turned(
                q_ptr, source, head < H, cos_ptr, sin_ptr, HEAD_DIM, HALF, INTERLEAVED, BACK
            )
            place = b.to(tl.int64) * stride_qob + t.to(tl.int64) * stride_qot + head * stride_qoh
            _put(q_out_ptr, place, head < H, x, y, HEAD_DIM, HALF, INTERLEAVED)
    else:
        row, column, valid = _slot(
            positions_ptr, page_table_ptr, token, b, t, slots, pages, stride_table, PAGE
        )
        head = (tile - q_tiles) % g_tiles * BLOCK_H + heads
        exists = (head < G) & valid
        of_k = tile < q_tiles + g_tiles
        if of_k:
            source = b.to(tl.int64) * stride_kb + t.to(tl.int64) * stride_kt + head * stride_kg
            x, y = _turned(
                k_ptr, source, exists, cos_ptr, sin_ptr, HEAD_DIM, HALF, INTERLEAVED, BACK
            )
            place = row * stride_kob + column * stride_kot + head * stride_kog
            _put(k_out_ptr, place, exists, x, y, HEAD_DIM, HALF, INTERLEAVED)
        else:
            if v_ptr is not None:
                source = b.to(tl.int64) * stride_vb + t.to(tl.int64) * stride_vt
                source += head * stride_vg
                x, y = _turned(v_ptr, source, exists, None, None, HEAD_DIM, HALF, INTERLEAVED, BACK)
                place = row * stride_vob + column * stride_vot + head * stride_vog
                _put(v_out_ptr, place, exists, x, y, HEAD_DIM, HALF, INTERLEAVED)


def _strides(letters: str, x: Tensor | None, names: str) -> dict[str, int]:
    steps = (0,) * len(names) if x is None else x.stride()[: len(names)]
    return {f"stride_{letters}{name}": step for name, step in zip(names, steps, strict=True)}


def rotary_launch(
    q: Tensor | None, k: Tensor, v: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    q_out: Tensor | None, k_out: Tensor, v_out: Tensor | None, positions: Tensor | None,
    page_table: Tensor | None, interleaved: bool, back: bool = False,
) -> Launch:  # fmt: skip
    """The launch that turns q and k, where there are angles, and puts k and v in their places.

    Args:
        q, k, v: (B, T, heads, D); q and v may be absent.
        cos, sin: (B, T, D/2), or both absent.
        q_out: like q.
        k_out, v_out: like k and v; or with positions caches (B, S, G, D), with a table pages.
        positions: (B, T) slots; others than the cache has are skipped.
        page_table: (B, max_pages).
        interleaved: whether pairs are neighbours.
        back: whether to turn by the opposite angles.
    """
    batch, tokens, groups, width = k.shape
    heads = 0 if q is None else q.shape[2]
    q_tiles, g_tiles = -(-heads // HEADS), -(-groups // HEADS)
    tiles = q_tiles + (1 if v is None else 2) * g_tiles
    page = k_out.shape[1]
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "q_out_ptr": q_out,
        "k_out_ptr": k_out,
        "v_out_ptr": v_out,
        "positions_ptr": positions,
        "page_table_ptr": page_table,
        **_strides("q", q, "bth"),
        **_strides("k", k, "btg"),
        **_strides("v", v, "btg"),
        **_strides("c", cos, "bt"),
        **_strides("s", sin, "bt"),
        **_strides("qo", q_out, "bth"),
        **_strides("ko", k_out, "btg"),
        **_strides("vo", v_out, "btg"),
        "T": tokens,
        "H": heads,
        "G": groups,
        "slots": page * (1 if page_table is None else page_table.shape[1]),
        "pages": k_out.shape[0],
        "stride_table": 0 if page_table is None else page_table.stride(0),
        "q_tiles": q_tiles,
        "g_tiles": g_tiles,
        "tiles": tiles,
        "HEAD_DIM": width,
        "HALF": max(1, 1 << (width // 2 - 1).bit_length()),
        "BLOCK_H": HEADS,
        "PAGE": max(page, 1),
        "INTERLEAVED": interleaved,
        "BACK": back,
    }
    return Launch(_rotary_kernel, batch * tokens * tiles, arguments, 1, 1)


def _angles(x: Tensor | None, batch: int) -> Tensor | None:
    """(B, T, D/2) of (T, D/2) or (B, T, D/2), a row's angles side by side."""
    if x is None:
        return None
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 3 else x.expand(batch, *x.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """As apply_rotary_reference."""
    q_out, k_out = torch.empty_like(q.contiguous()), torch.empty_like(k.contiguous())
    c, s = _angles(cos, q.shape[0]), _angles(sin, q.shape[0])
    rotary_launch(_rows(q), _rows(k), None, c, s, q_out, k_out, None, None, None, interleaved).run()
    return q_out, k_out


def apply_rotary_backward(
    dq_out: Tensor | None, dk_out: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """As apply_rotary_backward_reference: one launch turns what there is."""
    dq, dk = (
        cos.new_empty(0) if x is None else torch.empty_like(x, memory_format=CONTIGUOUS)
        for x in (dq_out, dk_out)
    )
    given = [(_rows(x), place) for x, place in ((dq_out, dq), (dk_out, dk)) if x is not None]
    # a gradient alone takes the place of k
    k, k_out = given[-1]
    q, q_out = (None, None) if len(given) == 1 else given[0]
    c, s = _angles(cos, k.shape[0]), _angles(sin, k.shape[0])
    rotary_launch(q, k, None, c, s, q_out, k_out, None, None, None, interleaved, back=True).run()
    return dq, dk


def write_cache(
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
    """As write_cache_reference; what has no slot is skipped, and nobody waits to know."""
    cos, sin = (_angles(x, k.shape[0]) for x in (cos, sin))
    table = None if page_table is None else page_table.contiguous()
    rotated = k.new_empty(0) if q is None else torch.empty_like(q, memory_format=CONTIGUOUS)
    q, q_out = (None, None) if q is None else (_rows(q), rotated)
    rotary_launch(
        q, _rows(k), _rows(v), cos, sin, q_out, k_cache, v_cache, positions.contiguous(), table,
        True,
    ).run()  # fmt: skip
    return rotated
