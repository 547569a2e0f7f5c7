"""Zero-initialized attention of packed sequences, which may share the keys that they begin with."""

from typing import Literal, overload

from torch import Tensor

from adapter_kernels.backend import choose_backend
from adapter_kernels.checks import check_flag

from .arguments import (
    cast_together,
    check_cu_seqlens,
    check_keys,
    check_max_seqlen,
    check_pages,
    check_prefix,
    check_prompts,
    check_queries,
    page_capacity,
)
from .dispatch import backends_for, cached_backends, wants_gradient
from .layouts import Prefix, Prompts
from .library import attention_op


@overload
def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor:
    """Return out."""


@overload
def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse)."""


def zero_init_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """zero_init_attention over B sequences of any lengths, packed one after another.

    With S_b and T_b the lengths of sequence b, the equation of zero_init_attention holds for each
    on its own, with the causal diagonal j <= i + S_b - T_b. Lengths of 0 are legal. With page_table
    the keys come from a paged cache and the function is forward only.

    With prefix_k, what several sequences begin with is computed and kept once: a sequence's keys
    and values are those of its prefix followed by its own, [fk; k] and [fv; v], and S_b is their
    number. Differentiable in q, k, v, prompt_k, prompt_v, gate, prefix_k and prefix_v, once; the
    gradients of those that share a prefix are summed in a fixed order, but by the reference on a
    GPU.

    Args:
        q: (total_q, H, D) queries in float16, bfloat16 or float32; D from 8 to 256 in steps of 8.
        k, v: (total_k, G, D), or pages (N, page, G, D) with page_table; the dtype of q.
        prompt_k, prompt_v, gate, adapter_index, prompt_lengths: as in zero_init_attention, where B
            is the number of sequences.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32; sequence b is rows cu[b] to cu[b + 1] - 1. With
            page_table, only the differences of cu_seqlens_k count: the keys of each sequence.
        max_seqlen_q, max_seqlen_k: no length exceeds these; keys of a prefix do not count.
        causal, scale, return_lse, backend: as in zero_init_attention; no hybrid of pages on a GPU.
        page_table: (B, max_pages) int32, the pages of each sequence in order; entries past its
            length are never read. Not with prefix_k.
        prefix_k, prefix_v: (F, L, G, D) keys and values of prefixes, the dtype of q.
        prefix_index: (B,) int32, the prefix of each sequence, -1 for none.
        prefix_lengths: (F,) int32, the keys of each prefix that count; None is L.

    Returns:
        out (total_q, H, D) in the dtype of q. With return_lse also lse (H, total_q) float32.

    Raises:
        ValueError: an argument has another shape, dtype, device or value than stated here.
        RuntimeError: by backward(), where a gradient is asked for through page_table.

    Source: LLaMA-Adapter, section 3.2, equations 5 to 8.
    """
    q, k, v, prompt_k, prompt_v, prefix_k, prefix_v = cast_together(
        q, k, v, prompt_k, prompt_v, prefix_k, prefix_v
    )
    prompts = Prompts(prompt_k, prompt_v, gate, adapter_index, prompt_lengths)
    check_queries(q, "(total_q, H, D)", scale)
    check_flag("causal", causal)
    check_flag("return_lse", return_lse)
    check_max_seqlen("max_seqlen_q", max_seqlen_q)
    check_max_seqlen("max_seqlen_k", max_seqlen_k)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, None, q.shape[0], max_seqlen_q)
    batch = cu_seqlens_q.shape[0] - 1
    if page_table is None:
        check_keys(q, k, v, "", "(total_k, G, D)", None)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, batch, k.shape[0], max_seqlen_k)
    else:
        check_keys(q, k, v, "", "(N, page, G, D)", None, None)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, batch, None, max_seqlen_k)
        check_max_seqlen("max_seqlen_k", max_seqlen_k, page_capacity(q, k, page_table, batch))
        check_pages(k, page_table, cu_seqlens_k.diff())
    check_prompts(q, prompts, batch, k.shape[-2])
    prefix = Prefix(prefix_k, prefix_v, prefix_index, prefix_lengths)
    check_prefix(q, prefix, batch, k.shape[-2], page_table)
    inputs = (q, k, v, *prompts[:3], *prefix[:2])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    able = cached_backends(q, scale)
    if page_table is None:
        kind = {"causal": causal, "packed": True, "padded": False}
        able = backends_for(q, max_seqlen_k, scale, **kind, training=wants_gradient(*inputs))
    chosen = choose_backend("zero_init_attention_varlen", backend, q.device, able, *inputs)
    packed = (cu_seqlens_q, cu_seqlens_k, page_table, max_seqlen_q, max_seqlen_k)
    out, lse, _ = attention_op(
        q, k, v, *prompts, *prefix, None, None, *packed, causal, scale, chosen
    )
    return (out, lse) if return_lse else out
