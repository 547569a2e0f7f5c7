"""The first kernel of the backward pass: dq, and the delta of every row for the second one.

In reading order: the prompt's part for a tile of query rows, one band of keys, the kernel, its
launcher. README.md derives what they compute; dk, dv, dprompt and dgate are in backward_dkv.py.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .configs import TileConfig
from .forward import prompt_scores
from .kernel_arguments import (
    batch_of,
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
    LOG2E,
    bank_row,
    far,
    gate_unit,
    key_bands,
    key_bounds,
    load_gate,
    load_rows,
    sequence,
    store_rows,
    visible,
)


@triton.jit
def prompt_products(
    q, dout, k_ptr, v_ptr, stride_pkp, stride_pvp, start, length, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of a tile of prompt rows: scores and dO V_p^T, both (M, BLOCK_P), and its k."""
    s, k = prompt_scores(q, k_ptr, stride_pkp, start, length, offs_d, scale_log2, HEAD_DIM, BLOCK_P)
    rows = tl.arange(0, BLOCK_P)
    v_ptr += far(start, stride_pvp)
    v = load_rows(v_ptr, stride_pvp, rows, 0, length - start, offs_d, HEAD_DIM, True)
    return s, tl.dot(dout, tl.trans(v), input_precision="ieee"), k


