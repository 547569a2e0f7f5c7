"""Zero-initialized attention: the public functions, from checked arguments to torch operations.

All four compute the split softmax of LLaMA-Adapter: over the tokens, plus a gate times one over the
prompt. They differ in how sequences lie in memory; that of packed ones is in varlen.py. library.py
holds the operations they call.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from adapter_kernels import native
from adapter_kernels.backend import choose_backend
from adapter_kernels.checks import check_flag, check_range, check_tensor, passed_before

from .arguments import (
    cast_together,
    check_cache,
    check_cache_values,
    check_cu_seqlens,
    check_index,
    check_keys,
    check_like_queries,
    check_prompt_values,
    check_prompts,
    check_queries,
)
from .dispatch import backends_for, cached_backends, kernels_for, wants_gradient
from .layouts import Prefix, Prompts
from .library import attention_op, decode_op, prompt_op


@overload
def zero_init_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor:
    """Return out."""


@overload
def zero_init_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse)."""


def zero_init_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the tokens and, gated and with a softmax of its own, to a prompt.

        out[b,i,h] = sum_j softmax_j(scale q.k_j) v_j + gate[h] sum_p softmax_p(scale q.pk_p) pv_p

    A prompt has no position and no mask: every query sees all of it. The gate is the multiplier
    itself; where an adapter has a tanh, its caller applies it. With gate 0 or adapter_index -1 the
    result is bitwise that of no prompt. A query that sees no key gets its prompt part alone.
    Differentiable in q, k, v, prompt_k, prompt_v and gate, once.

    Args:
        q: (B, T, H, D) queries in float16, bfloat16 or float32; D from 8 to 256 in steps of 8.
        k, v: (B, S, G, D) keys and values, H a multiple of G; the dtype of q.
        prompt_k, prompt_v: prompt keys and values, dtype of q, P >= 1: (P, G, D) for the batch,
            (B, P, G, D) one per sample, or a bank (A, P, G, D) with adapter_index.
        gate: float32, (H,); (B, H) may go with prompts per sample; (A, H) goes with a bank.
        causal: query i sees keys j <= i + S - T, so the last query sees all.
        scale: of both scores; None is D ** -0.5.
        key_starts, key_lengths: (B,) int32; keys outside key_starts <= j < key_lengths are padding,
            never read. They do not move the causal diagonal.
        adapter_index: (B,) int32, the bank's row of each sample, -1 for no prompt.
        prompt_lengths: (A,) int32, the rows of each of the bank's prompts that count.
        return_lse: also return lse.
        backend: "triton", "hybrid" or "reference"; None chooses.

    Returns:
        out (B, T, H, D) in the dtype of q. With return_lse also lse (B, H, T) float32, the natural
        log of the tokens' sum of exponentials: differentiable, -inf where a query sees no key.

    Raises:
        ValueError: an argument has another shape, dtype, device or value than stated here.

    Source: LLaMA-Adapter, section 3.2, equations 5 to 8; the root of D, not of C, per head.
    """
    q, k, v, prompt_k, prompt_v = cast_together(q, k, v, prompt_k, prompt_v)
    prompts = Prompts(prompt_k, prompt_v, gate, adapter_index, prompt_lengths)
    check_queries(q, "(B, T, H, D)", scale)
    check_flag("causal", causal)
    check_flag("return_lse", return_lse)
    check_keys(q, k, v, "", "(B, S, G, D)", q.shape[0], None)
    check_prompts(q, prompts, q.shape[0], k.shape[2])
    for name, bound in (("key_starts", key_starts), ("key_lengths", key_lengths)):
        if bound is not None:
            check_index(name, bound, q, "(B,)", q.shape[0])
            check_range(name, bound, 0, k.shape[1])
    inputs = (q, k, v, *prompts[:3])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    bounds = (key_starts, key_lengths)
    padded = key_starts is not None or key_lengths is not None
    kind = {"causal": causal, "packed": False, "padded": padded}
    able = backends_for(q, k.shape[1], scale, **kind, training=wants_gradient(*inputs))
    chosen = choose_backend("zero_init_attention", backend, q.device, able, *inputs)
    unpacked = (None, None, None, 0, 0)
    out, lse, _ = attention_op(
        q, k, v, *prompts, *Prefix(), *bounds, *unpacked, causal, scale, chosen
    )
    return (out, lse) if return_lse else out


def zero_init_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    cache_lengths: Tensor,
    page_table: Tensor | None = None,
    scale: float | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """zero_init_attention of the newest T tokens of B cached sequences; forward only.

    Query i of sequence b is its token cache_lengths[b] - T + i and sees every cached token up to
    itself; the new keys and values are already written. A length of 0 marks an empty slot, whose
    output is 0. Safe inside CUDA graphs: lengths stay on the device.

    Args:
        q: (B, T, H, D) queries in float16, bfloat16 or float32; T up to 16.
        k_cache, v_cache: (B, S_max, G, D), or pages (N, page, G, D) with page_table; the dtype of
            q, or float8_e4m3fn with k_scale and v_scale.
        prompt_k, prompt_v, gate, adapter_index, prompt_lengths, scale: as in zero_init_attention.
        cache_lengths: (B,) int32, cached tokens of each sequence, the new ones included, or 0.
        page_table: (B, max_pages) int32, the pages of each sequence in order; entries past its
            length are never read.
        k_scale, v_scale: (G,) float32 positive factors of an fp8 cache, whose keys and values are
            k_scale k_cache and v_scale v_cache; D in steps of 16, on a GPU capability 8.9.
        backend: "triton"; on a CPU "native" (see `load_native`), "hybrid"; "reference"; or None.

    Returns:
        out (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: an argument has another shape, dtype, device or value than stated here.
        RuntimeError: by backward(), where a gradient is asked for.

    Source: LLaMA-Adapter, section 3.2, equations 5 to 8, for the word being generated.
    """
    prompts = Prompts(prompt_k, prompt_v, gate, adapter_index, prompt_lengths)
    scaled = k_scale is not None or v_scale is not None
    if backend in (None, "native") and not scaled and not torch.compiler.is_compiling():
        out = native.decode(q, k_cache, v_cache, *prompts, cache_lengths, page_table, scale)
        if out is not None:
            return out
    q, k_cache, v_cache, prompt_k, prompt_v = cast_together(q, k_cache, v_cache, prompt_k, prompt_v)
    prompts = Prompts(prompt_k, prompt_v, gate, adapter_index, prompt_lengths)
    cache = (cache_lengths, page_table, k_scale, v_scale)
    remember = passed_before("decode", q, k_cache, v_cache, *prompts, *cache, scale)
    if remember is not None:
        check_queries(q, "(B, T, H, D)", scale)
        check_cache(q, k_cache, v_cache, *cache)
        check_prompts(q, prompts, q.shape[0], k_cache.shape[2])
        remember()
    check_cache_values(q, k_cache, *cache)
    check_prompt_values(prompts)
    inputs = (q, k_cache, v_cache, *prompts[:3])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    able = cached_backends(q, scale, scaled)
    chosen = choose_backend("zero_init_attention_decode", backend, q.device, able, *inputs)
    return decode_op(q, k_cache, v_cache, *prompts, *cache, scale, chosen)


def gated_prompt_attention(
    q: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    gate: Tensor,
    *,
    scale: float | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The prompt's part of zero_init_attention alone, added to the output of any attention.

        result[b,i,h] = out[b,i,h] + gate[h] sum_p softmax_p(scale q.pk_p) pv_p

    For attention that zero_init_attention does not do (sliding windows, dropout, masks) and for a
    second gated segment in one layer. Differentiable in all five tensors, once.

    Args:
        q: (B, T, H, D), or (total_q, H, D) with cu_seqlens_q; float16, bfloat16 or float32.
        prompt_k, prompt_v, gate, adapter_index, prompt_lengths: as in zero_init_attention.
        scale: of the scores; None is D ** -0.5.
        cu_seqlens_q: (B + 1,) int32; sequence b is rows cu[b] to cu[b + 1] - 1 of a packed q.
        out: like q, what to add to, never changed; None is zero.
        backend: "triton" or "reference"; None chooses.

    Returns:
        A new tensor like q, rounded once.

    Raises:
        ValueError: an argument has another shape, dtype, device or value than stated here.

    Source: LLaMA-Adapter, section 3.2, the first term of equations 7 and 8.
    """
    q, prompt_k, prompt_v, out = cast_together(q, prompt_k, prompt_v, out)
    prompts = Prompts(prompt_k, prompt_v, gate, adapter_index, prompt_lengths)
    check_queries(q, "(B, T, H, D)" if cu_seqlens_q is None else "(total_q, H, D)", scale)
    batch = q.shape[0]
    if cu_seqlens_q is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, None, q.shape[0], None)
        batch = cu_seqlens_q.shape[0] - 1
    for name, x in (("prompt_k", prompt_k), ("prompt_v", prompt_v), ("gate", gate)):
        check_tensor(name, x)
    check_prompts(q, prompts, batch, None)
    if out is not None:
        check_like_queries("out", out, q, "that of q", *q.shape)
    inputs = (q, *prompts[:3], out)
    able = kernels_for(q)
    chosen = choose_backend("gated_prompt_attention", backend, q.device, able, *inputs)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return prompt_op(q, *prompts, cu_seqlens_q, out, scale, chosen)
