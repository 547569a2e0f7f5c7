"""What the public functions of op.py accept, one check per group of arguments.

Shapes, dtypes, devices and the last dimension's layout are always checked; the values of index
tensors only where looking at them costs no wait, on the CPU (checks.py).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adapter_kernels.arch import capability_of
from adapter_kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_integer,
    check_last_contiguous,
    check_number,
    check_range,
    check_shape,
    check_tensor,
    check_values,
    contents_checked,
    dtype_name,
)

from .layouts import Prefix, Prompts

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
MAX_DECODE_TOKENS = 16
# beyond these the products of a scale leave float32
SMALLEST_SCALE, LARGEST_SCALE = 1e-30, 1e30
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = 89
FP8_HEAD_DIM_STEP = 16


def cast_together(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as any matmul would take them."""
    check_tensor("q", q)
    device = q.device.type
    # the meta device has no autocast, and asking torch whether it has cannot be compiled in 2.11
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in FLOATS else x for x in (q, *others)
    )


def check_queries(q: Tensor, letters: str, scale: object) -> None:
    """Raise unless q has the dimensions of `letters` and a supported dtype and width."""
    check_shape("q", q, letters, (None,) * (letters.count(",") + 1))
    check_dtype("q", q, FLOATS)
    head_dim = q.shape[-1]
    if head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"q must have a head dimension D from {HEAD_DIM_STEP} to {MAX_HEAD_DIM} in steps of "
            f"{HEAD_DIM_STEP}, got {head_dim}"
        )
    check_last_contiguous("q", q)
    if scale is not None:
        check_number("scale", scale)
        size = abs(scale) if isinstance(scale, int | float) else 0
        if size and not SMALLEST_SCALE <= size <= LARGEST_SCALE:
            raise ValueError(
                f"scale must be 0 or of a magnitude from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}, "
                f"got {scale!r}"
            )


