"""Decoding over a cache: the newest tokens of every sequence against all of its cached keys.

In reading order: the packed rows of a tile, the kernel of one split of the keys, the kernel that
combines the splits and adds the prompt, their launchers. Splits are of one size, whatever the
batch: a sequence's bits do not depend on the others. Lengths are read on the device.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .configs import TileConfig
from .forward import add_prompt, attend_band
from .kernel_arguments import (
    page_arguments,
    prompt_arguments,
    row_strides,
    shape_arguments,
    tiles_of,
)
from .layouts import Prompts
from .tiles import bank_row, far, load_at, load_gate, row_pointers

# keys of a split, a multiple of every tile of keys: few enough that one sequence fills a GPU, many
# enough that a split's result is small beside its keys
SPLIT = 256


@triton.jit
def _packed_rows(pid, T, G, m_tiles, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which rows a program has: those of all T tokens of all query heads of key head g.

    Returns b, g, and of every row (BLOCK_M) its number, head, token, and whether it exists.
    """
    tile, bg = pid % m_tiles, pid // m_tiles
    b, g = bg // G, bg % G
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return b, g, rows, g * GROUP + rows // T, rows % T, rows < GROUP * T


@triton.jit
def _cached(cache_lengths_ptr, b, S):
    """Sequence b's cached keys, within its cache."""
    return tl.minimum(tl.maximum(tl.load(cache_lengths_ptr + b), 0), S)


