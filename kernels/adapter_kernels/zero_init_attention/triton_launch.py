"""The triton backend of the operations in op.py: results allocated, kernels launched in order.

A gradient that was not asked for is an empty tensor, as from the reference backend.
"""

import torch
from torch import Tensor

from adapter_kernels.arch import capability_of

from .backward_dkv import key_launch
from .backward_dq import query_launch
from .backward_prefix import prefix_launch, sequence_chunks
from .backward_prompt import chunks_of, prompt_backward_launch, sum_launch
from .configs import TileConfig, tile
from .decode import decode_launches, splits_of
from .forward import forward_launch, prompt_forward_launch
from .kernel_arguments import aligned_rows, batch_of, dense_index, has_many_tiles
from .layouts import Layout, Prefix, Prompts
from .reference import Grad

Partials = tuple[Grad, Grad, Grad]


def config_of(q: Tensor, direction: str) -> TileConfig:
    """The tile of a kernel for these queries."""
    capability = capability_of(q.device)
    assert capability is not None, "dispatch.py sends no older GPU here"
    return tile(capability, direction, q.shape[-1], q.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, prefix: Prefix, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result like q, and lse (B,H,T), or (H,total_q) of packed sequences; nothing else."""
    *batch, rows, heads, _ = q.shape
    q, k, v = map(aligned_rows, (q, k, v))
    prompts, layout = readable_prompts(prompts), readable_layout(layout)
    prefix = readable_prefix(prefix)
    out = q.new_empty(q.shape)
    lse = q.new_empty((*batch, heads, rows), dtype=torch.float32)
    config = config_of(q, "forward")
    forward_launch(q, k, v, prompts, prefix, layout, scale, out, lse, config).run()
    return out, lse, q.new_empty(0)


def key_config_of(q: Tensor, groups: int) -> TileConfig:
    """The tile of the key kernel, which is another one where query heads share a key head."""
    return config_of(q, "backward_dkv" if q.shape[-2] == groups else "backward_dkv_grouped")


def readable_prompts(prompts: Prompts) -> Prompts:
    """The prompts as kernels read them."""
    k, v = (None if x is None else aligned_rows(x) for x in prompts[:2])
    index, lengths = dense_index(prompts.adapter_index), dense_index(prompts.lengths)
    return prompts._replace(k=k, v=v, adapter_index=index, lengths=lengths)


def readable_prefix(prefix: Prefix) -> Prefix:
    """The prefixes as kernels read them."""
    k, v = (None if x is None else aligned_rows(x) for x in prefix[:2])
    return Prefix(k, v, dense_index(prefix.index), dense_index(prefix.lengths))


def readable_layout(layout: Layout) -> Layout:
    """The layout as kernels read it."""
    return layout._replace(
        key_starts=dense_index(layout.key_starts),
        key_lengths=dense_index(layout.key_lengths),
        cu_seqlens_q=dense_index(layout.cu_seqlens_q),
        cu_seqlens_k=dense_index(layout.cu_seqlens_k),
        page_table=dense_index(layout.page_table),
    )


def prompt_partials(
    q: Tensor, prompts: Prompts, batch: int, longest: int, needs: tuple[bool, ...]
) -> Partials:
    """Room for the partial sums of dprompt_k, dprompt_v and dgate, of those that are needed."""
    if prompts.k is None or not any(needs):
        return None, None, None
    lead = (batch, chunks_of(longest))
    shapes = ((*lead, *prompts.k.shape[-3:]),) * 2 + ((*lead, q.shape[-2]),)
    k, v, gate = (
        q.new_empty(shape, dtype=torch.float32) if need else None
        for shape, need in zip(shapes, needs, strict=True)
    )
    return k, v, gate


def prompt_statistics(
    q: Tensor, prompts: Prompts, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor] | None:
    """Room for lse and delta_p of a prompt of many tiles, where its gradient is needed."""
    if prompts.k is None or not any(needs) or not has_many_tiles(q, prompts):
        return None
    *batch, rows, heads, _ = q.shape
    shape = (*batch, heads, rows)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def prompt_sums(
    q: Tensor, prompts: Prompts, cu_seqlens_q: Tensor | None, longest: int, scale: float,
    dout: Tensor, statistics: tuple[Tensor, Tensor] | None, needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """dprompt_k, dprompt_v and dgate, in the caller's form."""
    one, cu_seqlens_q, longest = as_one_sequence(q, prompts, cu_seqlens_q, longest)
    if one:
        q, dout = q[None], dout[None]
        statistics = None if statistics is None else (statistics[0][None], statistics[1][None])
    partials = prompt_partials(q, prompts, batch_of(q, cu_seqlens_q), longest, needs)
    if any(partial is not None for partial in partials):
        config = config_of(q, "prompt_backward")
        prompt_backward_launch(
            q, prompts, cu_seqlens_q, longest, scale, dout, partials, statistics, config
        ).run()
    sums = []
    for partial, like in zip(partials, prompts[:3], strict=True):
        if partial is None or like is None:
            sums.append(q.new_empty(0))
            continue
        out = like.new_empty(like.shape)
        shared = like.dim() < partial.dim() - 1
        sum_launch(partial, out, prompts.adapter_index, shared).run()
        sums.append(out)
    return tuple(sums)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: Prompts,
    prefix: Prefix,
    layout: Layout,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dprompt_k, dprompt_v, dgate, dprefix_k, dprefix_v."""
    q, k, v, out, dout = map(aligned_rows, (q, k, v, out, dout))
    prompts, layout = readable_prompts(prompts), readable_layout(layout)
    prefix, of_prompt, of_prefix = readable_prefix(prefix), needs[3:6], needs[6:]
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (
        x.new_empty(x.shape) if need else None for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    statistics = prompt_statistics(q, prompts, of_prompt)
    delta, config = None, config_of(q, "backward_dq")
    if needs[0] or needs[1] or of_prefix[0]:
        delta = torch.empty_like(lse)
        tokens = (q, k, v, prompts, prefix, layout, scale, out, dout, lse, dlse, delta, dq)
        query_launch(*tokens, statistics, config).run()
    elif statistics is not None:
        query_launch(
            q, None, None, prompts, Prefix(), layout, scale, None, dout, None, None, None, None,
            statistics, config,
        ).run()  # fmt: skip
    config = key_config_of(q, k.shape[-2])
    if needs[1] or needs[2]:
        key_launch(q, k, v, layout, scale, dout, lse, delta, dk, dv, config).run()
    longest = q.shape[1] if layout.cu_seqlens_q is None else layout.max_seqlen_q
    sums = prompt_sums(q, prompts, layout.cu_seqlens_q, longest, scale, dout, statistics, of_prompt)
    prefix_sums = [q.new_empty(0), q.new_empty(0)]
    if prefix.k is not None and layout.cu_seqlens_q is not None and any(of_prefix):
        chunks = sequence_chunks(batch_of(q, layout.cu_seqlens_q), prefix.k.shape[0])
        shape = (chunks, 1, *prefix.k.shape)
        k_part, v_part = (
            q.new_empty(shape, dtype=torch.float32) if need else None for need in of_prefix
        )
        prefix_launch(q, prefix, layout, scale, dout, lse, delta, (k_part, v_part), config).run()
        for i, partial in enumerate((k_part, v_part)):
            if partial is not None:
                prefix_sums[i] = prefix.k.new_empty(prefix.k.shape)
                sum_launch(partial, prefix_sums[i], None, True).run()
    return *(q.new_empty(0) if x is None else x for x in (dq, dk, dv)), *sums, *prefix_sums


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prompts: Prompts,
    cache_lengths: Tensor,
    page_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """The result like q."""
    q, k_cache, v_cache = map(aligned_rows, (q, k_cache, v_cache))
    prompts, cache_lengths = readable_prompts(prompts), cache_lengths.contiguous()
    page_table = dense_index(page_table)
    out = q.new_empty(q.shape)
    batch, tokens, heads, width = q.shape
    groups = k_cache.shape[-2]
    splits = splits_of(k_cache.shape[1] * (1 if page_table is None else page_table.shape[1]))
    partials = None
    if splits > 1:
        shape = (batch, groups, splits, heads // groups * tokens)
        partials = (
            q.new_empty((*shape, width), dtype=torch.float32),
            q.new_empty(shape, dtype=torch.float32),
        )
    for launch in decode_launches(
        q, k_cache, v_cache, prompts, cache_lengths, page_table, k_scale, v_scale, scale, out,
        partials, config_of(q, "decode"),
    ):  # fmt: skip
        launch.run()
    return out


def as_one_sequence(
    q: Tensor, prompts: Prompts, cu_seqlens_q: Tensor | None, longest: int | None
) -> tuple[bool, Tensor | None, int]:
    """Whether packed rows can pass as one sequence, what then separates them, and the longest.

    Rows of a prompt segment know nothing of each other: sequences matter only to tell them their
    prompts. A GPU cannot be asked for the longest, which is at most all of them.
    """
    if cu_seqlens_q is None:
        return False, None, q.shape[1]
    if prompts.k is not None and prompts.k.dim() == 3:
        return True, None, q.shape[0]
    return False, cu_seqlens_q, q.shape[0] if longest is None else longest


def prompt(
    q: Tensor,
    prompts: Prompts,
    cu_seqlens_q: Tensor | None,
    out: Tensor | None,
    scale: float,
    longest: int | None = None,
) -> Tensor:
    """The gated prompt segment alone, plus out where given; like q."""
    one, cu_seqlens_q, longest = as_one_sequence(q, prompts, cu_seqlens_q, longest)
    result = q.new_empty(q.shape)
    q, prompts, cu_seqlens_q = aligned_rows(q), readable_prompts(prompts), dense_index(cu_seqlens_q)
    out = None if out is None else aligned_rows(out)
    rows = (q[None], None if out is None else out[None], result[None]) if one else (q, out, result)
    prompt_forward_launch(
        rows[0], prompts, cu_seqlens_q, longest, rows[1], scale, rows[2],
        config_of(q, "prompt_forward"),
    ).run()  # fmt: skip
    return result


def prompt_backward(
    dout: Tensor,
    q: Tensor,
    prompts: Prompts,
    cu_seqlens_q: Tensor | None,
    scale: float,
    needs: tuple[bool, ...],
    longest: int | None = None,
) -> tuple[Tensor, ...]:
    """dq, dprompt_k, dprompt_v, dgate."""
    one, cu_seqlens_q, longest = as_one_sequence(q, prompts, cu_seqlens_q, longest)
    result = q.new_empty(q.shape) if needs[0] else None
    q, dout, dq = aligned_rows(q), aligned_rows(dout), result
    prompts, cu_seqlens_q = readable_prompts(prompts), dense_index(cu_seqlens_q)
    if one:
        q, dout, dq = q[None], dout[None], None if dq is None else dq[None]
    layout = Layout(None, None, cu_seqlens_q, None, None, longest, 0, False)
    statistics = prompt_statistics(q, prompts, needs[1:])
    if dq is not None or statistics is not None:
        query_launch(
            q, None, None, prompts, Prefix(), layout, scale, None, dout, None, None, None, dq,
            statistics, config_of(q, "backward_dq"),
        ).run()  # fmt: skip
    sums = prompt_sums(q, prompts, cu_seqlens_q, longest, scale, dout, statistics, needs[1:])
    return q.new_empty(0) if result is None else result, *sums
