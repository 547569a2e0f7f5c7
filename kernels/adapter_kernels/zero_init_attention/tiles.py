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
def bank_row(index_ptr, lengths_ptr, b, P, A):
    """Sequence b's row in a bank (A, P, ...) of prompts or prefixes, and how much of it counts."""
    row = b
    length = P
    if index_ptr is not None:
        row = tl.load(index_ptr + b)
        present = (row >= 0) & (row < A)
        row = tl.where(present, row, 0)
        length = tl.where(present, P, 0)
        if lengths_ptr is not None:
            length = tl.minimum(length, tl.load(lengths_ptr + row))
    return row.to(tl.int64), length


@triton.jit
def load_gate(ptr, length, exists):
    """The gate, a head's or those of rows that exist; 0 without a prompt: no row 0's NaN leaks."""
    return tl.load(ptr, mask=exists & (length > 0), other=0.0)


@triton.jit
def gate_unit(gate, dtype: tl.constexpr):
    """A power of two near |gate|, by which what float16 holds is divided: else small gates vanish.

    Multiplying the float32 sums by it again changes no bit of them. 1 in wider dtypes, and where
    there is no such power.
    """
    unit = tl.full(gate.shape, 1.0, tl.float32)
    if dtype == tl.float16:
        size = tl.maximum(tl.abs(gate), 1e-30)
        power = tl.math.exp2(tl.floor(tl.math.log2(size)))
        unit = tl.where((size > 1e-30) & (size < 1e30), power, 1.0)
    return unit


@triton.jit
def far(row, stride):
    """row * stride in 64 bits: rows may lie 2^31 elements apart."""
    return (tl.zeros([], dtype=tl.int64) + row) * stride


@triton.jit
def row_pointers(ptr, offsets, offs_d):
    """Pointers (N, BLOCK_D) to rows at offsets (N), each at a multiple of 16 bytes: row_strides."""
    return tl.multiple_of(ptr + (offsets[:, None] + offs_d[None, :]), (1, 16))


@triton.jit
def load_at(ptr, offsets, inside, offs_d, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows at offsets (N) as (N, BLOCK_D), 0 beyond HEAD_DIM and, if MASKED, where not inside (N).

    What is masked is not read: it may hold NaN.
    """
    ptrs = row_pointers(ptr, offsets, offs_d)
    if MASKED:
        mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif offs_d.shape[0] != HEAD_DIM:
        tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_rows(ptr, stride, rows, low, high, offs_d, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows (N) of a matrix, as load_at; if MASKED, those outside low to high are 0.

    `ptr` points at row 0, and is what a loop moves: the offsets are then computed once.
    """
    offsets, inside = rows.to(tl.int64) * stride, (rows >= low) & (rows < high)
    return load_at(ptr, offsets, inside, offs_d, HEAD_DIM, MASKED)


@triton.jit
def load_keys(
    ptr, stride_page, stride, table_ptr, pages, start, rows, first, last, offs_d,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys start + rows (N) of a sequence; if MASKED, those outside first to last are 0.

    In order from `ptr` on, or, with a table, in the pages of PAGE keys that it names one by one.
    """
    if table_ptr is None:
        tile_ptr = ptr + far(start, stride)
        tile = load_rows(
            tile_ptr, stride, rows, first - start, last - start, offs_d, HEAD_DIM, MASKED
        )
    else:
        keys = start + rows
        inside = (keys >= first) & (keys < last)
        # entries past a sequence's end are not looked at: they may hold anything
        page = tl.load(table_ptr + keys // PAGE, mask=inside, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        offsets = page * stride_page + (keys % PAGE).to(tl.int64) * stride
        tile = load_at(ptr, offsets, inside, offs_d, HEAD_DIM, MASKED)
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
    ptrs = row_pointers(ptr, rows.to(tl.int64) * stride, offs_d)
    mask = (rows < count)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible(offs_n, first, last, offs_m, offset, CAUSAL: tl.constexpr):
    """(M, N): which keys a row sees."""
    seen = ((offs_n >= first) & (offs_n < last))[None, :]
    if CAUSAL:
        seen = seen & (offs_n[None, :] <= offs_m[:, None] + offset)
    return seen
