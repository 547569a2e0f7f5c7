"""What the kernels share: how a tile of rows finds its sequence, its keys and its prompt.

Sequences are padded or packed, prompts shared, per sample or a bank's; absent tensors are None, so
that the compiler drops what belongs to them. Index values are clamped: a GPU cannot be asked.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def sequence(cu_seqlens_ptr, b, length):
    """First row and length of sequence b: (0, length) where sequences are not packed."""
    start = tl.zeros([], dtype=tl.int64)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + b + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def key_bounds(key_starts_ptr, key_lengths_ptr, b, keys):
    """The keys that padding leaves: from the first to below the last + 1, within 0 to keys."""
    first = 0
    last = keys
    if key_starts_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(key_starts_ptr + b), 0), keys)
    if key_lengths_ptr is not None:
        last = tl.minimum(tl.maximum(tl.load(key_lengths_ptr + b), 0), keys)
    return first, last


@triton.jit
def prompt_of(adapter_index_ptr, prompt_lengths_ptr, b, P, A):
    """Sequence b's row among the prompts, and how many prompt rows count for it."""
    row = b
    length = P
    if adapter_index_ptr is not None:
        row = tl.load(adapter_index_ptr + b)
        present = (row >= 0) & (row < A)
        row = tl.where(present, row, 0)
        length = tl.where(present, P, 0)
        if prompt_lengths_ptr is not None:
            length = tl.minimum(length, tl.load(prompt_lengths_ptr + row))
    return row.to(tl.int64), length


@triton.jit
def far(row, stride):
    """row * stride in 64 bits: rows may lie 2^31 elements apart."""
    return (tl.zeros([], dtype=tl.int64) + row) * stride


@triton.jit
def row_pointers(ptr, stride, rows, offs_d):
    """Pointers (N, BLOCK_D) to rows of a matrix, each at a multiple of 16 bytes: row_strides."""
    return tl.multiple_of(ptr + (rows.to(tl.int64)[:, None] * stride + offs_d[None, :]), (1, 16))


@triton.jit
def load_rows(ptr, stride, rows, low, high, offs_d, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows (N) of a matrix as (N, BLOCK_D), 0 beyond HEAD_DIM and, if MASKED, outside low to high.

    What is masked is not read: it may hold NaN. `ptr` points at row 0, and is what a loop moves:
    the offsets are then computed once.
    """
    ptrs = row_pointers(ptr, stride, rows, offs_d)
    if MASKED:
        mask = ((rows >= low) & (rows < high))[:, None] & (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif offs_d.shape[0] != HEAD_DIM:
        tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def key_bands(
    first, last, m_start, offset, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Where tiles of keys begin, for query rows m_start to m_start + BM - 1.

    Returns (low, full_low, full_high, high): tiles in [full_low, full_high) are seen whole by every
    row; those in [low, full_low) and [full_high, high) need a mask; no others are seen at all.
    """
    high = last
    full = last
    if CAUSAL:
        high = tl.minimum(last, m_start + BM + offset)
        full = tl.minimum(last, m_start + offset + 1)
    low = first // BN * BN
    full_low = tl.minimum((first + BN - 1) // BN * BN, tl.maximum(high, low))
    full_high = tl.maximum(tl.maximum(full, 0) // BN * BN, full_low)
    return low, full_low, full_high, high


@triton.jit
def store_rows(ptr, stride, rows, count, offs_d, tile, HEAD_DIM: tl.constexpr):
    """Store (N, BLOCK_D) as the first `count` rows of a matrix, rounded to its dtype."""
    ptrs = row_pointers(ptr, stride, rows, offs_d)
    mask = (rows < count)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible(offs_n, first, last, offs_m, offset, CAUSAL: tl.constexpr):
    """(M, N): which keys a row sees."""
    seen = ((offs_n >= first) & (offs_n < last))[None, :]
    if CAUSAL:
        seen = seen & (offs_n[None, :] <= offs_m[:, None] + offset)
    return seen
