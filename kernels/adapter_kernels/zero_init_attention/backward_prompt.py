"""The prompt's gradients: dprompt_k, dprompt_v and dgate, summed over all rows that see a prompt.

In reading order: the kernel, whose programs each leave the sum over some rows, the sums of those in
a fixed order, the launchers. No atomics anywhere: equal calls give equal bits. README.md derives
what they compute.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .backward_dq import prompt_products, prompt_statistics
from .configs import TileConfig
from .kernel_arguments import (
    batch_of,
    prompt_arguments,
    row_strides,
    shape_arguments,
    strides,
    tiles_of,
)
from .layouts import Prompts
from .tiles import bank_row, far, gate_unit, load_gate, load_rows, sequence, store_rows

# query rows that one program sums over: more rows make more programs and partial sums
PROMPT_ROWS = 512
SUM_BLOCK = 1024
SUM_WARPS = 4


@triton.jit
def _prompt_backward_kernel(
    q_ptr, dout_ptr, prompt_k_ptr, prompt_v_ptr, gate_ptr, dprompt_k_ptr, dprompt_v_ptr,
    dgate_ptr, prompt_lse_ptr, prompt_delta_ptr, adapter_index_ptr, prompt_lengths_ptr, cu_q_ptr,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh, stride_lb, stride_lh,
    stride_pkb, stride_pkp, stride_pkg, stride_pvb, stride_pvp, stride_pvg, stride_gb, stride_gh,
    T, H, P, A, p_tiles, chunks, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """One program: dprompt_k, dprompt_v, dgate of a tile of prompt rows of one key head.

    Over CHUNK rows of q: partial sums in float32, as (B, chunks, P, G, D) and (B, chunks, H).
    """
    pid, G = tl.program_id(0), H // GROUP
    tile, rest = pid % p_tiles, pid // p_tiles
    chunk, bg = rest % chunks, rest // chunks
    b, g = bg // G, bg % G
    q_start, T = sequence(cu_q_ptr, b, T)
    row, length = bank_row(adapter_index_ptr, prompt_lengths_ptr, b, P, A)
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
def _sum_kernel(
    partial_ptr, index_ptr, out_ptr, B, chunks, N, blocks,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (A, N): partial (B, chunks, N) summed over the chunks, and over the samples of a row.

    Those are all of them where SHARED, with an index those that name the row, else the row's own.
    """
    pid = tl.program_id(0)
    row = pid // blocks
    offs = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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


def prompt_backward_launch(
    q: Tensor, prompts: Prompts, cu_seqlens_q: Tensor | None, longest: int, scale: float,
    dout: Tensor, partials: tuple[Tensor | None, Tensor | None, Tensor | None],
    statistics: tuple[Tensor, Tensor] | None, config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills partial sums of the prompt's gradients.

    Args:
        q, prompts, cu_seqlens_q, longest, scale: of the forward pass.
        dout: the gradient that arrives.
        partials: (B, chunks, P, G, D) of dprompt_k and of dprompt_v and (B, chunks, H) of dgate,
            float32; None leaves one out.
        statistics: what the query kernel left of a prompt of many tiles.
        config: its tile.
    """
    assert prompts.k is not None, "without prompts there is nothing to launch"
    prompt, groups = prompt_arguments(q, prompts), prompts.k.shape[-2]
    p_tiles, chunks = tiles_of(prompt["P"], prompt["BLOCK_P"]), chunks_of(longest)
    arguments = {
        "q_ptr": q,
        "dout_ptr": dout,
        "cu_q_ptr": cu_seqlens_q,
        "prompt_lse_ptr": None if statistics is None else statistics[0],
        "prompt_delta_ptr": None if statistics is None else statistics[1],
        **dict(zip(("dprompt_k_ptr", "dprompt_v_ptr", "dgate_ptr"), partials, strict=True)),
        **row_strides("q", q, "bth"),
        **row_strides("do", dout, "bth"),
        **strides("l", None if statistics is None else statistics[0], "bh"),
        **prompt,
        **shape_arguments(q, groups),
        "T": longest,
        "p_tiles": p_tiles,
        "chunks": chunks,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "BLOCK_M": config.block_m,
        "CHUNK": PROMPT_ROWS,
    }
    programs = batch_of(q, cu_seqlens_q) * groups * chunks * p_tiles
    return Launch(_prompt_backward_kernel, programs, arguments, config.num_warps, config.num_stages)


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