@triton.jit
def _load_packed(
    ptr, stride_b, stride_t, stride_h, b, head, token, exists, offs_d,
    HEAD_DIM: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Packed rows of q (BLOCK_M, BLOCK_D), times the sign of the scale."""
    offsets = head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t
    q = load_at(ptr + far(b, stride_b), offsets, exists, offs_d, HEAD_DIM, True)
    return q if SIGN == 1 else (q * SIGN).to(q.dtype)


@triton.jit
def _finish(
    acc, q, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, adapter_index_ptr, prompt_lengths_ptr,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    stride_ob, stride_ot, stride_oh, b, g, head, token, exists, offset, P, A, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Add the gated prompt to the tokens' output acc (BLOCK_M, BLOCK_D) and store the result."""
    if prompt_k_ptr is not None:
        row, length = bank_row(adapter_index_ptr, prompt_lengths_ptr, b, P, A)
        gate_ptr += far(row, stride_gb) + head.to(tl.int64) * stride_gh
        gate = load_gate(gate_ptr, length, exists)
        prompt_k_ptr += far(row, stride_pkb) + far(g, stride_pkg)
        prompt_v_ptr += far(row, stride_pvb) + far(g, stride_pvg)
        acc = add_prompt(
            acc, q, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, length, gate, P, offs_d,
            scale_log2, HEAD_DIM, BLOCK_P, MANY,
        )  # fmt: skip
    # a token before the start of its sequence is none: an empty slot of a batch gives 0
    acc = tl.where((token + offset >= 0)[:, None], acc, 0.0)
    offsets = head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_ot
    ptrs = row_pointers(out_ptr + far(b, stride_ob), offsets, offs_d)
    mask = exists[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, partial_ptr, lse_ptr,
    k_scale_ptr, v_scale_ptr, adapter_index_ptr, prompt_lengths_ptr, cache_lengths_ptr,
    page_table_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    stride_ob, stride_ot, stride_oh,
    T, S, G, P, A, pages, stride_table, m_tiles, splits, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PAGE: tl.constexpr, MANY: tl.constexpr,
    SIGN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of packed rows against KEYS cached keys.

    With partial_ptr it leaves its own output (B, G, splits, rows, D) in float32 and its lse, in
    units of log2, (B, G, splits, rows); later splits than a sequence's last leave nothing. Without,
    there is one split, and the result is stored.
    """
    pid = tl.program_id(0)
    split = pid % splits
    b, g, rows, head, token, exists = _packed_rows(pid // splits, T, G, m_tiles, GROUP, BLOCK_M)
    length = _cached(cache_lengths_ptr, b, S)
    low = split * KEYS
    if (low > 0) & (low >= length):
        return
    offset = length - T
    offs_d = tl.arange(0, BLOCK_D)
    q = _load_packed(
        q_ptr, stride_qb, stride_qt, stride_qh, b, head, token, exists, offs_d, HEAD_DIM, SIGN
    )
    k_ptr += far(g, stride_kg)
    v_ptr += far(g, stride_vg)
    if page_table_ptr is None:
        k_ptr += far(b, stride_kb)
        v_ptr += far(b, stride_vb)
    else:
        page_table_ptr += far(b, stride_table)
    token_scale = scale_log2
    if k_scale_ptr is not None:
        token_scale *= tl.load(k_scale_ptr + g)
    high = tl.minimum(low + KEYS, length)
    # the first token, which sees fewest, sees keys up to `offset`
    full = tl.minimum(tl.maximum(offset + 1, low), high) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, row_max, row_sum = attend_band(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kb, stride_ks, stride_vb, stride_vs,
        page_table_ptr, pages, low, full, 0, length, token, offset, offs_d, token_scale,
        HEAD_DIM, BLOCK_N, PAGE, True, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend_band(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kb, stride_ks, stride_vb, stride_vs,
        page_table_ptr, pages, full, high, 0, length, token, offset, offs_d, token_scale,
        HEAD_DIM, BLOCK_N, PAGE, True, True,
    )  # fmt: skip
    # rows that see no key of this split: output 0, lse -inf
    blind = row_sum == 0
    row_sum = tl.where(blind, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + g)
    if partial_ptr is not None:
        first = (far(b, G) + g) * splits + split
        lse = tl.where(blind, float("-inf"), row_max * token_scale + tl.math.log2(row_sum))
        tl.store(lse_ptr + first * (GROUP * T) + rows, lse, mask=exists)
        partial_ptr += first * (GROUP * T * HEAD_DIM)
        ptrs = row_pointers(partial_ptr, rows.to(tl.int64) * HEAD_DIM, offs_d)
        tl.store(ptrs, acc, mask=exists[:, None] & (offs_d < HEAD_DIM)[None, :])
    else:
        _finish(
            acc, q, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, adapter_index_ptr,
            prompt_lengths_ptr, stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp,
            stride_pvg, stride_gb, stride_gh, stride_ob, stride_ot, stride_oh, b, g, head, token,
            exists, offset, P, A, offs_d, scale_log2, HEAD_DIM, BLOCK_P, MANY,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    q_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, partial_ptr, lse_ptr,
    adapter_index_ptr, prompt_lengths_ptr, cache_lengths_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    stride_ob, stride_ot, stride_oh,
    T, S, G, P, A, m_tiles, splits, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, MANY: tl.constexpr, SIGN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the splits of a tile of packed rows in their order, then the prompt."""
    b, g, rows, head, token, exists = _packed_rows(tl.program_id(0), T, G, m_tiles, GROUP, BLOCK_M)
    length = _cached(cache_lengths_ptr, b, S)
    offs_d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (offs_d < HEAD_DIM)[None, :]
    first = (far(b, G) + g) * splits
    lse_ptr += first * (GROUP * T)
    partial_ptr += first * (GROUP * T * HEAD_DIM)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for split in tl.range(0, (length + KEYS - 1) // KEYS):
        lse = tl.load(lse_ptr + far(split, GROUP * T) + rows, mask=exists, other=float("-inf"))
        split_ptr = partial_ptr + far(split, GROUP * T * HEAD_DIM)
        ptrs = row_pointers(split_ptr, rows.to(tl.int64) * HEAD_DIM, offs_d)
        part = tl.load(ptrs, mask=inside, other=0.0)
        new_max = tl.maximum(row_max, lse)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight, shrink = tl.math.exp2(lse - safe_max), tl.math.exp2(row_max - safe_max)
        acc = acc * shrink[:, None] + part * weight[:, None]
        row_sum = row_sum * shrink + weight
        row_max = new_max
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    q = _load_packed(
        q_ptr, stride_qb, stride_qt, stride_qh, b, head, token, exists, offs_d, HEAD_DIM, SIGN
    )
    _finish(
        acc, q, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, adapter_index_ptr,
        prompt_lengths_ptr, stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp,
        stride_pvg, stride_gb, stride_gh, stride_ob, stride_ot, stride_oh, b, g, head, token,
        exists, length - T, P, A, offs_d, scale_log2, HEAD_DIM, BLOCK_P, MANY,
    )  # fmt: skip


def splits_of(keys: int) -> int:
    """Into how many splits a cache of this capacity is cut, whatever is in it."""
    return tiles_of(keys, SPLIT)


def rows_tile(rows: int, config: TileConfig) -> int:
    """Packed rows of a tile: all of them where few, 16 at least."""
    return min(config.block_m, max(16, 1 << (rows - 1).bit_length()))


def decode_launches(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, cache_lengths: Tensor,
    page_table: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, scale: float,
    out: Tensor, partials: tuple[Tensor, Tensor] | None, config: TileConfig,
) -> list[Launch]:  # fmt: skip
    """The launches that fill out, like q, one after the other: one, or two with partial results.

    Args:
        q, prompts, cache_lengths, page_table, k_scale, v_scale, scale: as the public function's.
        k, v: caches (B, S, G, D), or pages (N, page, G, D) with page_table.
        out: to fill.
        partials: (B, G, splits, H / G T, D) and (B, G, splits, H / G T) in float32 to fill, for
            more than one split.
        config: its tile.
    """
    batch, tokens = q.shape[:2]
    groups = k.shape[-2]
    keys = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    shape = shape_arguments(q, groups)
    packed = shape["GROUP"] * tokens
    block_m = rows_tile(packed, config)
    splits = 1 if partials is None else splits_of(keys)
    common = {
        "q_ptr": q,
        "out_ptr": out,
        "partial_ptr": None if partials is None else partials[0],
        "lse_ptr": None if partials is None else partials[1],
        "cache_lengths_ptr": cache_lengths,
        **row_strides("q", q, "bth"),
        **row_strides("o", out, "bth"),
        **prompt_arguments(q, prompts),
        "T": tokens,
        "S": keys,
        "G": groups,
        "m_tiles": tiles_of(packed, block_m),
        "splits": splits,
        # a scale of 0 scores every key alike: as queries of 0 do
        "scale_log2": (abs(scale) or 1.0) * math.log2(math.e),
        "SIGN": (scale > 0) - (scale < 0),
        "BLOCK_M": block_m,
        "KEYS": SPLIT,
        **{name: shape[name] for name in ("GROUP", "HEAD_DIM", "BLOCK_D")},
    }
    arguments = {
        **common,
        "k_ptr": k,
        "v_ptr": v,
        "k_scale_ptr": k_scale,
        "v_scale_ptr": v_scale,
        **row_strides("k", k, "bsg"),
        **row_strides("v", v, "bsg"),
        **page_arguments(page_table, k),
        "BLOCK_N": config.block_n,
    }
    programs = batch * groups * common["m_tiles"]
    first = Launch(
        _decode_kernel, programs * splits, arguments, config.num_warps, config.num_stages
    )
    if partials is None:
        return [first]
    return [first, Launch(_combine_kernel, programs, common, config.num_warps, 1)]
