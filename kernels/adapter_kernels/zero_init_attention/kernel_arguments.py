"""Tensors and bundles of the operations as the arguments that the kernels name.

Every kernel takes a subset of the same names; what a call does not have is None or 0.
"""

from typing import Any

import torch
from torch import Tensor

from .configs import padded_head_dim, prompt_tile
from .layouts import Layout, Prefix, Prompts

# what one thread loads at most; D is a multiple of 8, so that contiguous rows are aligned
ROW_BYTES = 16


def strides(letter: str, x: Tensor | None, names: str) -> dict[str, int]:
    """`stride_qb` and so on: all strides of x but the last, 0 for what x does not have."""
    found = () if x is None else x.stride()[:-1]
    padded = (0,) * (len(names) - len(found)) + found
    return {f"stride_{letter}{name}": value for name, value in zip(names, padded, strict=True)}


def are_aligned(x: Tensor) -> bool:
    """Whether rows are contiguous and each begins at a multiple of 16 bytes, the widest load."""
    rows = (stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    unit = ROW_BYTES // x.element_size()
    whole = x.stride(-1) == 1 and all(stride % unit == 0 for stride in rows)
    return whole and x.data_ptr() % ROW_BYTES == 0


def aligned_rows(x: Tensor) -> Tensor:
    """x as kernels read it: itself, or a copy where a slice or an expanded gradient is not so."""
    return x if x.numel() == 0 or are_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def dense_index(x: Tensor | None) -> Tensor | None:
    """An index tensor as kernels read it, entry after entry: a slice or an expansion is copied."""
    return None if x is None else x.contiguous()


def row_strides(letter: str, x: Tensor | None, names: str) -> dict[str, int]:
    """strides of a tensor of heads, whose rows kernels load in pieces of 16 bytes."""
    assert x is None or x.numel() == 0 or are_aligned(x), f"{letter}: rows are not aligned"
    return strides(letter, x, names)


def has_many_tiles(q: Tensor, prompts: Prompts) -> bool:
    """Whether a prompt has more rows than one tile holds."""
    rows = 0 if prompts.k is None else prompts.k.shape[-3]
    return rows > prompt_tile(rows, q.shape[-1], q.dtype)


def prompt_arguments(q: Tensor, prompts: Prompts) -> dict[str, Any]:
    """The prompts as a kernel takes them; a shared prompt has stride 0 from sample to sample."""
    k, v, gate = prompts.k, prompts.v, prompts.gate
    rows = 0 if k is None else k.shape[-3]
    block = prompt_tile(rows, q.shape[-1], q.dtype)
    return {
        "prompt_k_ptr": k,
        "prompt_v_ptr": v,
        "gate_ptr": gate,
        "adapter_index_ptr": prompts.adapter_index,
        "prompt_lengths_ptr": prompts.lengths,
        **row_strides("pk", k, "bpg"),
        **row_strides("pv", v, "bpg"),
        **strides("g", None if gate is None else gate[..., None], "bh"),
        "P": rows,
        "A": 0 if k is None else k.shape[0],
        "BLOCK_P": block,
        "MANY": has_many_tiles(q, prompts),
    }


def prefix_arguments(prefix: Prefix) -> dict[str, Any]:
    """The bank of prefixes as a kernel takes it."""
    k = prefix.k
    return {
        "prefix_k_ptr": k,
        "prefix_v_ptr": prefix.v,
        "prefix_index_ptr": prefix.index,
        "prefix_lengths_ptr": prefix.lengths,
        **row_strides("fk", k, "bsg"),
        **row_strides("fv", prefix.v, "bsg"),
        "L": 0 if k is None else k.shape[1],
        "F": 0 if k is None else k.shape[0],
    }


def shape_arguments(q: Tensor, groups: int) -> dict[str, Any]:
    """Heads and widths, as every kernel takes them."""
    heads, width = q.shape[-2:]
    return {
        "H": heads,
        "GROUP": heads // groups,
        "HEAD_DIM": width,
        "BLOCK_D": padded_head_dim(width),
    }


def token_arguments(q: Tensor, k: Tensor, layout: Layout) -> dict[str, Any]:
    """Lengths and what bounds them."""
    packed = layout.cu_seqlens_q is not None
    return {
        "key_starts_ptr": layout.key_starts,
        "key_lengths_ptr": layout.key_lengths,
        "cu_q_ptr": layout.cu_seqlens_q,
        "cu_k_ptr": layout.cu_seqlens_k,
        "T": layout.max_seqlen_q if packed else q.shape[1],
        "S": layout.max_seqlen_k if packed else k.shape[1],
        "CAUSAL": layout.causal,
    }


def page_arguments(page_table: Tensor | None, k: Tensor) -> dict[str, Any]:
    """The pages (N, page, G, D) of a cache, whose strides are those of a batch, and their order."""
    paged = page_table is not None
    return {
        "page_table_ptr": page_table,
        "stride_table": page_table.stride(0) if paged else 0,
        "pages": k.shape[0] if paged else 0,
        "PAGE": k.shape[1] if paged else 1,
    }


def tiles_of(length: int, block: int) -> int:
    """Tiles of `block` that cover a length."""
    return -(-length // block)


def batch_of(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """B, the number of sequences."""
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
