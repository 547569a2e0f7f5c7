"""The fused forward kernel: attention to the tokens, and to the prompt in the same accumulator.

In reading order: one band of keys, the prompt's tiles, the kernel and that of the prompt alone,
their launchers. README.md derives what they compute.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .configs import TileConfig
from .kernel_arguments import (
    batch_of,
    page_arguments,
    prefix_arguments,
    prompt_arguments,
    row_strides,
    shape_arguments,
    strides,
    tiles_of,
    token_arguments,
)
from .layouts import Layout, Prefix, Prompts
from .tiles import (
    LN2,
    bank_row,
    far,
    gate_unit,
    key_bands,
    key_bounds,
    load_gate,
    load_keys,
    load_rows,
    row_pointers,
    sequence,
    store_rows,
    visible,
)


@triton.jit
def attend_band(
    acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kb, stride_ks, stride_vb, stride_vs, table_ptr,
    pages, low, high, first, last, offs_m, offset, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys from low to high; acc (M, BLOCK_D), the others (M)."""
    rows = tl.arange(0, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N):
        k = load_keys(
            k_ptr, stride_kb, stride_ks, table_ptr, pages, start, rows, first, last, offs_d,
            HEAD_DIM, PAGE, MASKED,
        ).to(q.dtype)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = visible(start + rows, first, last, offs_m, offset, CAUSAL)
            s = tl.where(seen, s, float("-inf"))
        # maxima before the scale, which is positive: scaling and subtracting are then one operation
        new_max = tl.maximum(row_max, tl.max(s, 1))
        # a row that has seen no key yet: any finite number in the place of its maximum
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        p = tl.math.exp2(s * scale_log2 - (safe_max * scale_log2)[:, None])
        shrink = tl.math.exp2((row_max - safe_max) * scale_log2)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = load_keys(
            v_ptr, stride_vb, stride_vs, table_ptr, pages, start, rows, first, last, offs_d,
            HEAD_DIM, PAGE, MASKED,
        ).to(q.dtype)  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def prompt_scores(
    q, k_ptr, stride_pkp, start, length, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Scores (M, BLOCK_P) of a tile of prompt rows from `start` on, in units of log2, and its k."""
    rows = tl.arange(0, BLOCK_P)
    tile_ptr = k_ptr + far(start, stride_pkp)
    k = load_rows(tile_ptr, stride_pkp, rows, 0, length - start, offs_d, HEAD_DIM, True)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    return tl.where((rows < length - start)[None, :], s, float("-inf")), k


@triton.jit
def scale_rows(x, factor):
    """x (M, N) times a number, or times one of each row (M)."""
    return x * factor[:, None] if len(factor.shape) == 1 else x * factor


@triton.jit
def add_prompt(
    acc, q, k_ptr, v_ptr, stride_pkp, stride_pvp, length, gate, P, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """acc + gate softmax(q K_p^T) V_p, the accumulator (M, BLOCK_D) being the tokens' own.

    The gate is a head's, or (M) where the rows are of several. MANY is for prompts of more rows
    than a tile: once over them for the softmax, once for V_p.
    """
    rows = tl.arange(0, BLOCK_P)
    s, _ = prompt_scores(q, k_ptr, stride_pkp, 0, length, offs_d, scale_log2, HEAD_DIM, BLOCK_P)
    row_max = tl.max(s, 1)
    # without any prompt row every score is -inf, and every exponential below 0
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    p = tl.math.exp2(s - row_max[:, None])
    row_sum = tl.sum(p, 1)
    if MANY:
        for start in tl.range(BLOCK_P, P, BLOCK_P):
            s, _ = prompt_scores(
                q, k_ptr, stride_pkp, start, length, offs_d, scale_log2, HEAD_DIM, BLOCK_P
            )
            new_max = tl.maximum(row_max, tl.max(s, 1))
            row_sum = row_sum * tl.math.exp2(row_max - new_max)
            row_sum += tl.sum(tl.math.exp2(s - new_max[:, None]), 1)
            row_max = new_max
    unit = gate_unit(gate, q.dtype)
    # an empty prompt has p = 0, so any finite factor serves
    factor = gate / unit / tl.where(row_sum > 0, row_sum, 1.0)
    if q.dtype == tl.float16:
        acc = scale_rows(acc, 1 / unit)
    if MANY:
        for start in tl.range(0, P, BLOCK_P):
            s, _ = prompt_scores(
                q, k_ptr, stride_pkp, start, length, offs_d, scale_log2, HEAD_DIM, BLOCK_P
            )
            tile_ptr = v_ptr + far(start, stride_pvp)
            v = load_rows(tile_ptr, stride_pvp, rows, 0, length - start, offs_d, HEAD_DIM, True)
            p = tl.math.exp2(s - row_max[:, None]) * factor[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    else:
        v = load_rows(v_ptr, stride_pvp, rows, 0, length, offs_d, HEAD_DIM, True)
        p = p * factor[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if q.dtype == tl.float16:
        acc = scale_rows(acc, unit)
    return acc


@triton.jit
def _load_q(
    ptr, stride, rows, count, offs_d, HEAD_DIM: tl.constexpr, SIGN: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Query rows times the sign of the scale, so that the scale itself is positive."""
    ptrs = row_pointers(ptr, rows.to(tl.int64) * stride, offs_d)
    mask = (rows < count)[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(ptrs, mask=mask, other=0.0, volatile=AGAIN)
    return q if SIGN == 1 else (q * SIGN).to(q.dtype)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, lse_ptr,
    adapter_index_ptr, prompt_lengths_ptr, key_starts_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    page_table_ptr, prefix_k_ptr, prefix_v_ptr, prefix_index_ptr, prefix_lengths_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    stride_fkb, stride_fks, stride_fkg, stride_fvb, stride_fvs, stride_fvg,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    T, S, H, P, A, L, F, pages, stride_table, m_tiles, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PAGE: tl.constexpr, MANY: tl.constexpr,
    CAUSAL: tl.constexpr, SIGN: tl.constexpr, RELOAD_Q: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head of one sequence, those with most keys first."""
    pid = tl.program_id(0)
    bh = pid // m_tiles
    b, h = bh // H, bh % H
    m_start = (m_tiles - 1 - pid % m_tiles) * BLOCK_M
    q_start, T = sequence(cu_q_ptr, b, T)
    if m_start >= T:
        return
    longest = S
    k_start, S = sequence(cu_k_ptr, b, S)
    g = h // GROUP
    rows = tl.arange(0, BLOCK_M)
    offs_m = m_start + rows
    offs_d = tl.arange(0, BLOCK_D)
    first_row = q_start + m_start
    q_ptr += far(b, stride_qb) + far(h, stride_qh) + far(first_row, stride_qt)
    q = _load_q(q_ptr, stride_qt, rows, T - m_start, offs_d, HEAD_DIM, SIGN, False)
    k_ptr += far(g, stride_kg)
    v_ptr += far(g, stride_vg)
    if page_table_ptr is None:
        k_ptr += far(b, stride_kb) + far(k_start, stride_ks)
        v_ptr += far(b, stride_vb) + far(k_start, stride_vs)
    else:
        page_table_ptr += far(b, stride_table)
        S = tl.minimum(S, longest)
    offset = S - T
    first, last = key_bounds(key_starts_ptr, key_lengths_ptr, b, S)
    low, full_low, full_high, high = key_bands(
        first, last, m_start, offset, CAUSAL, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if prefix_k_ptr is not None:
        of, length = bank_row(prefix_index_ptr, prefix_lengths_ptr, b, L, F)
        prefix_k_ptr += far(of, stride_fkb) + far(g, stride_fkg)
        prefix_v_ptr += far(of, stride_fvb) + far(g, stride_fvg)
        acc, row_max, row_sum = attend_band(
            acc, row_max, row_sum, q, prefix_k_ptr, prefix_v_ptr, 0, stride_fks, 0, stride_fvs,
            None, 0, 0, length, 0, length, offs_m, offset + length, offs_d, scale_log2, HEAD_DIM,
            BLOCK_N, PAGE, CAUSAL, True,
        )  # fmt: skip
    if key_starts_ptr is not None:
        acc, row_max, row_sum = attend_band(
            acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kb, stride_ks, stride_vb, stride_vs,
            page_table_ptr, pages, low, full_low, first, last, offs_m, offset, offs_d, scale_log2,
            HEAD_DIM, BLOCK_N, PAGE, CAUSAL, True,
        )  # fmt: skip
    acc, row_max, row_sum = attend_band(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kb, stride_ks, stride_vb, stride_vs,
        page_table_ptr, pages, full_low, full_high, first, last, offs_m, offset, offs_d, scale_log2,
        HEAD_DIM, BLOCK_N, PAGE, CAUSAL, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend_band(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kb, stride_ks, stride_vb, stride_vs,
        page_table_ptr, pages, full_high, high, first, last, offs_m, offset, offs_d, scale_log2,
        HEAD_DIM, BLOCK_N, PAGE, CAUSAL, True,
    )  # fmt: skip
    # rows that see no key: the sum is 0, the output that of the prompt alone, lse -inf
    blind = row_sum == 0
    row_sum = tl.where(blind, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    lse = tl.where(blind, float("-inf"), row_max * scale_log2 * LN2 + tl.log(row_sum))
    if prompt_k_ptr is not None:
        row, length = bank_row(adapter_index_ptr, prompt_lengths_ptr, b, P, A)
        gate = load_gate(gate_ptr + far(row, stride_gb) + far(h, stride_gh), length, True)
        prompt_k_ptr += far(row, stride_pkb) + far(g, stride_pkg)
        prompt_v_ptr += far(row, stride_pvb) + far(g, stride_pvg)
        if RELOAD_Q:
            # cheaper than keeping q in registers beside the accumulator
            q = _load_q(q_ptr, stride_qt, rows, T - m_start, offs_d, HEAD_DIM, SIGN, True)
        acc = add_prompt(
            acc, q, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, length, gate, P, offs_d,
            scale_log2, HEAD_DIM, BLOCK_P, MANY,
        )  # fmt: skip
    out_ptr += far(b, stride_ob) + far(h, stride_oh) + far(first_row, stride_ot)
    store_rows(out_ptr, stride_ot, rows, T - m_start, offs_d, acc, HEAD_DIM)
    lse_ptr += far(b, stride_lb) + far(h, stride_lh) + first_row
    tl.store(lse_ptr + rows, lse, mask=rows < T - m_start)


@triton.jit
def _prompt_forward_kernel(
    q_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, base_ptr, out_ptr,
    adapter_index_ptr, prompt_lengths_ptr, cu_q_ptr,
    stride_qb, stride_qt, stride_qh, stride_bb, stride_bt, stride_bh,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    stride_ob, stride_ot, stride_oh,
    T, H, P, A, m_tiles, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """One program: the gated prompt of BLOCK_M query rows of one head, plus base where given."""
    pid = tl.program_id(0)
    bh = pid // m_tiles
    b, h = bh // H, bh % H
    m_start = pid % m_tiles * BLOCK_M
    q_start, T = sequence(cu_q_ptr, b, T)
    if m_start >= T:
        return
    g = h // GROUP
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    first_row = q_start + m_start
    q_ptr += far(b, stride_qb) + far(h, stride_qh) + far(first_row, stride_qt)
    q = load_rows(q_ptr, stride_qt, rows, 0, T - m_start, offs_d, HEAD_DIM, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if base_ptr is not None:
        base_ptr += far(b, stride_bb) + far(h, stride_bh) + far(first_row, stride_bt)
        base = load_rows(base_ptr, stride_bt, rows, 0, T - m_start, offs_d, HEAD_DIM, True)
        acc += base.to(tl.float32)
    row, length = bank_row(adapter_index_ptr, prompt_lengths_ptr, b, P, A)
    gate = load_gate(gate_ptr + far(row, stride_gb) + far(h, stride_gh), length, True)
    prompt_k_ptr += far(row, stride_pkb) + far(g, stride_pkg)
    prompt_v_ptr += far(row, stride_pvb) + far(g, stride_pvg)
    acc = add_prompt(
        acc, q, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, length, gate, P, offs_d,
        scale_log2, HEAD_DIM, BLOCK_P, MANY,
    )  # fmt: skip
    out_ptr += far(b, stride_ob) + far(h, stride_oh) + far(first_row, stride_ot)
    store_rows(out_ptr, stride_ot, rows, T - m_start, offs_d, acc, HEAD_DIM)


def forward_launch(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, prefix: Prefix, layout: Layout, scale: float,
    out: Tensor, lse: Tensor, config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills out, like q, and lse (B,H,T) or (H,total_q)."""
    tokens = token_arguments(q, k, layout)
    m_tiles = tiles_of(tokens["T"], config.block_m)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        **row_strides("q", q, "bth"),
        **row_strides("k", k, "bsg"),
        **row_strides("v", v, "bsg"),
        **row_strides("o", out, "bth"),
        **strides("l", lse, "bh"),
        **prompt_arguments(q, prompts),
        **prefix_arguments(prefix),
        **shape_arguments(q, k.shape[-2]),
        **tokens,
        **page_arguments(layout.page_table, k),
        "m_tiles": m_tiles,
        # a scale of 0 scores every key alike: as queries of 0 do
        "scale_log2": (abs(scale) or 1.0) * math.log2(math.e),
        "SIGN": (scale > 0) - (scale < 0),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "RELOAD_Q": config.reload_q,
    }
    programs = m_tiles * batch_of(q, layout.cu_seqlens_q) * q.shape[-2]
    return Launch(_forward_kernel, programs, arguments, config.num_warps, config.num_stages)


def prompt_forward_launch(
    q: Tensor, prompts: Prompts, cu_seqlens_q: Tensor | None, longest: int, base: Tensor | None,
    scale: float, out: Tensor, config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills out, like q, with base (or 0) plus the gated prompt segment."""
    assert prompts.k is not None, "without prompts there is nothing to launch"
    m_tiles = tiles_of(longest, config.block_m)
    arguments = {
        "q_ptr": q,
        "base_ptr": base,
        "out_ptr": out,
        "cu_q_ptr": cu_seqlens_q,
        **row_strides("q", q, "bth"),
        **row_strides("b", base, "bth"),
        **row_strides("o", out, "bth"),
        **prompt_arguments(q, prompts),
        **shape_arguments(q, prompts.k.shape[-2]),
        "T": longest,
        "m_tiles": m_tiles,
        "scale_log2": scale * math.log2(math.e),
        "BLOCK_M": config.block_m,
    }
    programs = m_tiles * batch_of(q, cu_seqlens_q) * q.shape[-2]
    return Launch(_prompt_forward_kernel, programs, arguments, config.num_warps, config.num_stages)