def check_like_queries(
    name: str,
    x: Tensor,
    q: Tensor,
    letters: str,
    *sizes: int | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless x has these sizes, the device of q, and its dtype or the one given."""
    check_shape(name, x, letters, sizes)
    check_device(name, x, "q", q)
    check_dtype(name, x, (dtype or q.dtype,))
    check_last_contiguous(name, x)


def check_index(name: str, x: Tensor, q: Tensor, letters: str, *sizes: int | None) -> None:
    """Raise unless x is an int32 tensor of these sizes on the device of q."""
    check_shape(name, x, letters, sizes)
    check_dtype(name, x, (torch.int32,))
    check_device(name, x, "q", q)


def check_groups(q: Tensor, k: Tensor, name: str) -> None:
    """Raise unless every key head serves the same number of query heads."""
    heads, groups = q.shape[-2], k.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"q must have a multiple of the G = {groups} heads of {name}, got H = {heads}"
        )


def check_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    suffix: str,
    letters: str,
    *lead: int | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless k and v have sizes (*lead, G, D) and go with q, in its dtype or that given."""
    check_like_queries(f"k{suffix}", k, q, letters, *lead, None, q.shape[-1], dtype=dtype)
    check_like_queries(f"v{suffix}", v, q, letters, *k.shape, dtype=dtype)
    check_groups(q, k, f"k{suffix}")


def check_prompts(q: Tensor, prompts: Prompts, batch: int, groups: int | None) -> None:
    """Raise unless the prompt arguments take one of their three forms, for `batch` sequences.

    `groups` is G; None accepts any that divides H.
    """
    k, v, gate, adapter_index, lengths = prompts
    if k is None or v is None or gate is None:
        check_no_prompts(prompts)
        return
    heads, width = q.shape[-2:]
    if adapter_index is None:
        if k.dim() == 4 and k.shape[0] != batch:
            raise ValueError(
                f"prompt_k must have shape (B, P, G, D) with B = {batch}, or come with "
                f"adapter_index where it is a bank (A, P, G, D), got {tuple(k.shape)}"
            )
        sample = ("(B, P, G, D)", (batch, None, groups, width))
        check_shape("prompt_k", k, "(P, G, D)", (None, groups, width), sample)
        sample = [("(B, H)", (batch, heads))] if k.dim() == 4 else []
        check_shape("gate", gate, "(H,)", (heads,), *sample)
    else:
        check_shape("prompt_k", k, "(A, P, G, D)", (None, None, groups, width))
        check_shape("gate", gate, "(A, H)", (k.shape[0], heads))
    check_like_queries("prompt_k", k, q, "that of prompt_k", *k.shape)
    check_like_queries("prompt_v", v, q, "that of prompt_k", *k.shape)
    check_dtype("gate", gate, (torch.float32,))
    check_device("gate", gate, "q", q)
    check_groups(q, k, "prompt_k")
    if k.shape[-3] == 0:
        raise ValueError(f"prompt_k must hold at least one prompt row, got shape {tuple(k.shape)}")
    if adapter_index is not None:
        if k.shape[0] == 0:
            raise ValueError(f"prompt_k must hold at least one adapter, got {tuple(k.shape)}")
        check_index("adapter_index", adapter_index, q, "(B,)", batch)
    if lengths is not None:
        if adapter_index is None:
            raise ValueError(
                "prompt_lengths must come with adapter_index, since it holds the lengths of a "
                "bank's prompts; got no adapter_index"
            )
        check_index("prompt_lengths", lengths, q, "(A,)", k.shape[0])
    check_prompt_values(prompts)


def check_prompt_values(prompts: Prompts) -> None:
    """Raise unless the indices of a bank, whose form is right, name its rows."""
    k, _, _, adapter_index, lengths = prompts
    if k is not None and adapter_index is not None:
        check_range("adapter_index", adapter_index, -1, k.shape[0] - 1)
        if lengths is not None:
            check_range("prompt_lengths", lengths, 0, k.shape[1])


def check_prefix(
    q: Tensor, prefix: Prefix, batch: int, groups: int, page_table: Tensor | None
) -> None:
    """Raise unless the prefix arguments are all absent, or a bank and its index of `batch`."""
    k, v, index, lengths = prefix
    names = ("prefix_k", "prefix_v", "prefix_index", "prefix_lengths")
    given = [name for name, x in zip(names, prefix, strict=True) if x is not None]
    if not given:
        return
    if k is None or v is None or index is None:
        raise ValueError(
            "prefix_k, prefix_v and prefix_index must be given together or not at all, got "
            f"{', '.join(given)} alone"
        )
    if page_table is not None:
        raise ValueError(
            "prefix_k must not come with page_table, whose pages sequences can share; got both"
        )
    check_like_queries("prefix_k", k, q, "(F, L, G, D)", None, None, groups, q.shape[-1])
    check_like_queries("prefix_v", v, q, "that of prefix_k", *k.shape)
    if k.shape[0] == 0 or k.shape[1] == 0:
        raise ValueError(
            f"prefix_k must hold at least one prefix of at least one key, got {tuple(k.shape)}"
        )
    check_index("prefix_index", index, q, "(B,)", batch)
    check_range("prefix_index", index, -1, k.shape[0] - 1)
    if lengths is not None:
        check_index("prefix_lengths", lengths, q, "(F,)", k.shape[0])
        check_range("prefix_lengths", lengths, 0, k.shape[1])


def check_no_prompts(prompts: Prompts) -> None:
    """Raise if only some of the prompt arguments were given."""
    names = ("prompt_k", "prompt_v", "gate", "adapter_index", "prompt_lengths")
    given = [name for name, x in zip(names, prompts, strict=True) if x is not None]
    if given:
        raise ValueError(
            "prompt_k, prompt_v and gate must be given together or not at all, got "
            f"{', '.join(given)} alone"
        )


def check_cu_seqlens(
    name: str, cu: Tensor, q: Tensor, batch: int | None, total: int | None, longest: int | None
) -> None:
    """Raise unless cu starts at 0, never falls, ends at `total`, and no step exceeds `longest`."""
    check_index(name, cu, q, "(B + 1,)", None if batch is None else batch + 1)
    if cu.shape[0] == 0:
        raise ValueError(f"{name} must have shape (B + 1,), got (0,)")
    if not contents_checked(cu):
        return
    starts = cu.tolist()
    steps = [b - a for a, b in pairwise(starts)]
    if starts[0] != 0 or min(steps, default=0) < 0:
        raise ValueError(f"{name} must start at 0 and never decrease, got {starts}")
    if total is not None and starts[-1] != total:
        raise ValueError(f"{name} must end at the packed total {total}, got {starts[-1]}")
    if longest is not None and max(steps, default=0) > longest:
        raise ValueError(
            f"{name.replace('cu_seqlens', 'max_seqlen')} must be at least the longest sequence, "
            f"{max(steps)}, got {longest}"
        )


def check_max_seqlen(name: str, value: int, capacity: int | None = None) -> None:
    """Raise unless value is a number of tokens, known to the host, that `capacity` can hold."""
    check_integer(name, value, 0, 2**31 - 1)
    if capacity is not None and value > capacity:
        raise ValueError(
            f"{name} must be at most the {capacity} keys that page_table can name, got {value}"
        )


def page_capacity(q: Tensor, pool: Tensor, page_table: Tensor, batch: int) -> int:
    """How many keys a row of the table can name; raises unless table and pool are well formed."""
    if pool.shape[0] == 0 or pool.shape[1] == 0:
        raise ValueError(
            "there must be at least one page, of at least one key, got a pool of shape "
            f"{tuple(pool.shape)}"
        )
    check_index("page_table", page_table, q, "(B, max_pages)", batch, None)
    return page_table.shape[1] * pool.shape[1]


def check_pages(pool: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    """Raise unless the table names a page of the pool for every key below a sequence's length."""
    if contents_checked(page_table) and contents_checked(lengths):
        # lists, because decoding looks at few of them and often
        page = pool.shape[1]
        for row, length in zip(page_table.tolist(), lengths.tolist(), strict=True):
            used = row[: -(-length // page)]
            if used and not 0 <= min(used) <= max(used) < pool.shape[0]:
                wrong = next(one for one in used if not 0 <= one < pool.shape[0])
                raise ValueError(f"page_table must be from 0 to {pool.shape[0] - 1}, got {wrong}")


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    page_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raise unless the caches, and what finds keys in them, have the form of a decoding call."""
    batch, tokens = q.shape[:2]
    scaled = k_scale is not None or v_scale is not None
    dtype = cache_dtype(q, k_cache, scaled)
    if page_table is None:
        check_keys(q, k_cache, v_cache, "_cache", "(B, S_max, G, D)", batch, None, dtype=dtype)
    else:
        check_keys(q, k_cache, v_cache, "_cache", "(N, page, G, D)", None, None, dtype=dtype)
    if tokens > MAX_DECODE_TOKENS:
        raise ValueError(
            f"q must hold at most {MAX_DECODE_TOKENS} new tokens per sequence, got T = {tokens}; "
            "zero_init_attention_varlen takes longer chunks"
        )
    check_index("cache_lengths", cache_lengths, q, "(B,)", batch)
    if page_table is not None:
        page_capacity(q, k_cache, page_table, batch)
    if scaled:
        check_cache_scales(q, k_cache.shape[2], k_scale=k_scale, v_scale=v_scale)


def check_cache_values(
    q: Tensor, k_cache: Tensor, cache_lengths: Tensor, page_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """Raise unless every length fits a cache of the right form and counts the new tokens of q, or
    is 0, its pages exist and the scales are numbers to multiply with."""
    tokens, capacity = q.shape[1], k_cache.shape[1]
    if page_table is not None:
        capacity *= page_table.shape[1]
    check_range("cache_lengths", cache_lengths, 0, capacity)
    if tokens > 1:
        expected = f"0 or count the T = {tokens} new tokens"
        check_values("cache_lengths", cache_lengths, expected, lambda n: (n == 0) | (n >= tokens))
    if page_table is not None:
        check_pages(k_cache, page_table, cache_lengths)
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None:
            check_values(name, x, "positive and finite", lambda n: (n > 0) & n.isfinite())


def cache_dtype(q: Tensor, k_cache: Tensor, scaled: bool) -> torch.dtype:
    """The dtype that a cache must have: that of q, or 8 bits wide where there are scales.

    Raises:
        ValueError: only one of the two is there, or the GPU has no arithmetic of 8 bits.
    """
    check_tensor("k_cache", k_cache)
    if not scaled and k_cache.dtype != FP8:
        return q.dtype
    if not scaled or k_cache.dtype != FP8:
        raise ValueError(
            "k_scale, v_scale and a float8_e4m3fn cache must be given together, got a "
            f"{dtype_name(k_cache.dtype)} cache {'with' if scaled else 'without'} scales"
        )
    capability = capability_of(k_cache.device)
    if k_cache.device.type == "cuda" and (capability or 0) < FP8_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(k_cache.device)
        raise ValueError(
            "k_cache must not be float8_e4m3fn on a GPU below compute capability 8.9, got "
            f"{k_cache.device} of {major}.{minor}"
        )
    return FP8


def check_cache_scales(q: Tensor, groups: int, **scales: Tensor | None) -> None:
    """Raise unless the factors of an 8-bit cache are (G,) float32 on the device of q, positive."""
    for name, x in scales.items():
        if x is None:
            raise ValueError(f"{name} must be given with a float8_e4m3fn cache, got None")
        check_shape(name, x, "(G,)", (groups,))
        check_dtype(name, x, (torch.float32,))
        check_device(name, x, "q", q)
        check_last_contiguous(name, x)
    if q.shape[-1] % FP8_HEAD_DIM_STEP:
        raise ValueError(
            f"q must have a head dimension D in steps of {FP8_HEAD_DIM_STEP} with a float8_e4m3fn "
            f"cache, whose rows are read 16 bytes at a time, got {q.shape[-1]}"
        )
