"""The gradients of shared prefixes: dk and dv of keys that several packed sequences see.

In reading order: the kernel, whose programs each leave the sum over some sequences, and its
launcher; backward_prompt.py sums what they leave in a fixed order. README.md derives what they
compute.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import math

import triton
import triton.language as tl
from torch import Tensor

from adapter_kernels.launch import Launch

from .backward_dkv import key_band
from .configs import TileConfig
from .kernel_arguments import (
    batch_of,
    prefix_arguments,
    row_strides,
    shape_arguments,
    strides,
    tiles_of,
)
from .layouts import Layout, Prefix
from .tiles import far, load_rows, sequence, store_rows

# sequences that one program sums over, and banks of partial sums that there may be beyond the first
PREFIX_SEQUENCES, MOST_PARTIALS = 8, 64


@triton.jit
def _prefix_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    prefix_index_ptr, prefix_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qt, stride_qh, stride_fkb, stride_fks, stride_fkg, stride_fvb, stride_fvs, stride_fvg,
    stride_dot, stride_doh, stride_lh, B, H, L, F, n_tiles, scale, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: dk, dv of BLOCK_N keys of one prefix and key head, over CHUNK sequences.

    Partial sums in float32, as (chunks, F, L, G, D).
    """
    pid, G = tl.program_id(0), H // GROUP
    n_start, rest = pid % n_tiles * BLOCK_N, pid // n_tiles
    g, of_chunk = rest % G, rest // G
    f, low = of_chunk % F, of_chunk // F * CHUNK
    length = L
    if prefix_lengths_ptr is not None:
        length = tl.minimum(L, tl.load(prefix_lengths_ptr + f))
    rows = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    count = length - n_start
    k_ptr = prefix_k_ptr + far(f, stride_fkb) + far(g, stride_fkg) + far(n_start, stride_fks)
    v_ptr = prefix_v_ptr + far(f, stride_fvb) + far(g, stride_fvg) + far(n_start, stride_fvs)
    k = load_rows(k_ptr, stride_fks, rows, 0, count, offs_d, HEAD_DIM, True)
    v = load_rows(v_ptr, stride_fvs, rows, 0, count, offs_d, HEAD_DIM, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for b in tl.range(low, tl.minimum(low + CHUNK, B)):
        q_start, T = sequence(cu_q_ptr, b, 0)
        _, S = sequence(cu_k_ptr, b, 0)
        offset = length + S - T
        seen = (tl.load(prefix_index_ptr + b) == f) & (count > 0)
        T = tl.where(seen, T, 0)
        for member in range(GROUP):
            h = g * GROUP + member
            q_head = q_ptr + far(h, stride_qh) + far(q_start, stride_qt)
            dout_head = dout_ptr + far(h, stride_doh) + far(q_start, stride_dot)
            lse_head = lse_ptr + far(h, stride_lh) + q_start
            delta_head = lse_head if delta_ptr is None else delta_ptr + far(h, stride_lh) + q_start
            dk, dv = key_band(
                dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_qt, stride_dot, 0, T,
                T, n_start + rows, offset, offs_d, scale_log2, HEAD_DIM, BLOCK_M, CAUSAL, True,
                dk_ptr is not None, dv_ptr is not None,
            )  # fmt: skip
    inside = (rows < count)[:, None]
    first = far(of_chunk, L * G * HEAD_DIM) + far(n_start, G * HEAD_DIM) + g * HEAD_DIM
    if dk_ptr is not None:
        dk = tl.where(inside, dk * scale, 0.0)
        store_rows(dk_ptr + first, G * HEAD_DIM, rows, L - n_start, offs_d, dk, HEAD_DIM)
    if dv_ptr is not None:
        dv = tl.where(inside, dv, 0.0)
        store_rows(dv_ptr + first, G * HEAD_DIM, rows, L - n_start, offs_d, dv, HEAD_DIM)


def sequences_of(sequences: int, prefixes: int) -> int:
    """How many sequences a program sums over.

    Partial sums of every prefix exist for every chunk of sequences: of many prefixes chunks are
    fewer, so that there are at most MOST_PARTIALS of them, or one a prefix.
    """
    each = PREFIX_SEQUENCES
    while each < sequences and tiles_of(sequences, each) * prefixes > MOST_PARTIALS:
        each *= 2
    return each


def sequence_chunks(sequences: int, prefixes: int) -> int:
    """Into how many chunks the programs cut the sequences."""
    return tiles_of(sequences, sequences_of(sequences, prefixes))


def prefix_launch(
    q: Tensor, prefix: Prefix, layout: Layout, scale: float, dout: Tensor, lse: Tensor,
    delta: Tensor | None, partials: tuple[Tensor | None, Tensor | None], config: TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills partial sums of a bank of prefixes' gradients.

    Args:
        q, prefix, layout, scale, lse: of the forward pass, of packed sequences.
        dout, delta: the gradient that arrives, and what the query kernel made of it, for dk.
        partials: (chunks, F, L, G, D) of dk and of dv, float32; None leaves one out.
        config: its tile.
    """
    assert prefix.k is not None, "without prefixes there is nothing to launch"
    groups, sequences = prefix.k.shape[-2], batch_of(q, layout.cu_seqlens_q)
    n_tiles = tiles_of(prefix.k.shape[1], config.block_n)
    arguments = {
        "q_ptr": q,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dk_ptr": partials[0],
        "dv_ptr": partials[1],
        "cu_q_ptr": layout.cu_seqlens_q,
        "cu_k_ptr": layout.cu_seqlens_k,
        **row_strides("q", q, "th"),
        **row_strides("do", dout, "th"),
        **strides("l", lse, "h"),
        **prefix_arguments(prefix),
        **shape_arguments(q, groups),
        "B": sequences,
        "n_tiles": n_tiles,
        "scale": scale,
        "scale_log2": scale * math.log2(math.e),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": sequences_of(sequences, prefix.k.shape[0]),
        "CAUSAL": layout.causal,
    }
    chunks = sequence_chunks(sequences, prefix.k.shape[0])
    programs = chunks * prefix.k.shape[0] * groups * n_tiles
    return Launch(_prefix_kernel, programs, arguments, config.num_warps, config.num_stages)
