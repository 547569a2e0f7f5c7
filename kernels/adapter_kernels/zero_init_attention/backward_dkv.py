"""The second kernel of the backward pass: dk and dv, and the prompt's dprompt_k, dprompt_v, dgate.

In reading order: one band of query rows, the programs of a tile of keys, those of a tile of prompt
rows, the kernel, the sums over samples in a fixed order, the launchers. No atomics anywhere: equal
calls give equal bits. README.md derives what they compute.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .backward_dq import load_lse, prompt_products, prompt_statistics
from .configs import TileConfig
from .kernel_arguments import (
    batch_of,
    prompt_arguments,
    row_strides,
    shape_arguments,
    strides,
    tiles_of,
    token_arguments,
)
from .layouts import Layout, Prompts
from .tiles import (
    far,
    gate_unit,
    key_bounds,
    load_gate,
    load_rows,
    prompt_of,
    sequence,
    store_rows,
)

# query rows that one prompt program sums over: more rows make more programs and partial sums
PROMPT_ROWS = 1024
SUM_BLOCK = 1024
SUM_WARPS = 4


@triton.jit
def _key_band(
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
def _key_program(
    pid, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    key_starts_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_dob, stride_dot, stride_doh, stride_dkb, stride_dks, stride_dkg,
    stride_dvb, stride_dvs, stride_dvg, stride_lb, stride_lh, T, S, G, n_tiles, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, over all rows of its query heads."""
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
            dk, dv = _key_band(
                dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dot, low,
                full, T, offs_n, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_M, CAUSAL, True,
                dk_ptr is not None, dv_ptr is not None,
            )  # fmt: skip
        dk, dv = _key_band(
            dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dot, full,
            whole, T, offs_n, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_M, CAUSAL, False,
            dk_ptr is not None, dv_ptr is not None,
        )  # fmt: skip
        dk, dv = _key_band(
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


@triton.jit
def _prompt_program(
    pid, q_ptr, dout_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, dprompt_k_ptr, dprompt_v_ptr,
    dgate_ptr, prompt_lse_ptr, prompt_delta_ptr, adapter_index_ptr, prompt_lengths_ptr, cu_q_ptr,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh, stride_lb, stride_lh,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    T, H, G, P, A, p_tiles, chunks, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """dprompt_k, dprompt_v, dgate of a tile of prompt rows of one key head, over CHUNK rows of q.

    Partial sums in float32, as (B, chunks, P, G, D) and (B, chunks, H).
    """
    tile, rest = pid % p_tiles, pid // p_tiles
    chunk, bg = rest % chunks, rest // chunks
    b, g = bg // G, bg % G
    q_start, T = sequence(cu_q_ptr, b, T)
    row, length = prompt_of(adapter_index_ptr, prompt_lengths_ptr, b, P, A)
    prompt_k_ptr += far(row, stride_pkb) + far(g, stride_pkg)
    prompt_v_ptr += far(row, stride_pvb) + far(g, stride_pvg)
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    dprompt_k = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    dprompt_v = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    low = chunk * CHUNK
    # a sequence without a prompt has no gradient to collect
    high = tl.where(length > 0, tl.minimum(low + CHUNK, T), low)
    for member in range(GROUP):
        h = g * GROUP + member
        gate = load_gate(gate_ptr + far(row, stride_gb) + far(h, stride_gh), length, True)
        unit = gate_unit(gate, q_ptr.dtype.element_ty)
        if q_ptr.dtype.element_ty == tl.float16:
            dprompt_k /= unit
            dprompt_v /= unit
            gate /= unit
        q_head = q_ptr + far(b, stride_qb) + far(h, stride_qh) + far(q_start, stride_qt)
        dout_head = dout_ptr + far(b, stride_dob) + far(h, stride_doh) + far(q_start, stride_dot)
        dgate = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in tl.range(low, high, BLOCK_M):
            q_tile, dout_tile = q_head + far(start, stride_qt), dout_head + far(start, stride_dot)
            q = load_rows(q_tile, stride_qt, rows, 0, T - start, offs_d, HEAD_DIM, True)
            dout = load_rows(dout_tile, stride_dot, rows, 0, T - start, offs_d, HEAD_DIM, True)
            if MANY:
                # one tile says nothing of the whole softmax: the query kernel left that behind
                target = far(b, stride_lb) + far(h, stride_lh) + q_start + start + rows
                inside = rows < T - start
                lse = tl.load(prompt_lse_ptr + target, mask=inside, other=float("inf"))
                delta = tl.load(prompt_delta_ptr + target, mask=inside, other=0.0)
                s, dp, _ = prompt_products(
                    q, dout, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, tile * BLOCK_P,
                    length, offs_d, scale_log2, HEAD_DIM, BLOCK_P,
                )  # fmt: skip
                p = tl.math.exp2(s - lse[:, None]) * gate
            else:
                row_max, row_sum, delta, s, dp, _ = prompt_statistics(
                    q, dout, prompt_k_ptr, prompt_v_ptr, stride_pkp, stride_pvp, length, P, offs_d,
                    scale_log2, HEAD_DIM, BLOCK_P, False,
                )  # fmt: skip
                p = tl.math.exp2(s - row_max[:, None]) * (gate / row_sum)[:, None]
            # rows past the end have dO = 0 and add nothing
            dgate += delta
            if dprompt_v_ptr is not None:
                p_cast = tl.trans(p.to(dout.dtype))
                dprompt_v = tl.dot(p_cast, dout, dprompt_v, input_precision="ieee")
            if dprompt_k_ptr is not None:
                ds = tl.trans((p * (dp - delta[:, None])).to(q.dtype))
                dprompt_k = tl.dot(ds, q, dprompt_k, input_precision="ieee")
        if q_ptr.dtype.element_ty == tl.float16:
            dprompt_k *= unit
            dprompt_v *= unit
        if dgate_ptr is not None:
            partial = far(b, chunks * H) + chunk * H + h
            tl.store(dgate_ptr + partial, tl.sum(dgate, 0), mask=tile == 0)
    p_rows = tl.arange(0, BLOCK_P)
    p_start = tile * BLOCK_P
    first = far(b * chunks + chunk, P * G * HEAD_DIM) + far(p_start, G * HEAD_DIM) + g * HEAD_DIM
    if dprompt_k_ptr is not None:
        target = dprompt_k_ptr + first
        store_rows(target, G * HEAD_DIM, p_rows, P - p_start, offs_d, dprompt_k * scale, HEAD_DIM)
    if dprompt_v_ptr is not None:
        target = dprompt_v_ptr + first
        store_rows(target, G * HEAD_DIM, p_rows, P - p_start, offs_d, dprompt_v, HEAD_DIM)


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, dout_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dprompt_k_ptr, dprompt_v_ptr, dgate_ptr, prompt_lse_ptr, prompt_delta_ptr,
    adapter_index_ptr, prompt_lengths_ptr, key_starts_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_dob, stride_dot, stride_doh, stride_dkb, stride_dks, stride_dkg,
    stride_dvb, stride_dvs, stride_dvg, stride_lb, stride_lh,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    T, S, H, G, P, A, n_tiles, p_tiles, chunks, prompt_programs, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, MANY: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """The prompt's programs first, which are the longest; then one program per tile of keys."""
    pid = tl.program_id(0)
    if dprompt_k_ptr is not None or dprompt_v_ptr is not None or dgate_ptr is not None:
        of_prompt = pid < prompt_programs
        if of_prompt:
            _prompt_program(
                pid, q_ptr, dout_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, dprompt_k_ptr,
                dprompt_v_ptr, dgate_ptr, prompt_lse_ptr, prompt_delta_ptr, adapter_index_ptr,
                prompt_lengths_ptr, cu_q_ptr, stride_qb, stride_qt, stride_qh, stride_dob,
                stride_dot, stride_doh, stride_lb, stride_lh, stride_pkb, stride_pkp, stride_pkg,
                stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
                T, H, G, P, A, p_tiles, chunks, scale, scale_log2, GROUP, HEAD_DIM, BLOCK_D,
                BLOCK_M, BLOCK_P, CHUNK, MANY,
            )  # fmt: skip
    if dk_ptr is not None or dv_ptr is not None:
        of_keys = pid >= prompt_programs
        if of_keys:
            _key_program(
                pid - prompt_programs, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr,
                dv_ptr, key_starts_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr, stride_qb, stride_qt,
                stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
                stride_dob, stride_dot, stride_doh, stride_dkb, stride_dks, stride_dkg, stride_dvb,
                stride_dvs, stride_dvg, stride_lb, stride_lh, T, S, G, n_tiles, scale, scale_log2,
                GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL,
            )  # fmt: skip


@triton.jit
def _sum_kernel(
    partial_ptr, index_ptr, out_ptr, B, chunks, N, blocks,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (A, N): partial (B, chunks, N) summed over the chunks, and over the samples of a row.

    Those are all of them where SHARED, with an index those that name the row, else the row's own.
    """
    pid = tl.program_id(0)
    row = pid // blocks
    offs = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    total = tl.zeros([BLOCK], dtype=tl.float32)
    low, high = 0, B
    if not SHARED and index_ptr is None:
        low, high = row, row + 1
    for b in tl.range(low, high):
        wanted = mask
        if index_ptr is not None:
            wanted = mask & (tl.load(index_ptr + b) == row)
        for chunk in tl.range(0, chunks):
            ptrs = partial_ptr + far(b * chunks + chunk, N) + offs
            total += tl.load(ptrs, mask=wanted, other=0.0)
    tl.store(out_ptr + far(row, N) + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def chunks_of(longest: int) -> int:
    """Into how many chunks of PROMPT_ROWS rows the prompt's programs cut the longest sequence."""
    return tiles_of(longest, PROMPT_ROWS)


def key_launch(
    q: Tensor, k: Tensor | None, v: Tensor | None, prompts: Prompts, layout: Layout, scale: float,
    dout: Tensor, lse: Tensor | None, delta: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    partials: tuple[Tensor | None, Tensor | None, Tensor | None],
    statistics: tuple[Tensor, Tensor] | None, config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills dk and dv, like k and v, and partial sums of the prompt's gradients.

    Args:
        q, k, v, prompts, layout, scale, lse: of the forward pass; k, v and lse only for dk and dv.
        dout, delta: the gradient that arrives, and what the query kernel made of it.
        dk, dv: what to fill; None leaves one out.
        partials: (B, chunks, P, G, D) of dprompt_k and of dprompt_v and (B, chunks, H) of dgate,
            float32; None leaves one out.
        statistics: what the query kernel left of a prompt of many tiles.
        config: its tile.
    """
    like = prompts.k if k is None else k
    assert like is not None, "without tokens and prompts there is nothing to launch"
    tokens = token_arguments(q, q if k is None else k, layout)
    prompt, groups = prompt_arguments(q, prompts), like.shape[-2]
    n_tiles = tiles_of(tokens["S"], config.block_n)
    p_tiles = max(1, tiles_of(prompt["P"], prompt["BLOCK_P"]))
    sequences = batch_of(q, layout.cu_seqlens_q) * groups
    chunks = chunks_of(tokens["T"])
    wanted = any(partial is not None for partial in partials)
    prompt_programs = sequences * chunks * p_tiles if wanted else 0
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "prompt_lse_ptr": None if statistics is None else statistics[0],
        "prompt_delta_ptr": None if statistics is None else statistics[1],
        **dict(zip(("dprompt_k_ptr", "dprompt_v_ptr", "dgate_ptr"), partials, strict=True)),
        **row_strides("q", q, "bth"),
        **row_strides("k", k, "bsg"),
        **row_strides("v", v, "bsg"),
        **row_strides("do", dout, "bth"),
        **row_strides("dk", dk, "bsg"),
        **row_strides("dv", dv, "bsg"),
        **strides("l", statistics[0] if lse is None and statistics is not None else lse, "bh"),
        **prompt,
        **shape_arguments(q, groups),
        **tokens,
        "G": groups,
        "n_tiles": n_tiles,
        "p_tiles": p_tiles,
        "chunks": chunks,
        "prompt_programs": prompt_programs,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": PROMPT_ROWS,
    }
    keys = dk is not None or dv is not None
    programs = prompt_programs + (sequences * n_tiles if keys else 0)
    return Launch(_key_kernel, programs, arguments, config.num_warps, config.num_stages)


def sum_launch(partial: Tensor, out: Tensor, adapter_index: Tensor | None, shared: bool) -> Launch:
    """The launch that sums partial (B, chunks, ...) into out, (...) or (A, ...) or (B, ...)."""
    samples, chunks, size = partial.shape[0], partial.shape[1], partial.shape[2:].numel()
    blocks = tiles_of(size, SUM_BLOCK)
    arguments = {
        "partial_ptr": partial,
        "index_ptr": None if shared else adapter_index,
        "out_ptr": out,
        "B": samples,
        "chunks": chunks,
        "N": size,
        "blocks": blocks,
        "SHARED": shared,
        "BLOCK": SUM_BLOCK,
    }
    rows = 1 if shared else out.shape[0]
    return Launch(_sum_kernel, rows * blocks, arguments, SUM_WARPS, 1)