@triton.jit
def prompt_statistics(
    q, dout, k_ptr, v_ptr, stride_pkp, stride_pvp, length, P, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and delta_p (M) of the prompt's softmax; then the products of its first tile."""
    s, dp, k = prompt_products(
        q, dout, k_ptr, v_ptr, stride_pkp, stride_pvp, 0, length, offs_d, scale_log2,
        HEAD_DIM, BLOCK_P,
    )  # fmt: skip
    row_max = tl.max(s, 1)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    p = tl.math.exp2(s - row_max[:, None])
    row_sum = tl.sum(p, 1)
    weighted = tl.sum(p * dp, 1)
    if MANY:
        for start in tl.range(BLOCK_P, P, BLOCK_P):
            s_next, dp_next, _ = prompt_products(
                q, dout, k_ptr, v_ptr, stride_pkp, stride_pvp, start, length, offs_d, scale_log2,
                HEAD_DIM, BLOCK_P,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(s_next, 1))
            shrink = tl.math.exp2(row_max - new_max)
            p = tl.math.exp2(s_next - new_max[:, None])
            row_sum = row_sum * shrink + tl.sum(p, 1)
            weighted = weighted * shrink + tl.sum(p * dp_next, 1)
            row_max = new_max
    # an empty prompt has p = 0, so any finite divisor serves
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    return row_max, row_sum, weighted / row_sum, s, dp, k


@triton.jit
def _query_band(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, low, high, first, last,
    offs_m, offset, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq (M, BLOCK_D), not scaled yet, plus what the tiles of keys from low to high give."""
    rows = tl.arange(0, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N):
        k_tile, v_tile = k_ptr + far(start, stride_ks), v_ptr + far(start, stride_vs)
        k = load_rows(
            k_tile, stride_ks, rows, first - start, last - start, offs_d, HEAD_DIM, MASKED
        )
        v = load_rows(
            v_tile, stride_vs, rows, first - start, last - start, offs_d, HEAD_DIM, MASKED
        )
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.math.exp2(s * scale_log2 - lse[:, None])
        if MASKED:
            seen = visible(start + rows, first, last, offs_m, offset, CAUSAL)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def load_lse(ptr, rows, count):
    """lse in units of log2; +inf, under which every probability is 0, for rows that see no key."""
    lse = tl.load(ptr + rows, mask=rows < count, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def _query_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr,
    dq_ptr, delta_ptr, prompt_lse_ptr, prompt_delta_ptr,
    adapter_index_ptr, prompt_lengths_ptr, key_starts_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    prefix_k_ptr, prefix_v_ptr, prefix_index_ptr, prefix_lengths_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    stride_fkb, stride_fks, stride_fkg, stride_fvb, stride_fvs, stride_fvg,
    stride_ob, stride_ot, stride_oh, stride_dob, stride_dot, stride_doh,
    stride_dqb, stride_dqt, stride_dqh, stride_lb, stride_lh,
    T, S, H, P, A, L, F, m_tiles, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, MANY: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M query rows of one head, and their delta.

    delta = rowsum(dO o out) - gate delta_p - dlse, for the key kernel. Without lse_ptr the prompt's
    part of dq is all there is. A prompt of many tiles leaves its lse and delta_p as well.
    """
    pid = tl.program_id(0)
    bh = pid // m_tiles
    b, h = bh // H, bh % H
    m_start = (m_tiles - 1 - pid % m_tiles) * BLOCK_M
    q_start, T = sequence(cu_q_ptr, b, T)
    if m_start >= T:
        return
    g = h // GROUP
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    count = T - m_start
    first_row = q_start + m_start
    q_ptr += far(b, stride_qb) + far(h, stride_qh) + far(first_row, stride_qt)
    q = load_rows(q_ptr, stride_qt, rows, 0, count, offs_d, HEAD_DIM, True)
    dout_ptr += far(b, stride_dob) + far(h, stride_doh) + far(first_row, stride_dot)
    dout = load_rows(dout_ptr, stride_dot, rows, 0, count, offs_d, HEAD_DIM, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    if lse_ptr is not None:
        out_ptr += far(b, stride_ob) + far(h, stride_oh) + far(first_row, stride_ot)
        out = load_rows(out_ptr, stride_ot, rows, 0, count, offs_d, HEAD_DIM, True)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if prompt_k_ptr is not None:
        row, length = bank_row(adapter_index_ptr, prompt_lengths_ptr, b, P, A)
        gate = load_gate(gate_ptr + far(row, stride_gb) + far(h, stride_gh), length, True)
        prompt_k_ptr += far(row, stride_pkb) + far(g, stride_pkg)
        prompt_v_ptr += far(row, stride_pvb) + far(g, stride_pvg)
        row_max, row_sum, delta_p, s, dp, k = prompt_statistics(
            q, dout, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, length, P, offs_d,
            scale_log2, HEAD_DIM, BLOCK_P, MANY,
        )  # fmt: skip
        delta -= gate * delta_p
        if prompt_lse_ptr is not None:
            target = far(b, stride_lb) + far(h, stride_lh) + first_row + rows
            prompt_lse = row_max + tl.math.log2(row_sum)
            tl.store(prompt_lse_ptr + target, prompt_lse, mask=rows < count)
            tl.store(prompt_delta_ptr + target, delta_p, mask=rows < count)
        if dq_ptr is not None:
            unit = gate_unit(gate, q.dtype)
            factor = (gate / unit / row_sum)[:, None]
            ds = tl.math.exp2(s - row_max[:, None]) * factor * (dp - delta_p[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            if MANY:
                for start in tl.range(BLOCK_P, P, BLOCK_P):
                    s, dp, k = prompt_products(
                        q, dout, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, start, length,
                        offs_d, scale_log2, HEAD_DIM, BLOCK_P,
                    )  # fmt: skip
                    ds = tl.math.exp2(s - row_max[:, None]) * factor * (dp - delta_p[:, None])
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            if q.dtype == tl.float16:
                dq *= unit
    if lse_ptr is not None:
        statistics_row = far(b, stride_lb) + far(h, stride_lh) + first_row
        lse = load_lse(lse_ptr + statistics_row, rows, count)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + statistics_row + rows, mask=rows < count, other=0.0)
        # of a row without keys nothing passes on, not even a NaN
        delta = tl.where(lse == float("inf"), 0.0, delta)
        tl.store(delta_ptr + statistics_row + rows, delta, mask=rows < count)
        if dq_ptr is not None:
            k_start, S = sequence(cu_k_ptr, b, S)
            k_ptr += far(b, stride_kb) + far(g, stride_kg) + far(k_start, stride_ks)
            v_ptr += far(b, stride_vb) + far(g, stride_vg) + far(k_start, stride_vs)
            first, last = key_bounds(key_starts_ptr, key_lengths_ptr, b, S)
            offset = S - T
            low, full_low, full_high, high = key_bands(
                first, last, m_start, offset, CAUSAL, BLOCK_M, BLOCK_N
            )
            offs_m = m_start + rows
            if prefix_k_ptr is not None:
                of, length = bank_row(prefix_index_ptr, prefix_lengths_ptr, b, L, F)
                prefix_k_ptr += far(of, stride_fkb) + far(g, stride_fkg)
                prefix_v_ptr += far(of, stride_fvb) + far(g, stride_fvg)
                dq = _query_band(
                    dq, q, dout, lse, delta, prefix_k_ptr, prefix_v_ptr, stride_fks, stride_fvs, 0,
                    length, 0, length, offs_m, offset + length, offs_d, scale_log2, HEAD_DIM,
                    BLOCK_N, CAUSAL, True,
                )  # fmt: skip
            if key_starts_ptr is not None:
                dq = _query_band(
                    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, low, full_low,
                    first, last, offs_m, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_N, CAUSAL,
                    True,
                )  # fmt: skip
            dq = _query_band(
                dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, full_low, full_high,
                first, last, offs_m, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_N, CAUSAL, False,
            )  # fmt: skip
            dq = _query_band(
                dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, full_high, high,
                first, last, offs_m, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_N, CAUSAL, True,
            )  # fmt: skip
    if dq_ptr is not None:
        dq *= scale
        dq_ptr += far(b, stride_dqb) + far(h, stride_dqh) + far(first_row, stride_dqt)
        store_rows(dq_ptr, stride_dqt, rows, count, offs_d, dq, HEAD_DIM)


def query_launch(
    q: Tensor, k: Tensor | None, v: Tensor | None, prompts: Prompts, prefix: Prefix,
    layout: Layout, scale: float, out: Tensor | None, dout: Tensor, lse: Tensor | None,
    dlse: Tensor | None, delta: Tensor | None, dq: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None, config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills dq, like q, and delta, like lse.

    Args:
        q, k, v, prompts, prefix, layout, scale, out, lse: of the forward pass. Without k, v, out,
            lse and delta, dq is that of the prompt segment alone.
        dout, dlse: the gradients that arrive; dlse may be absent.
        delta: what to fill for the key kernel.
        dq: what to fill; None leaves it out.
        statistics: the prompt's lse and delta_p to fill, like lse, for a prompt of many tiles.
        config: its tile.
    """
    like = prompts.k if k is None else k
    assert like is not None, "without tokens and prompts there is nothing to launch"
    tokens = token_arguments(q, q if k is None else k, layout)
    m_tiles = tiles_of(tokens["T"], config.block_m)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "dq_ptr": dq,
        "delta_ptr": delta,
        "prompt_lse_ptr": None if statistics is None else statistics[0],
        "prompt_delta_ptr": None if statistics is None else statistics[1],
        **row_strides("q", q, "bth"),
        **row_strides("k", k, "bsg"),
        **row_strides("v", v, "bsg"),
        **row_strides("o", out, "bth"),
        **row_strides("do", dout, "bth"),
        **row_strides("dq", dq, "bth"),
        **strides("l", statistics[0] if lse is None and statistics is not None else lse, "bh"),
        **prompt_arguments(q, prompts),
        **prefix_arguments(prefix),
        **shape_arguments(q, like.shape[-2]),
        **tokens,
        "m_tiles": m_tiles,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = m_tiles * batch_of(q, layout.cu_seqlens_q) * q.shape[-2]
    return Launch(_query_kernel, programs, arguments, config.num_warps, config.num_stages)
