"""The reference backend of the operations in op.py, in any floating dtype.

Each function lays its inputs out (layouts.py), evaluates the equations (reference.py) and returns
the results in the caller's layout. A gradient that was not asked for is an empty tensor.
"""

import torch
from torch import Tensor

from . import reference
from .layouts import (
    Layout,
    Padded,
    Prefix,
    Prompts,
    cached_keys,
    from_rows,
    pack,
    pad,
    prompt_segment,
    sum_to,
    to_rows,
    unpack,
    visibility,
    wide,
)
from .reference import Grad, Segment


def equations(x: Padded, prompts: Prompts, scale: float) -> tuple[Tensor, Tensor]:
    """Equations 5 to 8 of a padded batch: out (B,T,H,D), not rounded yet, and lse (B,H,T)."""
    b, t, h, _ = x.q.shape
    groups = x.k.shape[2]
    tokens = Segment(to_rows(x.k, groups), to_rows(x.v, groups), x.bias, x.blind)
    out, lse = reference.forward(to_rows(x.q, groups), tokens, prompt_segment(x.q, prompts), scale)
    return from_rows(out, x.q), lse.view(b, h, t)


def attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, prefix: Prefix, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result like q, and lse (B,H,T), or (H,total_q) of packed sequences; nothing else."""
    out, lse = equations(pad(q, k, v, prefix, layout), prompts, scale)
    if layout.cu_seqlens_q is not None:
        lse = pack(lse.mT, layout.cu_seqlens_q, q.shape[0]).t().contiguous()
    return pack(out, layout.cu_seqlens_q, q.shape[0]).to(q.dtype), lse, q.new_empty(0)


def gradient(rows: Grad, padded: Tensor, cu_seqlens: Tensor | None, like: Tensor) -> Tensor:
    """A gradient of rows or keys, brought to where `like` lies; empty if there is none."""
    if rows is None:
        return like.new_empty(0)
    return pack(from_rows(rows, padded), cu_seqlens, like.shape[0]).to(like.dtype)


def key_gradients(
    rows: Grad, padded: Tensor, cu_seqlens: Tensor | None, like: Tensor, prefix: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of keys, and of the prefixes that stand before them; empty if there is none."""
    if rows is None or prefix is None:
        return gradient(rows, padded, cu_seqlens, like), like.new_empty(0)
    both, columns = from_rows(rows, padded), prefix.shape[1]
    own = pack(both[:, columns:], cu_seqlens, like.shape[0]).to(like.dtype)
    return own, sum_to(both[:, :columns], prefix, index)


def prompt_gradients(
    dprompt_k: Grad, dprompt_v: Grad, dgate: Grad, q: Tensor, prompts: Prompts
) -> tuple[Tensor, ...]:
    """dprompt_k, dprompt_v, dgate in the caller's form, from each sequence's and row's own."""
    b, t, h, _ = q.shape
    own = (
        (None if dprompt_k is None else dprompt_k.transpose(1, 2), prompts.k),
        (None if dprompt_v is None else dprompt_v.transpose(1, 2), prompts.v),
        (None if dgate is None else dgate.view(b, h, t).sum(-1), prompts.gate),
    )
    return tuple(
        q.new_empty(0) if x is None or like is None else sum_to(x, like, prompts.adapter_index)
        for x, like in own
    )


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
    """dq, dk, dv, those of prompt_k, prompt_v, gate, prefix_k, prefix_v; nothing of out and lse."""
    x = pad(q, k, v, prefix, layout)
    groups, cu_q, cu_k = x.k.shape[2], layout.cu_seqlens_q, layout.cu_seqlens_k

    def rows(y: Tensor) -> Tensor:
        """What lies like q, as rows."""
        return to_rows(unpack(y, cu_q, layout.max_seqlen_q), groups)

    dq, dk, dv, dprompt_k, dprompt_v, dgate = reference.backward(
        rows(dout),
        None if dlse is None else rows(dlse.mT[..., None]),
        to_rows(x.q, groups),
        Segment(to_rows(x.k, groups), to_rows(x.v, groups), x.bias, x.blind),
        prompt_segment(x.q, prompts),
        scale,
        (needs[0], needs[1] or needs[6], needs[2] or needs[7], *needs[3:6]),
    )
    keys = [
        key_gradients(rows, padded, cu_k, like, of, prefix.index)
        for rows, padded, like, of in ((dk, x.k, k, prefix.k), (dv, x.v, v, prefix.v))
    ]
    found = (
        gradient(dq, x.q, cu_q, q),
        *(own for own, _ in keys),
        *prompt_gradients(dprompt_k, dprompt_v, dgate, x.q, prompts),
        *(before for _, before in keys),
    )
    return tuple(x if need else x.new_empty(0) for x, need in zip(found, needs, strict=True))


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
    if k_scale is not None and v_scale is not None:
        k_cache = k_cache.to(wide(q.dtype)) * k_scale[:, None]
        v_cache = v_cache.to(wide(q.dtype)) * v_scale[:, None]
    keys = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    cache_lengths = cache_lengths.clamp(0, keys)
    k, v = cached_keys(k_cache, v_cache, page_table, cache_lengths, keys)
    offset = cache_lengths - q.shape[1]
    out, _ = equations(Padded(q, k, v, *visibility(q, k, offset)), prompts, scale)
    # a query before the start of its sequence stands for no token: an empty slot of a bucket
    absent = torch.arange(q.shape[1], device=q.device) + offset[:, None] < 0
    return out.masked_fill_(absent[:, :, None, None], 0.0).to(q.dtype)


def longest_of(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """A bound on the lengths of packed sequences: on a GPU their sum, which needs no waiting."""
    if cu_seqlens_q is None or cu_seqlens_q.shape[0] < 2 or q.device.type != "cpu":
        return q.shape[0]
    return int(cu_seqlens_q.diff().max())


def prompt(
    q: Tensor,
    prompts: Prompts,
    cu_seqlens_q: Tensor | None,
    out: Tensor | None,
    scale: float,
    longest: int | None = None,
) -> Tensor:
    """The gated prompt segment alone, plus out where given; like q."""
    longest = longest_of(q, cu_seqlens_q) if longest is None else longest
    padded = unpack(q, cu_seqlens_q, longest)
    segment = prompt_segment(padded, prompts)
    assert segment is not None, "op.py lets no call without prompts pass"
    rows = reference.prompt_forward(to_rows(padded, segment.k.shape[1]), segment, scale)
    added = pack(from_rows(rows, padded), cu_seqlens_q, q.shape[0])
    return (added if out is None else added + out).to(q.dtype)


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
    longest = longest_of(q, cu_seqlens_q) if longest is None else longest
    padded = unpack(q, cu_seqlens_q, longest)
    segment = prompt_segment(padded, prompts)
    assert segment is not None, "op.py lets no call without prompts pass"
    groups = segment.k.shape[1]
    dq, dprompt_k, dprompt_v, delta = reference.prompt_backward(
        to_rows(unpack(dout, cu_seqlens_q, longest), groups),
        to_rows(padded, groups),
        segment,
        scale,
        needs,
    )
    dgate = delta if needs[3] else None
    return (
        gradient(dq, padded, cu_seqlens_q, q),
        *prompt_gradients(dprompt_k, dprompt_v, dgate, padded, prompts),
    )
