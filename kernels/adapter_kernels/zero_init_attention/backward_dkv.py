"""The second kernel of the backward pass: dk and dv, each of a tile of keys by one program.

In reading order: one band of query rows, the kernel, its launcher. README.md derives what they
compute; the prompt's gradients are in backward_prompt.py, those of shared prefixes in
backward_prefix.py.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .backward_dq import load_lse
from .configs import TileConfig
from .kernel_arguments import (
    batch_of,
    row_strides,
    shape_arguments,
    strides,
    tiles_of,
    token_arguments,
)
from .layouts import Layout
from .tiles import far, key_bounds, load_rows, sequence, store_rows


@triton.jit
def key_band(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, low, high, T,
    offs_n, offset, offs_d, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk and dv (N, BLOCK_D), dk not scaled yet, plus what the query rows from low to high give."""
    rows = tl.arange(0, BLOCK_M)
    for start in tl.range(low, high, BLOCK_M):
        count = T - start
        q_tile = q_ptr + far(start, stride_qt)
        q = load_rows(q_tile, stride_qt, rows, 0, count, offs_d, HEAD_DIM, MASKED)
        dout_tile = dout_ptr + far(start, stride_dot)
        dout = load_rows(dout_tile, stride_dot, rows, 0, count, offs_d, HEAD_DIM, MASKED)
        lse = load_lse(lse_ptr + start, rows, count)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.math.exp2(s * scale_log2 - lse[None, :])
        if MASKED and CAUSAL:
            p = tl.where(offs_n[:, None] <= (start + rows)[None, :] + offset, p, 0.0)
        if DV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        if DK:
            delta = tl.load(delta_ptr + start + rows, mask=rows < count, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    key_starts_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_dob, stride_dot, stride_doh, stride_dkb, stride_dks, stride_dkg,
    stride_dvb, stride_dvs, stride_dvg, stride_lb, stride_lh, T, S, H, n_tiles, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one key head, over all rows of its query heads."""
    pid = tl.program_id(0)
    G = H // GROUP
    bg = pid // n_tiles
    b, g = bg // G, bg % G
    # the first keys are seen by most rows
    n_start = pid % n_tiles * BLOCK_N
    k_start, S = sequence(cu_k_ptr, b, S)
    q_start, T = sequence(cu_q_ptr, b, T)
    first, last = key_bounds(key_starts_ptr, key_lengths_ptr, b, S)
    offset = S - T
    rows = tl.arange(0, BLOCK_N)
    offs_n = n_start + rows
    offs_d = tl.arange(0, BLOCK_D)
    first_key = k_start + n_start
    k_ptr += far(b, stride_kb) + far(g, stride_kg) + far(first_key, stride_ks)
    v_ptr += far(b, stride_vb) + far(g, stride_vg) + far(first_key, stride_vs)
    inside = (offs_n >= first) & (offs_n < last)
    k = load_rows(k_ptr, stride_ks, rows, first - n_start, last - n_start, offs_d, HEAD_DIM, True)
    v = load_rows(v_ptr, stride_vs, rows, first - n_start, last - n_start, offs_d, HEAD_DIM, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # rows from `low` on see some of these keys, those from `full` on all of them
    low, full = 0, 0
    if CAUSAL:
        low = tl.maximum(n_start - offset, 0) // BLOCK_M * BLOCK_M
        full = tl.maximum(n_start + BLOCK_N - 1 - offset, 0)
    high = tl.where((n_start < last) & (n_start + BLOCK_N > first), T, 0)
    full = tl.minimum((full + BLOCK_M - 1) // BLOCK_M * BLOCK_M, tl.maximum(high, low))
    whole = tl.maximum(high // BLOCK_M * BLOCK_M, full)
    for member in range(GROUP):
        h = g * GROUP + member
        q_head = q_ptr + far(b, stride_qb) + far(h, stride_qh) + far(q_start, stride_qt)
        dout_head = dout_ptr + far(b, stride_dob) + far(h, stride_doh) + far(q_start, stride_dot)
        statistics_row = far(b, stride_lb) + far(h, stride_lh) + q_start
        lse_head = lse_ptr + statistics_row
        delta_head = lse_head if delta_ptr is None else delta_ptr + statistics_row
        if CAUSAL:
            dk, dv = key_band(
                dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dot, low,
                full, T, offs_n, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_M, CAUSAL, True,
                dk_ptr is not None, dv_ptr is not None,
            )  # fmt: skip
        dk, dv = key_band(
            dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dot, full,
            whole, T, offs_n, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_M, CAUSAL, False,
            dk_ptr is not None, dv_ptr is not None,
        )  # fmt: skip
        dk, dv = key_band(
            dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dot, whole,
            high, T, offs_n, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_M, CAUSAL, True,
            dk_ptr is not None, dv_ptr is not None,
        )  # fmt: skip
    if dk_ptr is not None:
        dk_ptr += far(b, stride_dkb) + far(g, stride_dkg) + far(first_key, stride_dks)
        dk = tl.where(inside[:, None], dk * scale, 0.0)
        store_rows(dk_ptr, stride_dks, rows, S - n_start, offs_d, dk, HEAD_DIM)
    if dv_ptr is not None:
        dv_ptr += far(b, stride_dvb) + far(g, stride_dvg) + far(first_key, stride_dvs)
        dv = tl.where(inside[:, None], dv, 0.0)
        store_rows(dv_ptr, stride_dvs, rows, S - n_start, offs_d, dv, HEAD_DIM)


def key_launch(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, dout: Tensor, lse: Tensor,
    delta: Tensor | None, dk: Tensor | None, dv: Tensor | None, config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills dk and dv, like k and v.

    Args:
        q, k, v, layout, scale, lse: of the forward pass.
        dout, delta: the gradient that arrives, and what the query kernel made of it, for dk.
        dk, dv: what to fill; None leaves one out.
        config: its tile.
    """
    tokens, groups = token_arguments(q, k, layout), k.shape[-2]
    n_tiles = tiles_of(tokens["S"], config.block_n)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dk_ptr": dk,
        "dv_ptr": dv,
        **row_strides("q", q, "bth"),
        **row_strides("k", k, "bsg"),
        **row_strides("v", v, "bsg"),
        **row_strides("do", dout, "bth"),
        **row_strides("dk", dk, "bsg"),
        **row_strides("dv", dv, "bsg"),
        **strides("l", lse, "bh"),
        **shape_arguments(q, groups),
        **tokens,
        "n_tiles": n_tiles,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = batch_of(q, layout.cu_seqlens_q) * groups * n_tiles
    return Launch(_key_kernel, programs, arguments, config.num_warps, config.num_stages)
